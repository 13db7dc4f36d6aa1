"""Matrices that lie on a 4-bit grid already: files of 4-bit weights are sources, and rounding them again would lose.

In GGUF files of the types Q4_0, Q4_1 and Q4_K, and in some other formats, 32 neighbours of a row are
``offset + step * q`` with whole numbers q from 0 to 15. Such a matrix keeps its grid, so it loses nothing but the last
bits of its steps and offsets.

Shapes: rows are (N, K), B = K / 32 blocks in each.
"""

import numpy as np
import numpy.typing as npt

from edgelm_export.model.decoder import Array
from edgelm_export.quantize.storage import GRID_BLOCK, GridQuantized, pack_blocks, quantize_blocks

_TOLERANCE = 1e-3
"""How far a weight may lie from the grid, in steps. Floats that were never rounded miss it by up to half a step."""
_SAMPLE = 256
"""Blocks that are looked at first, because most matrices lie on no grid."""
_ROWS_AT_ONCE = 512


def find_grid(rows: Array) -> GridQuantized | None:
    """`rows` (N, K) on their 4-bit grid of blocks of 32; None where they lie on no such grid.

    A matrix most of whose blocks have one value lies on every grid, and counts as lying on none.
    """
    n, k = rows.shape
    if k % GRID_BLOCK:
        return None
    blocks = rows.reshape(-1, GRID_BLOCK)
    if _on_grid(blocks[:: max(1, len(blocks) // _SAMPLE)]) is None:
        return None
    parts = []
    for start in range(0, n, _ROWS_AT_ONCE):
        part = _on_grid(rows[start : start + _ROWS_AT_ONCE].reshape(-1, GRID_BLOCK))
        if part is None:
            return None
        parts.append(part)
    codes, steps, offsets = (np.concatenate(kind) for kind in zip(*parts, strict=True))
    if np.mean(codes.min(axis=1) == codes.max(axis=1)) > 0.5:
        return None
    return _around_zero(codes.reshape(n, -1, GRID_BLOCK), steps.reshape(n, -1), offsets.reshape(n, -1))


def _around_zero(codes: npt.NDArray[np.uint8], steps: Array, offsets: Array) -> GridQuantized:
    """Put offsets (N, B) into zero points, and what is left of them into columns behind `codes` (N, B, 32)."""
    n, blocks, _ = codes.shape
    zero_points = np.clip(np.rint(8 - offsets / steps), 0, 15)  # (N, B)
    remainders = offsets - (8 - zero_points) * steps
    remainders[np.abs(remainders) < _TOLERANCE * np.abs(steps)] = 0
    columns = blocks * GRID_BLOCK
    width = columns
    if remainders.any():
        width += blocks
        added = quantize_blocks(remainders, 4, GRID_BLOCK)
        low_and_high = np.stack([added.packed & 15, added.packed >> 4], axis=-1).reshape(n, -1, GRID_BLOCK)
        codes = np.concatenate([codes, low_and_high], axis=1)
        steps = np.concatenate([steps, added.scales.astype(np.float32)], axis=1)
        zero_points = np.concatenate([zero_points, np.full(added.scales.shape, 8)], axis=1)
    is_symmetric = (zero_points == 8).all()
    return GridQuantized(
        pack_blocks(codes, _narrow(steps), 4, width), None if is_symmetric else zero_points.astype(np.uint8), columns
    )


def _on_grid(blocks: Array) -> tuple[npt.NDArray[np.uint8], Array, Array] | None:
    """The unsigned codes (M, 32), steps (M,) and offsets (M,) of `blocks` (M, 32); None where one is on no grid."""
    lowest = blocks.min(axis=1, keepdims=True)  # (M, 1)
    span = blocks.max(axis=1, keepdims=True) - lowest
    codes = np.zeros(blocks.shape, np.int16)
    steps = np.where(span == 0, np.float32(1), np.float32(0))  # (M, 1); 0 where no step was found yet
    for levels in range(15, 7, -1):  # a coarser grid lies on one of these too
        left = np.flatnonzero(steps == 0)
        if len(left) == 0:
            break
        places = (blocks[left] - lowest[left]) / (span[left] / np.float32(levels))
        whole = np.rint(places)
        fits = np.abs(places - whole).max(axis=1) < _TOLERANCE
        divisor = np.gcd.reduce(whole[fits].astype(np.int16), axis=1, keepdims=True)
        codes[left[fits]] = whole[fits] // divisor
        steps[left[fits]] = span[left[fits]] / np.float32(levels) * divisor
    if (steps == 0).any():
        return None
    # A block of one value is once its step.
    constant = (span == 0) & (lowest != 0)
    base = np.where(span == 0, np.float32(0), lowest)  # the value of code 0
    steps = np.where(constant, lowest, steps).astype(np.float32)
    codes += constant
    # Codes may move up together, so that less has to be added to them: nothing where zero is on the grid within reach.
    highest = codes.max(axis=1, keepdims=True)
    shift = np.clip(np.rint(8 + base / steps), 0, 15 - highest).astype(np.int16)
    offsets = base + (8 - shift) * steps
    offsets = np.where(np.abs(offsets) < _TOLERANCE * np.abs(steps), np.float32(0), offsets).astype(np.float32)
    unsigned = codes + shift
    # A grid that reaches up to 8 steps, which Q4_0 has too, reaches down to 8 negative steps.
    zero = np.rint(-base / steps).astype(np.int64)  # the code of 0
    mirrored = (highest - zero == 8) & (zero >= 0) & (zero < 8) & (np.abs(base + zero * steps) < _TOLERANCE * steps)
    offsets = np.where(mirrored, np.float32(0), offsets)
    unsigned = np.where(mirrored, 8 + zero - codes, unsigned)
    steps = np.where(mirrored, -steps, steps)
    return unsigned.astype(np.uint8), steps[:, 0].astype(np.float32), offsets[:, 0].astype(np.float32)


def _narrow(steps: Array) -> npt.NDArray[np.floating]:
    """The steps in float16 where they change by less than the tolerance of the grid allows, else in float32."""
    with np.errstate(over="ignore"):
        narrow = steps.astype(np.float16)
    changed = np.abs(narrow.astype(np.float32) - steps)
    return narrow if (changed <= np.abs(steps) * _TOLERANCE).all() else steps
