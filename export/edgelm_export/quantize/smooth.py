"""Smoothing: move difficulty between activations and weights, exactly, before both are rounded.

A channel of a product's input is divided by a factor where it is made (a LayerNorm, or the value columns of qkv) and
the matching row of the product multiplied by it: the same function. Candidates for the factors are SmoothQuant's
(Xiao et al., arXiv 2211.10438), which evens out the largest magnitudes, and AWQ's (Lin et al., arXiv 2306.00978), which
gives channels that matter a finer grid; the one that disturbs the product's output least is taken.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from edgelm_export.model.gpt2 import Linear, Norm
from edgelm_export.quantize.storage import Array, Storage, block_size_for

ALPHAS = (0.25, 0.5, 0.75, 1.0)
"""How much of the difficulty moves from activations to weights."""


def fold_norm(norm: Norm, linear: Linear, factors: Array) -> tuple[Norm, Linear]:
    """Divide the norm's output channels by `factors` (D,), and multiply the rows of `linear`, which takes them."""
    return (
        Norm(norm.weight / factors, norm.bias / factors),
        replace(linear, weight=linear.weight * factors[:, None]),
    )


def fold_values(qkv: Linear, attention_out: Linear, factors: Array) -> tuple[Linear, Linear]:
    """The same for the values, the last third of the columns of `qkv`, which attention only averages: (H·p,)."""
    divisor = np.ones(len(qkv.bias), np.float32)  # (3·H·p,)
    divisor[-len(factors) :] = factors
    return (
        replace(qkv, weight=qkv.weight / divisor, bias=qkv.bias / divisor),
        replace(attention_out, weight=attention_out.weight * factors[:, None]),
    )


def best_factors(weight: Array, inputs: Tensor, storage: Storage) -> Array:
    """Factors (K,) for a product `weight` (K, N) that will be stored as `storage` and sees `inputs` (tokens, K)."""
    w = torch.from_numpy(weight)
    wanted = inputs @ w  # (tokens, N)
    best, least = torch.ones(len(w)), torch.inf
    for factors in _candidates(w, inputs):
        output = _rounded_input(inputs / factors, storage) @ _rounded_weight(w * factors[:, None], storage)
        error = float((output - wanted).square().sum())
        if error < least:
            best, least = factors, error
    found: Array = best.numpy().astype(np.float32)
    return found


def _candidates(weight: Tensor, inputs: Tensor) -> Iterator[Tensor]:
    yield torch.ones(len(weight))
    peaks, mean, rows = inputs.abs().amax(dim=0), inputs.abs().mean(dim=0), weight.abs().amax(dim=1)  # (K,) each
    used = (peaks > 0) & (rows > 0)
    for alpha in ALPHAS:
        for factors in (peaks**alpha / rows ** (1 - alpha), mean**alpha):
            factors = torch.where(used, factors, 1.0)
            # Only ratios matter; this keeps the numbers near where they were.
            yield factors / factors.log().mean().exp()


def _rounded_input(x: Tensor, storage: Storage) -> Tensor:
    """What the operators make of activations (tokens, K): 8 bits, one scale a token, or a token and block."""
    if storage.format == "int8_row":
        return _rounded(x, 127)
    cut = _cut(x, storage)
    return _rounded(cut, 127).reshape(len(x), -1)[:, : x.shape[1]]


def _rounded_weight(weight: Tensor, storage: Storage) -> Tensor:
    """Round to nearest, (K, N): what the scales will be searched to better does not change which factors are good."""
    if storage.format == "int8_row":
        return _rounded(weight.T, 127).T
    cut = _cut(weight.T, storage)
    return _rounded(cut, 2 ** (storage.bits - 1) - 1).reshape(weight.shape[1], -1)[:, : len(weight)].T


def _cut(rows: Tensor, storage: Storage) -> Tensor:
    block = block_size_for(rows.shape[1], storage.block_size or rows.shape[1])
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % block)).reshape(len(rows), -1, block)


def _rounded(x: Tensor, highest: int) -> Tensor:
    scales = x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30) / highest
    return (x / scales).round() * scales
