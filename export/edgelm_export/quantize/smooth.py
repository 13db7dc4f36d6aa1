"""Smoothing: move difficulty between activations and weights, exactly, before both are rounded.

A channel of a product's input is divided by a factor where that channel is made: in a norm, in the value columns of
qkv, or in the up columns of a gated MLP. The matching row of the product is multiplied by the factor, so the function
stays the same.
SmoothQuant's factors (Xiao et al., arXiv 2211.10438) even out the largest magnitudes. AWQ's factors (Lin et al.,
arXiv 2306.00978) give important channels a finer grid. Both are tried, and the factors that disturb the product's
output least are taken.
"""

from collections.abc import Callable, Iterator
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
    return norm.divided(factors), _multiplied_rows(linear, factors)


def fold_columns(producer: Linear, consumer: Linear, factors: Array, shared_by: int = 1) -> tuple[Linear, Linear]:
    """Divide the last columns of `producer` by `factors`, and multiply the rows of `consumer` that read them.

    The columns are values, which attention only averages, or the up part of a gated MLP, which the gate only
    multiplies. Each column of a value head feeds `shared_by` query heads.

    Args:
        factors: one for each such column; those of value heads are (G, p).
        shared_by: how many heads in a row of `consumer` read the same value head.
    """
    divisor = np.ones(producer.weight.shape[1], np.float32)  # (columns of producer,)
    divisor[-factors.size :] = factors.reshape(-1)
    bias = None if producer.bias is None else producer.bias / divisor
    rows = np.repeat(factors, shared_by, axis=0).reshape(-1)
    return replace(producer, weight=producer.weight / divisor, bias=bias), _multiplied_rows(consumer, rows)


def _multiplied_rows(linear: Linear, factors: Array) -> Linear:
    return replace(linear, weight=linear.weight * factors[:, None])


def best_factors(weight: Array, inputs: Tensor, storage: Storage, shared: tuple[int, int] = (1, 1)) -> Array:
    """The factors (K,) of a product with `weight` (K, N), which will be stored as `storage` says.

    Args:
        weight: (K, N).
        inputs: a sample of the product's inputs, (tokens, K).
        storage: of the weight.
        shared: G and S, where K has the axes (G, S, rest) and the S parts of a group must have the same factors,
            because one value head feeds S query heads.
    """
    w = torch.from_numpy(weight)
    exact = inputs @ w  # (tokens, N)

    def error(factors: Tensor) -> float:
        rounded_weight = _rounded_rows((w * factors[:, None]).T, 2 ** (storage.bits - 1) - 1, storage).T
        return float((_rounded_rows(inputs / factors, 127, storage) @ rounded_weight - exact).square().sum())

    return np.asarray(min(_candidates(w, inputs, shared), key=error).numpy(), np.float32)


def _candidates(weight: Tensor, inputs: Tensor, shared: tuple[int, int]) -> Iterator[Tensor]:
    def grouped(values: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
        """The `values` (K,), reduced over the parts that share factors, and repeated for each of them."""
        parts = values.reshape(*shared, -1)  # (G, S, rest)
        return reduce(parts, dim=1, keepdim=True).expand_as(parts).reshape(-1)

    yield torch.ones(len(weight))
    peaks = grouped(inputs.abs().amax(dim=0), torch.amax)  # (K,) each
    mean = grouped(inputs.abs().mean(dim=0), torch.mean)
    rows = grouped(weight.abs().amax(dim=1), torch.amax)
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
