"""Rounding matrices to few bits, on numbers small enough to check by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm_export.model.decoder import Array
from edgelm_export.quantize.gptq import gptq_blocks
from edgelm_export.quantize.storage import (
    BLOCK_SIZES,
    BlockQuantized,
    block_size_for,
    quantize_blocks,
    quantize_columns,
    relative_error,
    search_scales,
)

pytestmark = pytest.mark.export


def floats(*values: float) -> Array:
    return np.array(values, np.float32)


def test_columns_by_hand() -> None:
    weight = np.array([[1.27, -2.0, 0], [-0.635, 1.0, 0], [0.01, 0.5, 0]], np.float32)
    quantized = quantize_columns(weight)
    assert quantized.values.tolist() == [[127, -127, 0], [-64, 64, 0], [1, 32, 0]]  # halves round to even
    assert quantized.scales == pytest.approx([0.01, 2 / 127, 1])
    assert quantized.values.dtype == np.int8
    assert quantized.scales.dtype == np.float32


def test_columns_never_reach_the_lowest_code() -> None:
    # -128 would overflow where a kernel negates or pairs products.
    rng = np.random.default_rng(0)
    assert quantize_columns(rng.normal(size=(64, 200)).astype(np.float32)).values.min() == -127


def test_blocks_by_hand_4_bits() -> None:
    # The largest magnitude, -8, lands on code 0 with a positive scale; 8 would be code 16, which does not exist.
    row = np.zeros((1, 16), np.float32)
    row[0, :5] = [-8, 7, 1, -1, 0.4]
    quantized = quantize_blocks(row, 4, 16)
    assert quantized.scales.tolist() == [[1.0]]
    assert quantized.packed.shape == (1, 1, 8)
    # Codes 0, 15, 9, 7, 8, 8, ...: two a byte, the first in the low half.
    assert quantized.packed[0, 0].tolist() == [0xF0, 0x79, 0x88, 0x88, 0x88, 0x88, 0x88, 0x88]


def test_scale_takes_the_sign_that_puts_the_largest_on_the_lowest_code() -> None:
    row = np.zeros((1, 16), np.float32)
    row[0, :3] = [8, -7, 1]
    quantized = quantize_blocks(row, 4, 16)
    assert quantized.scales.tolist() == [[-1.0]]
    assert quantized.packed[0, 0, :2].tolist() == [0xF0, 0x87]  # codes 0, 15, 7, 8
    assert np.array_equal(quantized.restored(), row)


def test_scale_puts_the_largest_on_the_highest_code_where_that_is_better() -> None:
    """7 and -7 are codes of one scale, 1. On the lowest code, -8, 7 would push -7 off the other end."""
    row = np.zeros((1, 16), np.float32)
    row[0, :6] = [7, -7, 3, -1, 7, -7]
    quantized = quantize_blocks(row, 4, 16)
    assert np.abs(quantized.scales) == pytest.approx(1)
    np.testing.assert_allclose(quantized.restored(), row, rtol=1e-6)


def test_blocks_of_zeros_are_exact() -> None:
    quantized = quantize_blocks(np.zeros((2, 32), np.float32), 4, 16)
    assert (quantized.packed == 0x88).all()
    assert not quantized.restored().any()


def test_blocks_by_hand_8_bits() -> None:
    row = np.zeros((1, 16), np.float32)
    row[0, :4] = [-128, 127, 1, -64]
    quantized = quantize_blocks(row, 8, 16)
    assert quantized.packed[0, 0, :5].tolist() == [0, 255, 129, 64, 128]
    assert quantized.scales.tolist() == [[1.0]]


def test_rows_are_padded_to_whole_blocks_with_zeros() -> None:
    rows = np.full((3, 20), -8, np.float32)
    quantized = quantize_blocks(rows, 4, 16)
    assert quantized.packed.shape == (3, 2, 8)
    assert quantized.packed[0, 0].tolist() == [0x00] * 8
    assert quantized.packed[0, 1].tolist() == [0x00, 0x00, *[0x88] * 6]
    assert np.array_equal(quantized.restored(), rows)


def rounded_to_nearest(rows: Array, bits: int, block: int) -> Array:
    """`rows`, with whole blocks, rounded with the scale that puts the largest magnitude on the lowest code."""
    cut = rows.reshape(len(rows), -1, block)
    largest = np.take_along_axis(cut, np.abs(cut).argmax(axis=2, keepdims=True), axis=2)
    scales = np.where(largest == 0, 1, largest / -(2 ** (bits - 1)))
    codes = np.clip(np.rint(cut / scales), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (codes * scales).reshape(rows.shape).astype(np.float32)


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from([4, 8]),
    block=st.sampled_from([16, 32, 128]),
    n=st.integers(1, 5),
    blocks=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_searched_scales_are_never_worse_than_the_largest_magnitudes(
    bits: int, block: int, n: int, blocks: int, seed: int
) -> None:
    normal = np.random.default_rng(seed).normal(size=(n, blocks * block))
    rows = (normal * 10.0 ** (seed % 7 - 3)).astype(np.float32)
    found = relative_error(quantize_blocks(rows, bits, block).restored(), rows)
    assert found <= relative_error(rounded_to_nearest(rows, bits, block), rows) * 1.0001


def test_important_columns_decide_the_scale() -> None:
    # One large value and fifteen small ones that a scale for the large one would round to zero.
    rows = np.full((1, 16), 0.45, np.float32)
    rows[0, 0] = -8
    importance = np.ones(16, np.float32)
    importance[0] = 1e-6
    assert abs(search_scales(rows, 4, 16, importance)[0, 0]) < abs(search_scales(rows, 4, 16)[0, 0])


def correlated_inputs(k: int, tokens: int = 400, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(tokens, k // 4)) @ rng.normal(size=(k // 4, k))).astype(np.float32) + rng.normal(
        size=(tokens, k), scale=0.1
    ).astype(np.float32)


def output_error(stored: BlockQuantized, rows: Array, x: Array) -> float:
    return relative_error(x @ stored.restored().T, x @ rows.T)


@pytest.mark.parametrize(("k", "block"), [(128, 128), (96, 32), (72, 16), (300, 32)])
def test_gptq_disturbs_outputs_less_than_rounding_to_nearest(k: int, block: int) -> None:
    rows, x = np.random.default_rng(1).normal(size=(40, k)).astype(np.float32), correlated_inputs(k)
    plain = quantize_blocks(rows, 4, block)
    clever = gptq_blocks(rows, x.T @ x, 4, block)
    assert clever.packed.shape == plain.packed.shape
    assert output_error(clever, rows, x) < 0.7 * output_error(plain, rows, x)
    other = correlated_inputs(k, seed=0)[::-1] + 0.01  # different text of the same kind
    assert output_error(clever, rows, other) < 0.8 * output_error(plain, rows, other)


def test_gptq_of_unrelated_inputs_is_rounding_to_nearest() -> None:
    rows = np.random.default_rng(2).normal(size=(5, 64)).astype(np.float32)
    found, plain = gptq_blocks(rows, np.eye(64, dtype=np.float32), 4, 32), quantize_blocks(rows, 4, 32)
    assert np.array_equal(found.packed, plain.packed)
    assert np.allclose(found.scales, plain.scales)


def test_gptq_rounds_the_column_with_the_largest_diagonal_first() -> None:
    """Nothing has been rounded before it, so it is rounded to nearest; the last column makes up for all others."""
    rows, x = np.random.default_rng(3).normal(size=(40, 64)).astype(np.float32), correlated_inputs(64)
    diagonal = (x.T @ x).diagonal()
    first, last = int(diagonal.argmax()), int(diagonal.argmin())
    found = gptq_blocks(rows, x.T @ x, 4, 32)
    scales = np.repeat(found.scales, 32, axis=1)  # (N, K)
    nearest = np.clip(np.rint(rows / scales), -8, 7) * scales
    differs = ~np.isclose(found.restored(), nearest, rtol=1e-4).all(axis=0)  # (K,)
    assert not differs[first] and differs[last]
    assert differs.sum() > 50


def test_gptq_with_inputs_that_are_always_zero() -> None:
    rows, x = np.random.default_rng(3).normal(size=(5, 64)).astype(np.float32), correlated_inputs(64)
    x[:, 10:20] = 0
    assert np.isfinite(gptq_blocks(rows, x.T @ x, 4, 32).restored()).all()
    assert np.isfinite(gptq_blocks(rows, np.zeros((64, 64), np.float32), 4, 32).restored()).all()


@pytest.mark.parametrize(
    ("k", "size"), [(768, 256), (640, 128), (3072, 256), (1600, 64), (96, 32), (48, 16), (200, 32), (20, 32), (5, 32)]
)
def test_block_sizes(k: int, size: int) -> None:
    assert block_size_for(k, BLOCK_SIZES[0]) == size


@pytest.mark.parametrize(("k", "most", "size"), [(768, 32, 32), (768, 64, 64), (48, 32, 16), (20, 16, 16)])
def test_block_sizes_below_a_limit(k: int, most: int, size: int) -> None:
    assert block_size_for(k, most) == size


def test_relative_error_by_hand() -> None:
    assert relative_error(floats(1, 2, 2), floats(1, 2, 4)) == pytest.approx(2 / math.sqrt(21))
    assert relative_error(floats(0, 0), floats(0, 0)) == 0


def test_8_bits_take_the_first_scale_and_search_no_other() -> None:
    """The value of the largest magnitude lies on code -128, whatever its sign."""
    rows = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    largest = [max(block, key=abs) for block in rows.reshape(-1, 32).tolist()]
    assert search_scales(rows, 8, 32).ravel() == pytest.approx(np.array(largest) / -128, rel=1e-6)
