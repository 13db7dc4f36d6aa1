"""Smoothing, the forward pass for calibration, and storing layer by layer."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgelm_export.model.decoder import Array, DecoderWeights, Linear, Norm
from edgelm_export.model.families import collect_weights
from edgelm_export.model.forward import DecoderForward
from edgelm_export.quantize.calibrate import SAMPLE_TOKENS, smooth, store, store_table
from edgelm_export.quantize.recipe import BLOCK4, fixed_recipe
from edgelm_export.quantize.smooth import best_factors, fold_columns, fold_norm
from edgelm_export.quantize.storage import INT8_ROW
from edgelm_export.source.drawn_text import TextDrawer
from tests.against_transformers.test_variants import FAMILY_SHAPES
from tests.export.checkpoints import Ids, Logits, Shape, TorchModel, save_checkpoint

pytestmark = pytest.mark.export

SHAPES = [
    Shape(),
    Shape(width=48, heads=4, tied=False, config={"activation_function": "gelu"}),  # heads padded from 12 to 16
    Shape(width=96, heads=6, layers=3, inner=72, config={"scale_attn_by_inverse_layer_idx": True}),
]


def log_probabilities(weights: DecoderWeights, rows: Ids) -> Logits:
    forward = DecoderForward(weights)
    x = forward.embed(rows)
    for layer in weights.layers:
        x = forward.layer(layer, x)
    found: Logits = forward.log_probabilities(forward.final(x)).numpy()
    return found


@pytest.fixture(params=SHAPES, ids=lambda shape: shape.name)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return TorchModel(save_checkpoint(tmp_path / "m", request.param)).model.requires_grad_(False)


def test_forward_computes_what_transformers_does(model: Any) -> None:
    rows = np.random.default_rng(0).integers(0, 300, (10, 64))  # more rows than one call takes
    wanted = torch.log_softmax(model(torch.from_numpy(rows)).logits, -1).numpy()
    assert np.abs(log_probabilities(collect_weights(model), rows) - wanted).max() <= 1e-4


def with_outliers(weights: DecoderWeights, factor: float = 30) -> DecoderWeights:
    """The same function with a few loud channels in every LayerNorm."""
    layers = []
    for layer in weights.layers:
        loud = np.ones(len(layer.attention_norm.weight), np.float32)
        loud[::11] = 1 / factor
        attention_norm, qkv = fold_norm(layer.attention_norm, layer.qkv, loud)
        mlp_norm, mlp_in = fold_norm(layer.mlp_norm, layer.mlp_in, loud)
        layers.append(replace(layer, attention_norm=attention_norm, qkv=qkv, mlp_norm=mlp_norm, mlp_in=mlp_in))
    return replace(weights, layers=tuple(layers))


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_smoothing_keeps_the_function_and_undoes_outliers(model: Any, precision: Any, tmp_path: Path) -> None:
    plain = collect_weights(model)
    loud, recipe = with_outliers(plain), fixed_recipe(precision, plain)
    rows = np.stack(TextDrawer(model, tmp_path / "drawer").draw(1000, 1))
    smoothed = smooth(loud, recipe, rows)
    before, after = log_probabilities(plain, rows), log_probabilities(smoothed, rows)
    assert np.abs(before - after).max() <= 1e-3
    for layer, outliers in zip(smoothed.layers, loud.layers, strict=True):
        for norm, old in (
            (layer.attention_norm, outliers.attention_norm),
            (layer.mlp_norm, outliers.mlp_norm),
        ):
            assert spread(norm.weight) < 0.5 * spread(old.weight)


def test_smoothing_divides_the_values_and_says_by_what(model: Any, tmp_path: Path) -> None:
    weights = collect_weights(model)
    rows = np.stack(TextDrawer(model, tmp_path / "drawer").draw(1000, 1))
    for old, new in zip(weights.layers, smooth(weights, fixed_recipe("int4", weights), rows).layers, strict=True):
        divisors = new.value_divisors
        assert divisors is not None and not np.allclose(divisors, 1)
        np.testing.assert_allclose(new.attention_out.weight, old.attention_out.weight * divisors[:, None], rtol=1e-5)
        assert new.qkv.bias is not None and old.qkv.bias is not None
        values = new.qkv.bias[-len(divisors) :] * divisors
        np.testing.assert_allclose(values, old.qkv.bias[-len(divisors) :], rtol=1e-4, atol=1e-6)
    fp32 = smooth(weights, fixed_recipe("fp32", weights), rows)
    assert all(layer.value_divisors is None for layer in fp32.layers)
    assert np.array_equal(log_probabilities(fp32, rows[:1]), log_probabilities(weights, rows[:1]))


def spread(values: Array) -> float:
    magnitudes = np.abs(values)
    return float(magnitudes.max() / np.median(magnitudes))


def test_values_fold_through_attention(model: Any) -> None:
    weights = collect_weights(model)
    rows = np.random.default_rng(0).integers(0, 300, (2, 32))
    layer = weights.layers[0]
    factors = np.random.default_rng(1).uniform(0.1, 10, len(layer.attention_out.weight)).astype(np.float32)
    qkv, out = fold_columns(layer.qkv, layer.attention_out, factors)
    folded = replace(weights, layers=(replace(layer, qkv=qkv, attention_out=out), *weights.layers[1:]))
    before, after = log_probabilities(weights, rows), log_probabilities(folded, rows)
    assert np.abs(before - after).max() <= 1e-3
    assert not np.array_equal(qkv.weight, layer.qkv.weight)


def test_fold_columns_by_hand_where_two_query_heads_share_a_value_head() -> None:
    """Two value heads of one number each; the first serves the rows 0 and 1 of the product, the second 2 and 3."""
    qkv = Linear("qkv", np.array([[9, 8, 6]], np.float32), np.array([1, 2, 3], np.float32))
    out = Linear("out", np.array([[1], [2], [3], [4]], np.float32), None)
    divided, multiplied = fold_columns(qkv, out, np.array([[2], [3]], np.float32), shared_by=2)
    assert divided.weight.tolist() == [[9, 4, 2]]
    assert divided.bias is not None
    assert divided.bias.tolist() == [1, 1, 1]
    assert multiplied.weight.tolist() == [[2], [4], [9], [12]]
    assert multiplied.bias is None


def test_heads_that_share_values_share_factors() -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(2 * 3 * 16, 48)).astype(np.float32)
    inputs = torch.from_numpy(rng.normal(size=(SAMPLE_TOKENS, 2 * 3 * 16)).astype(np.float32))
    inputs[:, 20] *= 100  # number 4 of the first group's second head
    factors = best_factors(weight, inputs, BLOCK4, (2, 3)).reshape(2, 3, 16)
    assert (factors == factors[:, :1]).all()
    assert factors[0, 0, 4] > 2 * np.delete(factors[0, 0], 4).max()


def test_fold_norm_by_hand() -> None:
    norm = Norm(np.array([2, 4], np.float32), np.array([1, 3], np.float32), 1e-5)
    linear = Linear("w", np.array([[1, 2], [3, 4]], np.float32), np.array([5, 6], np.float32))
    folded, other = fold_norm(norm, linear, np.array([2, 0.5], np.float32))
    assert folded.weight.tolist() == [1, 8]
    assert folded.bias is not None
    assert other.bias is not None
    assert folded.bias.tolist() == [0.5, 6]
    assert other.weight.tolist() == [[2, 4], [1.5, 2]]
    assert other.bias.tolist() == [5, 6]


@pytest.mark.parametrize("shape", FAMILY_SHAPES, ids=lambda shape: shape.name)
def test_forward_and_smoothing_keep_the_function_of_every_family(shape: Shape, tmp_path: Path) -> None:
    model = TorchModel(save_checkpoint(tmp_path / "m", shape)).model.requires_grad_(False)
    rows = np.random.default_rng(0).integers(0, shape.vocab, (3, shape.context))
    wanted = torch.log_softmax(model(torch.from_numpy(rows)).logits, -1).numpy()
    weights = collect_weights(model)
    assert np.abs(log_probabilities(weights, rows) - wanted).max() <= 1e-4
    smoothed = smooth(weights, fixed_recipe("int4", weights), rows)
    assert any(new.weight is not old.weight for new, old in zip(smoothed.products, weights.products, strict=True))
    assert np.abs(log_probabilities(smoothed, rows) - wanted).max() <= 1e-3


@pytest.mark.parametrize("storage", [INT8_ROW, BLOCK4])
def test_factors_lower_the_error_and_leave_unused_channels_alone(storage: Any) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(64, 48)).astype(np.float32)
    inputs = rng.normal(size=(SAMPLE_TOKENS, 64)).astype(np.float32)
    inputs[:, 3] *= 100
    weight[3] /= 100
    inputs[:, 7] = 0
    factors = best_factors(weight, torch.from_numpy(inputs), storage)
    assert np.isfinite(factors).all()
    assert (factors > 0).all()
    others = np.delete(factors, [3, 7])
    assert factors[3] > 3 * others.max()


def test_even_channels_are_left_alone() -> None:
    weight, inputs = np.eye(32, dtype=np.float32), torch.eye(32)
    assert best_factors(weight, inputs, INT8_ROW) == pytest.approx(np.ones(32))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "w8a8", "int4", "int4-small"])
def test_stored_matrices_stand_for_the_weights(model: Any, precision: Any, tmp_path: Path) -> None:
    weights = collect_weights(model)
    recipe = fixed_recipe(precision, weights)
    rows = np.stack(TextDrawer(model, tmp_path / "drawer").draw(500, 1)) if recipe.is_quantized else None
    stored = store(weights, recipe, rows)
    assert weights.position_table is not None
    storage = {**recipe.storage, weights.position_table.name: recipe.float_storage}
    assert set(stored.stored) == set(storage)
    for name, matrix in stored.stored.items():
        assert matrix.storage.format == storage[name].format
    judged = np.random.default_rng(0).integers(0, 300, (4, 64))
    source = log_probabilities(weights, judged)
    difference = np.abs(log_probabilities(stored.restored, judged) - source).mean()
    most = {"fp32": 0.0, "fp16": 0.005, "int8": 0.1, "w8a8": 0.1, "int4": 1.0, "int4-small": 1.5}
    assert difference <= most[precision]


@pytest.mark.parametrize("tied", [True, False])
def test_4_bits_are_rounded_for_the_logits_only_in_the_head(tied: bool, tmp_path: Path) -> None:
    model = TorchModel(save_checkpoint(tmp_path / "m", Shape(tied=tied))).model.requires_grad_(False)
    weights, rows = collect_weights(model), np.random.default_rng(0).integers(0, 300, (8, 64))
    recipe = fixed_recipe("int4-small", weights)
    stored = store(weights, recipe, rows).stored
    for table in weights.tables:
        nearest = store_table(table.weight, recipe.storage[table.name])
        is_nearest = np.array_equal(stored[table.name].restored(), nearest.restored())
        assert is_nearest == (table is not weights.output_table)
