"""Whether mixed precision helps on this machine: measured, because only some processors multiply bfloat16 faster."""

import time
from typing import Any

import torch

from edgelm_export.source.checkpoint import quiet_torch
from edgelm_train.run.loop import Precision

_ROUNDS = 3


def fastest_precision(model: Any, tokens: int, window: int) -> tuple[Precision, dict[Precision, float]]:
    """The faster of float32 and bfloat16 autocast for a micro-batch of `tokens` in windows, and the seconds of each.

    Weights and torch's random state stay as they are; gradients are dropped.
    """
    kind = model.device.type
    batch = torch.zeros((max(1, tokens // window), window), dtype=torch.int64, device=model.device)
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    seconds = {}
    with quiet_torch(), torch.random.fork_rng():
        for precision in precisions:
            times = []
            for _ in range(_ROUNDS):
                began = time.perf_counter()
                with torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16"):
                    loss = model(input_ids=batch, labels=batch, use_cache=False).loss
                loss.backward()
                if kind == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - began)
            seconds[precision] = min(times)
    model.zero_grad(set_to_none=True)
    return min(precisions, key=lambda precision: seconds[precision]), seconds
