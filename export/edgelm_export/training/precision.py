"""Whether mixed precision helps on this machine: measured, because only some CPUs multiply bfloat16 faster."""

import time
from typing import Any

import torch

from edgelm_export.checkpoint import quiet_torch
from edgelm_export.training.run import Precision

_ROUNDS = 3


def fastest_precision(model: Any, tokens: int, window: int) -> tuple[Precision, dict[str, float]]:
    """The faster of float32 and bfloat16 autocast for a micro-batch of `tokens` in windows, and the seconds of each.

    On a GPU that has bfloat16 it is taken unmeasured. Weights, gradients and torch's random state stay as they are.
    """
    if model.device.type == "cuda":
        return ("bf16" if torch.cuda.is_bf16_supported() else "fp32"), {}
    random_state = torch.get_rng_state()
    batch = torch.randint(model.config.vocab_size, (max(1, tokens // window), window))
    seconds = {}
    for precision in ("fp32", "bf16"):
        times = []
        for _ in range(_ROUNDS):
            began = time.perf_counter()
            with quiet_torch(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            times.append(time.perf_counter() - began)
        seconds[precision] = min(times)
    model.zero_grad(set_to_none=True)
    torch.set_rng_state(random_state)
    return ("bf16" if seconds["bf16"] < seconds["fp32"] else "fp32"), seconds
