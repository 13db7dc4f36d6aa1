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

    The values are the last H·p columns of `qkv`, with a factor each. Every value head serves one query head.
    """
    divisor = np.ones(len(qkv.bias), np.float32)  # (columns of qkv,)
    divisor[-len(factors) :] = factors
    return (
        replace(qkv, weight=qkv.weight / divisor, bias=qkv.bias / divisor),
        replace(attention_out, weight=attention_out.weight * factors[:, None]),
    )


def best_factors(weight: Array, inputs: Tensor, storage: Storage) -> Array:
    """The factors (K,) of a product with `weight` (K, N), which will be stored as `storage` says.

    `inputs` (tokens, K) are a sample of the product's inputs.
    """
    w = torch.from_numpy(weight)
    exact = inputs @ w  # (tokens, N)

    def error(factors: Tensor) -> float:
        rounded_weight = _rounded_rows((w * factors[:, None]).T, 2 ** (storage.bits - 1) - 1, storage).T
        return float((_rounded_rows(inputs / factors, 127, storage) @ rounded_weight - exact).square().sum())

    return np.asarray(min(_candidates(w, inputs), key=error).numpy(), np.float32)


def _candidates(weight: Tensor, inputs: Tensor) -> Iterator[Tensor]:
    yield torch.ones(len(weight))
    peaks, mean, rows = inputs.abs().amax(dim=0), inputs.abs().mean(dim=0), weight.abs().amax(dim=1)  # (K,) each
    used = (peaks > 0) & (rows > 0)
    for alpha in ALPHAS:
        for factors in (peaks**alpha / rows ** (1 - alpha), mean**alpha):
            factors = torch.where(used, factors, 1.0)
            # Only ratios matter; this keeps the magnitudes near their old values.
            yield factors / factors.log().mean().exp()


def _rounded_rows(rows: Tensor, highest: int, storage: Storage) -> Tensor:
    """`rows` (N, K) rounded to whole multiples, up to `highest`, of a scale per row or per block, as `storage` says.

    The operators round activations in this way. A search for better scales of the weights does not change which factors
    are good.
    """
    n, k = rows.shape
    size = k if storage.block_size is None else block_size_for(k, storage.block_size)
    blocks = torch.nn.functional.pad(rows, (0, -k % size)).reshape(n, -1, size)
    scales = blocks.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30) / highest
    return ((blocks / scales).round() * scales).reshape(n, -1)[:, :k]
