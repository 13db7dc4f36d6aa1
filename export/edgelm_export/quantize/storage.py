"""Matrices in few bits: pure functions on arrays. `restored` gives the floats that a stored matrix stands for.

Shapes: a product's weight is (K, N), inputs by outputs; rows to cut into blocks are (N, K).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgelm.bundle.operators import SUMMED
from edgelm_export.model.decoder import Array

ALIGNMENT_BYTES = 4096
"""Where a tensor begins in the data file: at a page, so that every weight can be mapped on its own."""
INLINE_BYTES = 1024
"""Smaller tensors stay inside the graph file."""

BLOCK_SIZES = (256, 128, 64, 32, 16)
"""Sizes for which MatMulNBits and GatherBlockQuantized have fast kernels, best first."""

_SMALLEST_CLIP = 0.6
_CLIPS = 20


@dataclass(frozen=True)
class Storage:
    """How one matrix is stored, in the words of the manifest."""

    format: Literal["float32", "float16", "int8_row", "block"]
    bits: int
    block_size: int | None = None
    """The largest allowed block. `block_size_for` chooses a smaller one where this size does not divide the rows."""
    keeps_grid: bool = False
    """Whether the source's own 4-bit grid is kept, and no weight is rounded again."""

    @property
    def uses_gptq(self) -> bool:
        """Whether GPTQ rounds the matrix. It needs the product's inputs; 8 bits, floats and a kept grid do not."""
        return self.format == "block" and self.bits == 4 and not self.keeps_grid


FLOAT32 = Storage("float32", 32)
FLOAT16 = Storage("float16", 16)
INT8_ROW = Storage("int8_row", 8)
"""int8 weights with one scale per output column; the activations they meet have one scale per token (W8A8)."""
GRID_BLOCK = SUMMED
"""Weights that share a step, a zero point and a remainder of a kept grid."""
GRID4 = Storage("block", 4, GRID_BLOCK, keeps_grid=True)


@dataclass(frozen=True)
class FloatStored:
    """A matrix in float32 or float16, with the axes of the source."""

    values: npt.NDArray[np.floating]

    @property
    def storage(self) -> Storage:
        return FLOAT32 if self.values.dtype == np.float32 else FLOAT16

    def restored(self) -> Array:
        return self.values.astype(np.float32)


@dataclass(frozen=True)
class RowQuantized:
    """int8 weights with a scale per output column."""

    values: npt.NDArray[np.int8]
    """(K, N)."""
    scales: Array
    """(N,)."""
    storage = INT8_ROW

    def restored(self) -> Array:
        """The floats that the codes stand for, (N, K), as in `BlockQuantized`."""
        return np.ascontiguousarray((self.values * self.scales).T)


@dataclass(frozen=True)
class BlockQuantized:
    """Rows cut into blocks along K. Each block has a scale. MatMulNBits and GatherBlockQuantized take this layout."""

    packed: npt.NDArray[np.uint8]
    """(N, blocks, block_size · bits / 8); a byte holds two 4-bit codes, the first in its low half."""
    scales: npt.NDArray[np.floating]
    """(N, blocks), float32, or float16 where a kept grid has steps that float16 holds; a scale may be negative."""
    bits: int
    block_size: int
    columns: int
    """K. The last block of a row may reach beyond it."""

    @property
    def storage(self) -> Storage:
        return Storage("block", self.bits, self.block_size)

    def restored(self) -> Array:
        """The floats that the codes stand for, (N, K)."""
        codes = self.packed
        if self.bits == 4:
            codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:2], -1)
        centred = codes.astype(np.float32) - 2 ** (self.bits - 1)  # (N, blocks, block_size)
        return np.ascontiguousarray((centred * self.scales[:, :, None]).reshape(len(codes), -1)[:, : self.columns])


@dataclass(frozen=True)
class GridQuantized:
    """Rows on the 4-bit grid that their source has: ``step * (code - zero point)`` in every block of 32.

    A grid that does not pass through zero leaves a remainder of at most half a step, one number for each block. It is
    added to all weights of the block, so it is a weight of the sum of the block's inputs. The remainders follow the
    codes of their row, as further columns.
    """

    codes: BlockQuantized
    """(N, K), or (N, K + K / 32) with the remainders; its own `restored` knows no zero points."""
    zero_points: npt.NDArray[np.uint8] | None
    """(N, blocks) from 0 to 15; None where all of them are 8."""
    columns: int
    """K."""

    @property
    def storage(self) -> Storage:
        return self.codes.storage

    @property
    def has_remainders(self) -> bool:
        """Whether the product takes the sums of its input's blocks too."""
        return self.codes.columns > self.columns

    def packed_zero_points(self) -> npt.NDArray[np.uint8] | None:
        """The zero points as MatMulNBits takes them, (N, blocks / 2 rounded up), the first in the low half."""
        if self.zero_points is None:
            return None
        even = np.pad(self.zero_points, [(0, 0), (0, self.zero_points.shape[1] % 2)])
        return even[:, 0::2] | (even[:, 1::2] << np.uint8(4))

    def restored(self) -> Array:
        """The floats that codes, zero points and remainders stand for, (N, K)."""
        rows = self.codes.restored()  # (N, codes.columns)
        if self.zero_points is not None:
            moved = (8 - self.zero_points.astype(np.float32)) * self.codes.scales.astype(np.float32)  # (N, blocks)
            rows += np.repeat(moved, self.codes.block_size, axis=1)[:, : rows.shape[1]]
        weights, remainders = rows[:, : self.columns], rows[:, self.columns :]
        return (
            np.ascontiguousarray(weights + np.repeat(remainders, GRID_BLOCK, axis=1))
            if self.has_remainders
            else weights
        )


