"""How a run uses this machine: its device, kernels and precision, and how large its micro-batches are."""

import time
from typing import Any, Literal, get_args

import torch
import transformers

from edgelm.engine.limits import rooms
from edgelm.errors import TrainingError
from edgelm_export.source.checkpoint import quiet_torch

Precision = Literal["fp32", "bf16"]
_ROUNDS = 3
_HOPELESS = 2.0
"""A precision whose round takes this many times as long as the other is not measured again."""
_SHORT_ROW_TOKENS = 64
"""In rows of 40 and 64 tokens, eager attention trains stories-6m 1.8 and 1.4 times as fast as torch's fused attention
in bfloat16 on an Intel Xeon; in rows of 128 fused attention is faster (docs/decisions.md)."""
_SHARE = 0.5
"""Part of the free memory for activations; weights, gradients, optimizer and other processes need the rest."""


def device_for(requested: str) -> str:
    """The device for an option: "cuda" or "cpu", where `requested` may also be "auto".

    Raises:
        TrainingError: a GPU is requested, and torch finds none.
    """
    if requested == "cuda" and not torch.cuda.is_available():
        raise TrainingError("--device cuda was asked for, but torch finds no CUDA GPU here")
    return "cuda" if requested != "cpu" and torch.cuda.is_available() else "cpu"


def fast_to_train(model: Any, row_tokens: int | None = None) -> Any:
    """`model` with fused kernels of the same functions: for GELU, and for attention that has no unusual scales.

    Rows of `row_tokens` tokens, if that is known, may be too short for fused attention.
    """
    config = model.config
    is_gpt2 = config.model_type == "gpt2"
    unusual = (
        config.scale_attn_by_inverse_layer_idx or config.reorder_and_upcast_attn or not config.scale_attn_weights
        if is_gpt2
        else getattr(config, "attn_logit_softcapping", None) is not None
    )
    if row_tokens is not None and row_tokens <= _SHORT_ROW_TOKENS:
        config._attn_implementation = "eager"
    elif not unusual:
        config._attn_implementation = "sdpa"
    if is_gpt2 and config.activation_function == "gelu_new":
        for block in model.transformer.h:
            block.mlp.act = torch.nn.GELU(approximate="tanh")
    return model


def fastest_precision(model: Any, tokens: int, window: int) -> tuple[Precision, dict[Precision, float]]:
    """The faster precision for one micro-batch of `tokens` tokens, and the seconds that each precision takes.

    Only some processors multiply bfloat16 faster than float32, so both are measured, in windows of `window` tokens. The
    weights and torch's random state stay as they are; gradients are dropped.
    """
    kind = model.device.type
    batch = torch.zeros((max(1, tokens // window), window), dtype=torch.int64, device=model.device)
    seconds: dict[Precision, float] = {}
    with quiet_torch(), torch.random.fork_rng():
        for precision in get_args(Precision):
            times = []
            for _ in range(_ROUNDS):
                began = time.perf_counter()
                with torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16"):
                    loss = model(input_ids=batch, labels=batch, use_cache=False).loss
                loss.backward()
                if kind == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - began)
                if times[-1] > _HOPELESS * min(seconds.values(), default=times[-1]):
                    break
            seconds[precision] = min(times)
    model.zero_grad(set_to_none=True)
    return min(seconds, key=lambda precision: seconds[precision]), seconds


def parts_that_fit(config: transformers.GPT2Config, batch_tokens: int, free_bytes: float) -> int:
    """The fewest equal micro-batches of whole contexts whose activations take at most half of `free_bytes`.

    Where not even one context fits, each context is a micro-batch.
    """
    contexts = batch_tokens // config.n_positions
    limit = _SHARE * free_bytes / activation_bytes(config) / config.n_positions  # contexts of a micro-batch
    divisors = (parts for parts in range(1, contexts + 1) if contexts % parts == 0)
    return next(parts for parts in divisors if contexts / parts <= max(1, limit))


def activation_bytes(config: transformers.GPT2Config) -> int:
    """Memory that a backward pass in float32 needs for one token: 3 numbers per logit, 25 per layer and channel.

    The two factors are fitted to measurements of two shapes: 198 KB per token at 6M, 1,476 KB at 124M.
    """
    return 4 * (3 * int(config.vocab_size) + 25 * int(config.n_layer) * int(config.n_embd))


def free_bytes(device: torch.device) -> float:
    """Memory that this process may still take on `device`."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(min((room.free_bytes for room in rooms()), default=4 * 2**30))
