"""The latent part of a checkpoint: two affine maps beside an ordinary GPT-2, which make it an auto-encoder of texts.

The encoder is a plain pass of the GPT-2 over a text: the mean of its last hidden states becomes the mean and the log
variance of q(z|x). The decoder is the same GPT-2 behind a prefix: z becomes keys and values that stand before every
layer, the scheme "memory" of Optimus (Li et al., arXiv 2004.04092).

Shapes: B texts, T tokens, D hidden size, Z latent dimensions, L layers, H heads, N prefix tokens, h head dim.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from edgelm.errors import ExportError

LATENT_FILE = "latent.safetensors"
"""Beside the weights of a GPT-2 in Hugging Face layout. transformers itself does not read it."""
_POSTERIOR, _PREFIX = ("posterior.weight", "posterior.bias"), ("prefix.weight", "prefix.bias")
MAX_SIZE = 4096
MAX_TOKENS = 64


class LatentMaps(torch.nn.Module):  # type: ignore[misc]
    """The map from pooled hidden states to q(z|x), and the map from z to the prefix."""

    def __init__(self, config: transformers.GPT2Config, size: int, tokens: int) -> None:
        """Make maps with torch's usual random weights for a GPT-2 with this `config`.

        Args:
            config: of the GPT-2.
            size: Z, dimensions of z.
            tokens: N, positions of the prefix.
        """
        super().__init__()
        self.size, self.tokens = size, tokens
        self.layers, self.heads, self.head_dim = config.n_layer, config.n_head, config.n_embd // config.n_head
        self.posterior = torch.nn.Linear(config.n_embd, 2 * size)
        self.prefix = torch.nn.Linear(size, 2 * config.n_layer * tokens * config.n_embd)

    def of_hidden(self, hidden: torch.Tensor, is_read: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log variance of q(z|x), float32 (B, Z) each.

        Args:
            hidden: last hidden states, (B, T, D).
            is_read: which positions count, (B, T) bool; at least one in each row.
        """
        weights = is_read.to(hidden.dtype).unsqueeze(-1)
        pooled = (hidden * weights).sum(dim=1) / weights.sum(dim=1)  # (B, D)
        mean, log_variance = self.posterior(pooled).float().chunk(2, dim=-1)
        return mean, log_variance

    def keys_values(self, z: torch.Tensor) -> torch.Tensor:
        """What `z` (B, Z) puts before every layer, (B, 2·L, H, N, h): each layer's keys, then its values."""
        rows: torch.Tensor = self.prefix(z)
        return rows.view(len(z), 2 * self.layers, self.heads, self.tokens, self.head_dim)

    def cache(self, z: torch.Tensor) -> Any:
        """`keys_values` of `z` (B, Z) as a ``transformers.DynamicCache``, for ``past_key_values``."""
        rows, cache = self.keys_values(z), transformers.DynamicCache()
        for layer in range(self.layers):
            cache.update(rows[:, 2 * layer], rows[:, 2 * layer + 1], layer)
        return cache

    def save(self, folder: Path) -> None:
        """Write `LATENT_FILE` into `folder`."""
        weights = {name: value.detach().float().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, folder / LATENT_FILE, {"prefix_tokens": str(self.tokens)})


def read_latent(folder: Path, model: Any, name: str) -> LatentMaps | None:
    """The latent part in a checkpoint's `folder`; None where it has none.

    Args:
        folder: of the checkpoint.
        model: the checkpoint's model.
        name: name of the checkpoint, for messages.

    Raises:
        ExportError: the file is damaged, was made for a model of other sizes, or the model is no GPT-2.
    """
    path = folder / LATENT_FILE
    if not path.is_file():
        return None
    if model.config.model_type != "gpt2":
        raise ExportError(f"{name!r} has {LATENT_FILE}, but is no GPT-2: remove the file to export the model alone")
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"cannot read {LATENT_FILE} of {name!r}: {error}") from None
    config = model.config
    if set(weights) != {*_POSTERIOR, *_PREFIX}:
        raise ExportError(f"{LATENT_FILE} of {name!r} has other tensors than a latent part: train it again")
    size, row = len(weights["posterior.bias"].flatten()) // 2, 2 * config.n_layer * config.n_embd
    tokens = len(weights["prefix.bias"].flatten()) // row
    shapes = [(2 * size, config.n_embd), (2 * size,), (row * tokens, size), (row * tokens,)]
    found = [tuple(weights[key].shape) for key in (*_POSTERIOR, *_PREFIX)]
    if found != shapes or not (1 <= size <= MAX_SIZE and 1 <= tokens <= MAX_TOKENS):
        raise ExportError(f"{LATENT_FILE} of {name!r} was made for a model of other sizes: train it again")
    if not all(bool(torch.isfinite(value).all()) for value in weights.values()):
        raise ExportError(f"{LATENT_FILE} of {name!r} contains NaN or infinity: it is damaged")
    maps = LatentMaps(config, size, tokens)
    maps.load_state_dict({key: value.float() for key, value in weights.items()})
    maps.eval().requires_grad_(False)
    return maps


@torch.no_grad()  # type: ignore[untyped-decorator]
def encode(model: Any, maps: LatentMaps, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log variance of q(z|x), (Z,) each, of one text's `ids`, the token before it included."""
    tokens = torch.tensor([ids])
    hidden = model.transformer(input_ids=tokens, use_cache=False).last_hidden_state
    mean, log_variance = maps.of_hidden(hidden, torch.ones_like(tokens, dtype=torch.bool))
    return mean[0], log_variance[0]


@torch.no_grad()  # type: ignore[untyped-decorator]
def token_logprobs(model: Any, maps: LatentMaps, ids: list[int], z: torch.Tensor) -> torch.Tensor:
    """log p of each of `ids` but the first behind the prefix of `z` (Z,), in nats, (T - 1,)."""
    tokens = torch.tensor([ids])
    logits = model(input_ids=tokens[:, :-1], past_key_values=maps.cache(z[None]), use_cache=True).logits[0]
    return logits.double().log_softmax(dim=-1).gather(1, tokens[0, 1:, None])[:, 0]


@torch.no_grad()  # type: ignore[untyped-decorator]
def draw(model: Any, maps: LatentMaps, z: torch.Tensor, begin: int, end: int, longest: int, seed: int) -> list[int]:
    """A text drawn at temperature 1 from p(x|z): `begin`, and the tokens after it up to `end`, which is left out.

    `longest` is the maximum number of tokens in all.
    """
    generator = torch.Generator().manual_seed(seed)
    ids, past, fed = [begin], maps.cache(z[None]), [begin]
    while len(ids) < longest:
        output = model(input_ids=torch.tensor([fed]), past_key_values=past, use_cache=True)
        probabilities = output.logits[0, -1].double().softmax(dim=-1)
        if len(ids) < 3:
            probabilities[end] = 0  # a text of one token measures hardly anything
        chosen = int(torch.multinomial(probabilities, 1, generator=generator))
        if chosen == end:
            break
        ids.append(chosen)
        past, fed = output.past_key_values, [chosen]
    return ids