Stored = FloatStored | RowQuantized | BlockQuantized | GridQuantized


def stored_bytes(tensor_bytes: int) -> int:
    """The bytes that a tensor takes on disk: in the data file, or in the graph file where the tensor is small."""
    return tensor_bytes if tensor_bytes < INLINE_BYTES else -(-tensor_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def quantize_columns(weight: Array) -> RowQuantized:
    """Symmetric int8, each column of `weight` (K, N) scaled so that its largest magnitude is 127."""
    scales = np.abs(weight).max(axis=0) / np.float32(127)  # (N,)
    scales = np.where(scales == 0, np.float32(1), scales)
    return RowQuantized(np.rint(weight / scales).astype(np.int8), scales)


def quantize_blocks(rows: Array, bits: int, block_size: int) -> BlockQuantized:
    """Round `rows` (N, K) to the nearest codes of 4 or 8 `bits`; each block's scale gives the least squared error."""
    scales = search_scales(rows, bits, block_size)  # (N, blocks)
    codes = np.clip(np.rint(cut_blocks(rows, block_size) / scales[:, :, None]) + 2 ** (bits - 1), 0, 2**bits - 1)
    return pack_blocks(codes.astype(np.uint8), scales, bits, rows.shape[1])


def search_scales(rows: Array, bits: int, block_size: int, importance: Array | None = None) -> Array:
    """The scale of every block of `rows` (N, K), float32 (N, blocks).

    One candidate puts the value of the largest magnitude on the lowest code, -2^(bits-1), whatever the sign of the
    value; it uses all codes, and the scale may be negative. Another puts that value on the highest code. Each of the
    two is also shrunk by up to 40%, which clips that value and resolves the rest of the block better. With 8 bits the
    search gains nothing, so the first candidate is taken.

    `importance` (K,) is the weight of an error in each column; None means equal weights.
    """
    cut = cut_blocks(rows, block_size)  # (N, blocks, block_size)
    largest = np.take_along_axis(cut, np.abs(cut).argmax(axis=2, keepdims=True), axis=2)  # (N, blocks, 1)
    middle = 2 ** (bits - 1)
    low: Array = largest / np.float32(-middle)
    low = np.where(low == 0, np.float32(1), low)
    if bits == 8:
        return low[:, :, 0]
    weights = np.ones(rows.shape[1], np.float32) if importance is None else importance
    weights = cut_blocks(weights[None], block_size)  # (1, blocks, block_size)
    best, least = low, np.full(low.shape, np.inf, np.float32)
    for end in (low, low * np.float32(-middle / (middle - 1))):
        for clip in np.linspace(1, _SMALLEST_CLIP, _CLIPS + 1, dtype=np.float32):
            scales = end * clip
            codes = np.clip(np.rint(cut / scales), -middle, middle - 1)
            error = (np.square(codes * scales - cut) * weights).sum(axis=2, keepdims=True)  # (N, blocks, 1)
            better = error < least
            best, least = np.where(better, scales, best), np.where(better, error, least)
    return best[:, :, 0]


def cut_blocks(rows: npt.NDArray[np.floating], block_size: int) -> Array:
    """`rows` (N, K) as (N, blocks, block_size); zeros fill the last block."""
    padded = np.pad(np.ascontiguousarray(rows, np.float32), [(0, 0), (0, -rows.shape[1] % block_size)])
    return padded.reshape(len(rows), -1, block_size)


def pack_blocks(
    codes: npt.NDArray[np.uint8], scales: npt.NDArray[np.floating], bits: int, columns: int
) -> BlockQuantized:
    """Pack codes (N, blocks, block_size) from 0 to 2^bits - 1 for the operators; `columns` is K without padding."""
    packed = codes[:, :, 0::2] | (codes[:, :, 1::2] << np.uint8(4)) if bits == 4 else codes
    return BlockQuantized(packed, scales, bits, codes.shape[2], columns)


def block_size_for(k: int, limit: int) -> int:
    """The largest block size up to `limit` that divides `k`; where no size does, at most 32, with padding."""
    return next((size for size in BLOCK_SIZES if size <= limit and k % size == 0), min(32, limit))


def relative_error(stored: npt.NDArray[np.floating], source: Array) -> float:
    """Root mean square of `stored` - `source`, divided by that of `source`; 0 where `source` is all zeros."""
    power = float(np.mean(np.square(source, dtype=np.float64)))
    return float(np.sqrt(np.mean(np.square(stored - source, dtype=np.float64)) / power)) if power else 0.0
