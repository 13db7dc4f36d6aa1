"""In how many parts a batch is computed: as few as fit into memory."""

import torch
import transformers

from edgelm.engine.memory import rooms

_SHARE = 0.5
"""Of the free memory: weights, gradients and optimizer want some of it, and so does whoever else is there."""


def parts_that_fit(config: transformers.GPT2Config, batch_tokens: int, free_bytes: float) -> int:
    """The fewest equal parts, of whole contexts each, whose activations take no more than half of `free_bytes`; one
    context each where not even that fits."""
    contexts = batch_tokens // config.n_positions
    most = _SHARE * free_bytes / activation_bytes(config) / config.n_positions  # contexts at once
    return next(parts for parts in range(1, contexts + 1) if contexts % parts == 0 and contexts / parts <= max(1, most))


def activation_bytes(config: transformers.GPT2Config) -> int:
    """Of a token, kept for the backward pass in float32: three numbers for each logit, 25 for each layer and channel.
    Fitted to what two shapes took, 198 KB a token at 6M and 1,476 KB at 124M."""
    return 4 * (3 * int(config.vocab_size) + 25 * int(config.n_layer) * int(config.n_embd))


def free_bytes(device: torch.device) -> float:
    """What this process may still take there."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(min((room.free_bytes for room in rooms()), default=4 * 2**30))
