"""Smoothing: move difficulty between activations and weights, exactly, before both are rounded.

A channel of a product's input is divided by a factor where that channel is made: in a LayerNorm, or in the value
columns of qkv. The matching row of the product is multiplied by the factor, so the function stays the same.
SmoothQuant's factors (Xiao et al., arXiv 2211.10438) even out the largest magnitudes. AWQ's factors (Lin et al.,
arXiv 2306.00978) give important channels a finer grid. Both are tried, and the factors that disturb the product's
output least are taken.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from edgelm_export.model.decoder import Array, Linear, Norm
from edgelm_export.quantize.storage import Storage, block_size_for

ALPHAS = (0.25, 0.5, 0.75, 1.0)
"""How much of the difficulty moves from activations to weights."""


def fold_norm(norm: Norm, linear: Linear, factors: Array) -> tuple[Norm, Linear]:
    """Divide the output channels of `norm` by `factors` (D,), and multiply the rows of `linear`, which reads them."""
    return (
        Norm(norm.weight / factors, norm.bias / factors),
        replace(linear, weight=linear.weight * factors[:, None]),
    )


def fold_values(qkv: Linear, attention_out: Linear, factors: Array) -> tuple[Linear, Linear]:
    """Divide the values by `factors`, and multiply the rows of `attention_out` by them; attention only averages values.

    Args:
        qkv: its last columns are the values.
        attention_out: takes the averaged values. Every value head serves one query head.
        factors: one for each value column, (H·p,).
    """
    divisor = np.ones(len(qkv.bias), np.float32)  # (columns of qkv,)
    divisor[-len(factors) :] = factors
    return (
        replace(qkv, weight=qkv.weight / divisor, bias=qkv.bias / divisor),
        replace(attention_out, weight=attention_out.weight * factors[:, None]),
    )


def best_factors(weight: Array, inputs: Tensor, storage: Storage) -> Array:
    """The factors (K,) of a product.

    Args:
        weight: of the product, (K, N).
        inputs: a sample of what enters the product, (tokens, K).
        storage: how the product will be stored.
    """
    w = torch.from_numpy(weight)
    exact = inputs @ w  # (tokens, N)
    best, least = torch.ones(len(w)), torch.inf
    for factors in _candidates(w, inputs):
        output = _rounded_input(inputs / factors, storage) @ _rounded_weight(w * factors[:, None], storage)
        error = float((output - exact).square().sum())
        if error < least:
            best, least = factors, error
    return np.asarray(best.numpy(), np.float32)


def _candidates(weight: Tensor, inputs: Tensor) -> Iterator[Tensor]:
    yield torch.ones(len(weight))
    peaks, mean, rows = inputs.abs().amax(dim=0), inputs.abs().mean(dim=0), weight.abs().amax(dim=1)  # (K,) each
    used = (peaks > 0) & (rows > 0)
    for alpha in ALPHAS:
        for factors in (peaks**alpha / rows ** (1 - alpha), mean**alpha):
            factors = torch.where(used, factors, 1.0)
            # Only ratios matter; this keeps the magnitudes near their old values.
            yield factors / factors.log().mean().exp()


def _rounded_input(x: Tensor, storage: Storage) -> Tensor:
    """Activations `x` (tokens, K) as the operators round them: to 8 bits, with a scale per token or per block of it."""
    if storage.format == "int8_row":
        return _rounded(x, 127)
    cut = _cut(x, storage)
    return _rounded(cut, 127).reshape(len(x), -1)[:, : x.shape[1]]


def _rounded_weight(weight: Tensor, storage: Storage) -> Tensor:
    """`weight` (K, N) rounded to nearest. A search for better scales does not change which factors are good."""
    if storage.format == "int8_row":
        return _rounded(weight.T, 127).T
    cut = _cut(weight.T, storage)
    return _rounded(cut, 2 ** (storage.bits - 1) - 1).reshape(weight.shape[1], -1)[:, : len(weight)].T


def _cut(rows: Tensor, storage: Storage) -> Tensor:
    """`rows` (N, K) in the blocks that `storage` makes of them, (N, blocks, block size)."""
    block = block_size_for(rows.shape[1], storage.block_size or rows.shape[1])
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % block)).reshape(len(rows), -1, block)


def _rounded(x: Tensor, highest: int) -> Tensor:
    """Round `x` to whole multiples, up to `highest`, of a scale for each run of its last axis."""
    scales = x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30) / highest
    return (x / scales).round() * scales
