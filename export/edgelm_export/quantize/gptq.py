"""GPTQ (Frantar et al., arXiv 2210.17323): rounds column by column; later columns make up for each error."""

import numpy as np
import torch
from torch import Tensor

from edgelm_export.model.decoder import Array
from edgelm_export.quantize.storage import BlockQuantized, cut_blocks, pack_blocks, search_scales

DAMPING = 0.01
"""Share of the Hessian's mean diagonal that is added to its diagonal, as in the paper."""

_LAZY_COLUMNS = 128
"""The errors of these columns reach all later columns in one product."""


def gptq_blocks(rows: Array, hessian: Array, bits: int, block_size: int) -> BlockQuantized:
    """Quantize `rows` in blocks so that ``x @ rows.T`` changes least over the inputs x that made `hessian`.

    The column with the largest diagonal of the Hessian is rounded first ("act-order"). The scales are searched before
    that, weighted by the diagonal, so a block stays a run of neighbouring columns and the kernels need no index.

    Args:
        rows: (N, K).
        hessian: (K, K), the sum of ``x.T @ x`` over calibration inputs x (tokens, K).
        bits: size of a code.
    """
    k = rows.shape[1]
    damped = torch.from_numpy(hessian).double()
    diagonal = damped.diagonal().clone()  # (K,)
    dead = diagonal == 0  # inputs that were always zero
    damped = damped + torch.diag(torch.where(dead, 1.0, DAMPING * diagonal.mean()))
    order = torch.argsort(diagonal, descending=True, stable=True)  # (K,)
    # Row j of this factor says by how much each later column makes up for an error in column j.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped[order][:, order]))
    factor = torch.linalg.cholesky(inverse, upper=True).float()  # (K, K)

    scales = search_scales(rows, bits, block_size, np.asarray(diagonal.numpy(), np.float32) + np.float32(1e-12))
    per_column = torch.from_numpy(scales).repeat_interleave(block_size, dim=1)[:, :k][:, order]  # (N, K)
    remaining = torch.from_numpy(rows)[:, order].T.contiguous()  # (K, N): a column of the matrix is a row of memory
    codes = _round_in_turn(remaining, per_column.T.contiguous(), factor, 2 ** (bits - 1))  # (K, N)
    back = torch.empty_like(codes)
    back[order] = codes
    # The padding is zero, whose code is the middle one.
    unsigned = cut_blocks(back.T.numpy(), block_size) + 2 ** (bits - 1)
    return pack_blocks(unsigned.astype(np.uint8), scales, bits, k)


def _round_in_turn(remaining: Tensor, scales: Tensor, factor: Tensor, middle: int) -> Tensor:
    """Codes (K, N) from -`middle` to `middle` - 1; changes `remaining`.

    The rows of `remaining` (K, N) are the columns of the matrix in the order of their rounding. Each entry has a scale
    in `scales` (K, N). `factor` (K, K) says how an error in one column changes later columns.
    """
    k = len(remaining)
    codes = torch.empty_like(remaining)
    for start in range(0, k, _LAZY_COLUMNS):
        stop = min(start + _LAZY_COLUMNS, k)
        errors = torch.empty_like(remaining[start:stop])
        for column in range(start, stop):
            codes[column] = (remaining[column] / scales[column]).round().clamp(-middle, middle - 1)
            error = (remaining[column] - codes[column] * scales[column]) / factor[column, column]  # (N,)
            errors[column - start] = error
            remaining[column + 1 : stop] -= factor[column, column + 1 : stop, None] * error
        remaining[stop:] -= factor[start:stop, stop:].T @ errors
    return codes
