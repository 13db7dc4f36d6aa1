"""Matrices that lie on a 4-bit grid already keep it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import quants

from benchmarks.quality_rows import open_session
from edgelm.bundle.manifest import FixedPrecision
from edgelm_export.model.decoder import Array
from edgelm_export.model.families import collect_weights
from edgelm_export.quantize.calibrate import smooth, store
from edgelm_export.quantize.grid import find_grid
from edgelm_export.quantize.recipe import BLOCK4, BLOCK8, StorageRecipe, fixed_recipe, uniform_storage
from edgelm_export.quantize.storage import GRID4, GridQuantized, relative_error
from tests.export.checkpoints import Shape, TorchModel, save_checkpoint

pytestmark = pytest.mark.export


def gaussian(n: int, k: int) -> Array:
    return np.random.default_rng(0).normal(0, 0.02, (n, k)).astype(np.float32)


def rounded(rows: Array, kind: Type) -> Array:
    """`rows` as a GGUF file of this type gives them back."""
    return np.ascontiguousarray(quants.dequantize(quants.quantize(rows, kind), kind).reshape(rows.shape))


def nibbles(rows: Array, kind: Type, header_bytes: int) -> Array:
    """The codes (N, K) of a GGUF file: the low halves of a block's 16 bytes come first."""
    raw = quants.quantize(rows, kind).reshape(-1, header_bytes + 16)[:, header_bytes:]
    return np.concatenate([raw & 15, raw >> 4], axis=1).reshape(rows.shape)


def unpacked(grid: GridQuantized) -> Array:
    """The codes (N, K), without remainders."""
    packed = grid.codes.packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)[:, : grid.columns]


def test_a_grid_around_zero_is_kept_to_the_last_bit() -> None:
    source = rounded(gaussian(70, 96), Type.Q4_0)
    grid = find_grid(source)
    assert grid is not None
    assert grid.zero_points is None
    assert not grid.has_remainders
    assert grid.codes.scales.dtype == np.float16
    assert np.array_equal(grid.restored(), source)
    assert np.array_equal(unpacked(grid), nibbles(gaussian(70, 96), Type.Q4_0, 2))


def test_whole_zero_points_are_kept_to_the_last_bit() -> None:
    rng = np.random.default_rng(0)
    codes, zeros = rng.integers(0, 16, (6, 3, 32)), rng.integers(0, 16, (6, 3, 1))
    zeros[zeros == 7] = 8  # 7 becomes 8 with a negative step
    codes[..., 0], codes[..., 1] = 0, 15  # so that a block shows its whole grid
    steps = rng.uniform(0.01, 0.02, (6, 3, 1)).astype(np.float16).astype(np.float32)
    source = (steps * (codes - zeros)).astype(np.float32).reshape(6, 96)
    grid = find_grid(source)
    assert grid is not None
    assert not grid.has_remainders
    assert grid.zero_points is not None
    assert np.array_equal(grid.zero_points, zeros[..., 0])
    packed = grid.packed_zero_points()
    assert packed is not None
    assert packed.tolist() == [[a | b << 4, c] for a, b, c in zeros[..., 0].tolist()]
    assert relative_error(grid.restored(), source) < 1e-6


def test_a_grid_with_offsets_keeps_its_codes() -> None:
    source = rounded(gaussian(70, 96), Type.Q4_1)
    grid = find_grid(source)
    assert grid is not None
    assert grid.has_remainders
    assert grid.codes.columns == 96 + 3
    assert np.array_equal(unpacked(grid), nibbles(gaussian(70, 96), Type.Q4_1, 4))
    assert relative_error(grid.restored(), source) < 0.005  # rounding to 4 bits again makes 0.08


def test_remainders_stand_in_the_order_of_their_blocks() -> None:
    steps, remainders = np.float32(0.5), np.array([[0.25, 0, -0.125, 0.0625]], np.float32)
    codes = np.tile(np.arange(32) % 16, (1, 4, 1))
    source = (steps * (codes - 8) + remainders[..., None]).astype(np.float32).reshape(1, 128)
    grid = find_grid(source)
    assert grid is not None and grid.zero_points is None
    added = grid.codes.restored()[:, grid.columns :]
    assert np.abs(added - remainders).max() < 0.25 / 14  # half a step of 4 bits


