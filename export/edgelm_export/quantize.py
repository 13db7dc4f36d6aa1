"""Weights to few bits: pure functions on arrays, with the error each one made."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

BLOCK_SIZES = (128, 64, 32, 16)
"""Sizes MatMulNBits and GatherBlockQuantized have fast kernels for, best first."""


@dataclass(frozen=True)
class RowQuantized:
    """int8 weights with a scale per output column, for the product with a scale per token (W8A8)."""

    values: npt.NDArray[np.int8]
    """(K, N)."""
    scales: Array
    """(N,)."""
    relative_error: float


@dataclass(frozen=True)
class BlockQuantized:
    """Rows cut into blocks along K, each with a scale; the layout of MatMulNBits and GatherBlockQuantized."""

    packed: npt.NDArray[np.uint8]
    """(N, blocks, block_size · bits / 8), two 4-bit values a byte, the low half first."""
    scales: Array
    """(N, blocks)."""
    bits: int
    block_size: int
    relative_error: float


def quantize_columns(weight: Array) -> RowQuantized:
    """Symmetric int8, each column of `weight` (K, N) scaled so that its largest magnitude is 127."""
    scales = np.abs(weight).max(axis=0) / np.float32(127)  # (N,)
    scales = np.where(scales == 0, np.float32(1), scales).astype(np.float32)
    values = np.rint(weight / scales).astype(np.int8)  # (K, N)
    return RowQuantized(values, scales, relative_error(values * scales, weight))


def quantize_blocks(rows: Array, bits: int, block_size: int) -> BlockQuantized:
    """Symmetric 4 or 8 bits, round to nearest.

    The value of the largest magnitude of a block lands on the lowest code, -2^(bits-1), whatever its sign: that
    uses all 2^bits codes, at the price of scales that may be negative.

    Args:
        rows: (N, K); K is padded with zeros to whole blocks.
    """
    n, k = rows.shape
    blocks = -(-k // block_size)
    padded = np.zeros((n, blocks * block_size), np.float32)
    padded[:, :k] = rows
    cut = padded.reshape(n, blocks, block_size)
    largest = np.take_along_axis(cut, np.abs(cut).argmax(axis=2, keepdims=True), axis=2)  # (N, blocks, 1)
    middle = 2 ** (bits - 1)
    scales = (largest / np.float32(-middle)).astype(np.float32)
    scales = np.where(scales == 0, np.float32(1), scales)
    codes = np.clip(np.rint(cut / scales) + middle, 0, 2**bits - 1).astype(np.uint8)  # (N, blocks, block_size)
    restored = ((codes.astype(np.float32) - middle) * scales).reshape(n, -1)[:, :k]
    packed = codes if bits == 8 else codes[:, :, 0::2] | (codes[:, :, 1::2] << 4)
    return BlockQuantized(packed, scales[:, :, 0], bits, block_size, relative_error(restored, rows))


def block_size_for(k: int) -> int:
    """The largest block that divides `k`; 32, with padding, where none does."""
    return next((size for size in BLOCK_SIZES if k % size == 0), 32)


def relative_error(stored: npt.NDArray[np.floating], source: Array) -> float:
    """Root mean square of the difference over root mean square of `source`; 0 for all zeros."""
    power = float(np.mean(np.square(source, dtype=np.float64)))
    return float(np.sqrt(np.mean(np.square(stored - source, dtype=np.float64)) / power)) if power else 0.0
