"""GPTQ (Frantar et al., arXiv 2210.17323): rounding that lets the columns still to come make up for each error."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgelm_export.quantize.storage import Array, BlockQuantized, cut_blocks, pack_blocks, search_scales

DAMPING = 0.01
"""Share of the mean diagonal that is added to the Hessian's, as in the paper."""

_LAZY_COLUMNS = 128
"""Errors reach the columns beyond these in one product, not one by one."""


def gptq_blocks(rows: Array, hessian: npt.NDArray[np.float32], bits: int, block_size: int) -> BlockQuantized:
    """Quantize `rows` in blocks so that ``x @ rows.T`` changes least over the x that made `hessian`.

    Columns are taken in the order of their importance, the largest diagonal first ("act-order"); scales are searched
    before, weighted by it, so that a block stays a run of neighbouring columns and the kernels need no index.

    Args:
        rows: (N, K) float32.
        hessian: (K, K), the sum of ``x.T @ x`` over calibration inputs x (tokens, K).
    """
    k = rows.shape[1]
    damped = torch.from_numpy(hessian).double()
    diagonal = damped.diagonal().clone()  # (K,)
    dead = diagonal == 0  # inputs that never were anything but zero
    damped = damped + torch.diag(torch.where(dead, 1.0, DAMPING * diagonal.mean()))
    order = torch.argsort(diagonal, descending=True, stable=True)  # (K,)
    # Row j of this factor holds what an error in column j asks of the columns after it.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped[order][:, order]))
    factor = torch.linalg.cholesky(inverse, upper=True).float()  # (K, K)

    scales = search_scales(rows, bits, block_size, np.asarray(diagonal.numpy(), np.float32) + np.float32(1e-12))
    per_column = torch.from_numpy(scales).repeat_interleave(block_size, dim=1)[:, :k][:, order]  # (N, K)
    left = torch.from_numpy(rows)[:, order].T.contiguous()  # (K, N): a column at a time is then a row of memory
    codes = _round_in_turn(left, per_column.T.contiguous(), factor, 2 ** (bits - 1))  # (K, N)
    back = torch.empty_like(codes)
    back[order] = codes
    # Padding stands for zero, whose code is the middle.
    whole = cut_blocks(back.T.numpy(), block_size) + 2 ** (bits - 1)
    return pack_blocks(whole.astype(np.uint8), scales, bits, k)


def _round_in_turn(left: Tensor, scales: Tensor, factor: Tensor, middle: int) -> Tensor:
    """Codes (K, N) from -middle to middle - 1, columns of the matrix in the order of the rows of `left` (K, N)."""
    k = len(left)
    codes = torch.empty_like(left)
    for start in range(0, k, _LAZY_COLUMNS):
        stop = min(start + _LAZY_COLUMNS, k)
        errors = torch.empty_like(left[start:stop])
        for column in range(start, stop):
            codes[column] = (left[column] / scales[column]).round().clamp(-middle, middle - 1)
            error = (left[column] - codes[column] * scales[column]) / factor[column, column]  # (N,)
            errors[column - start] = error
            left[column + 1 : stop] -= factor[column, column + 1 : stop, None] * error
        left[stop:] -= factor[start:stop, stop:].T @ errors
    return codes