@pytest.mark.parametrize("away", [-100, 100])
def test_a_grid_far_from_zero_keeps_zero_points_of_4_bits(away: int) -> None:
    codes = np.tile(np.arange(32) % 16, (1, 2, 1)).astype(np.float32)
    codes[0, 1] += away  # only this block needs a zero point
    source = (0.5 * (codes - 8)).astype(np.float32).reshape(1, 64)
    grid = find_grid(source)
    assert grid is not None and grid.zero_points is not None
    assert grid.zero_points.tolist() == [[8, 0 if away > 0 else 15, 8]]  # the last one is of the block of remainders
    assert relative_error(grid.restored(), source) < 0.01


def test_steps_that_float16_does_not_hold_stay_float32() -> None:
    rng = np.random.default_rng(0)
    # As in Q4_K, a step is a product of two numbers. These are too small for float16.
    steps, lowest = rng.uniform(1e-9, 2e-9, (8, 2, 1)), rng.uniform(-2e-8, 0, (8, 2, 1))
    source = (steps * rng.integers(0, 16, (8, 2, 32)) + lowest).astype(np.float32).reshape(8, 64)
    grid = find_grid(source)
    assert grid is not None
    assert grid.codes.scales.dtype == np.float32
    assert relative_error(grid.restored(), source) < 0.005


def test_few_levels_and_blocks_of_one_value() -> None:
    source = rounded(gaussian(4, 64), Type.Q4_0)
    source[0, :32] = 0
    source[1, :32] = 0.7
    source[2, :32] = np.where(np.arange(32) % 2, 0.25, -0.5)  # three steps of 0.25
    source[3, :32] = np.where(np.arange(32) % 2, 0.25, 0.5)
    grid = find_grid(source)
    assert grid is not None
    assert np.abs(grid.restored() - source).max() < 2e-3


@pytest.mark.parametrize("kind", [Type.Q5_0, Type.Q8_0], ids=lambda kind: kind.name)
def test_finer_grids_and_floats_are_on_no_4_bit_grid(kind: Type) -> None:
    assert find_grid(rounded(gaussian(70, 96), kind)) is None
    assert find_grid(gaussian(70, 96)) is None
    assert find_grid(rounded(gaussian(70, 96), Type.Q4_0)[:, :80]) is None  # no whole number of blocks
    assert find_grid(np.ones((64, 64), np.float32)) is None


def test_one_weight_beside_the_grid() -> None:
    source = rounded(gaussian(600, 64), Type.Q4_1)
    source[577, 3] += 0.001
    assert find_grid(source) is None


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1], ids=lambda kind: kind.name)
def test_int4_of_a_model_on_a_grid_computes_what_the_model_does(kind: Type, tmp_path: Path) -> None:
    shape = Shape(family="llama", width=64, heads=4, kv_heads=2, inner=96)
    model = TorchModel(save_checkpoint(tmp_path / "m", shape)).model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight"):
            parameter.copy_(torch.from_numpy(rounded(parameter.numpy(), kind)))
    rows = np.random.default_rng(0).integers(0, 300, (4, 64))
    weights = collect_weights(model)
    recipe = fixed_recipe("int4", weights)
    both: list[FixedPrecision] = ["int4", "int4-small"]
    for each in both:
        assert {fixed_recipe(each, weights).storage[linear.name] for linear in weights.products} == {GRID4}
    assert not recipe.needs_inputs
    wanted = model(torch.from_numpy(rows[:1])).logits[0].numpy()

    def error(kept: StorageRecipe) -> float:
        folder = tmp_path / kept.name
        folder.mkdir()
        session, _ = open_session(store(smooth(weights, kept, rows), kept, rows), folder)
        return relative_error(np.concatenate(list(session.score_pieces(rows[0]))), wanted)

    again = StorageRecipe("mixed", uniform_storage(weights, BLOCK4, BLOCK8))
    assert error(recipe) < min(0.08, error(again) / 3)  # the rest is what rounding of activations to 8 bits makes
