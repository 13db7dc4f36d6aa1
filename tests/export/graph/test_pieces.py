"""The parts of the build side by themselves, on numbers small enough to check by hand."""

import math
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from edgelm.bundle.manifest import FixedPrecision
from edgelm.bundle.operators import CONTRIB, LOCAL, OPSET
from edgelm.decoding.logprobs import log_softmax
from edgelm.errors import ExportError
from edgelm.scoring.comparison import Comparison, compare_logits
from edgelm_export.certify.certificate import _top
from edgelm_export.certify.judgement import Greedy, judge, quality
from edgelm_export.graph.products import row_quantized_matmul
from edgelm_export.graph.writer import GraphWriter
from edgelm_export.model.decoder import Array
from edgelm_export.publish.card import model_card
from edgelm_export.source.drawn_text import TextDrawer, _choose
from tests.export.checkpoints import Shape, TinyExport, TorchModel, save_checkpoint

pytestmark = pytest.mark.export


# The local function


@pytest.fixture(scope="module")
def row_product(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs RowQuantizedMatMul on x (B, T, K) with given values and scales."""

    def run(x: Array, values: Any, scales: Array) -> Array:
        folder = tmp_path_factory.mktemp("function")
        writer = GraphWriter(folder, "m.onnx", "m.onnx.data")
        writer.function(row_quantized_matmul())
        inputs = ["x", writer.weight("values", values), writer.weight("scales", scales)]
        writer.node("RowQuantizedMatMul", inputs, "y", domain=LOCAL)
        k, n = values.shape
        writer.save(
            "test",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "t", k])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "t", n])],
        )
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.x64quantprecision", "1")
        session = onnxruntime.InferenceSession(str(folder / "m.onnx"), options, providers=["CPUExecutionProvider"])
        found: Array = session.run(None, {"x": x})[0]
        return found

    return run


def row_product_in_numpy(x: Array, values: Any, scales: Array) -> Array:
    row_scales = np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(1e-30)) * np.float32(1 / 127)
    codes = np.clip(np.rint(x / row_scales), -128, 127).astype(np.int64)
    found: Array = ((codes @ values.astype(np.int64)).astype(np.float32) * scales * row_scales).astype(np.float32)
    return found


@pytest.mark.parametrize("shape", [(1, 1, 8, 3), (1, 5, 64, 48), (2, 3, 20, 60), (1, 33, 256, 128)], ids=str)
def test_row_product_is_what_numpy_computes(row_product: Any, shape: tuple[int, int, int, int]) -> None:
    b, t, k, n = shape
    rng = np.random.default_rng(0)
    x = rng.normal(size=(b, t, k)).astype(np.float32)
    x *= (10.0 ** rng.integers(-6, 6, (b, t, 1))).astype(np.float32)  # each row has its own scale
    values = rng.integers(-127, 128, (k, n)).astype(np.int8)
    scales = rng.uniform(0.001, 0.1, n).astype(np.float32)
    wanted = row_product_in_numpy(x, values, scales)
    # Sums of integers are exact; only the scales multiply in another order.
    assert (
        np.abs(
            row_product(x, values, scales) / np.abs(wanted).max(axis=-1, keepdims=True)
            - wanted / np.abs(wanted).max(axis=-1, keepdims=True)
        ).max()
        <= 1e-6
    )


def test_row_product_does_not_saturate(row_product: Any) -> None:
    # Pairs of u8 x s8 products that overflow 16 bits, as on x86 without VNNI unless the session forbids it.
    x, values = np.ones((1, 2, 128), np.float32), np.full((128, 32), 127, np.int8)
    assert row_product(x, values, np.ones(32, np.float32)) == pytest.approx(np.full((1, 2, 32), 128 * 127), rel=1e-6)


def test_row_of_zeros_gives_zeros(row_product: Any) -> None:
    values = np.full((16, 4), 100, np.int8)
    assert not row_product(np.zeros((1, 2, 16), np.float32), values, np.ones(4, np.float32)).any()


def test_a_row_is_alone(row_product: Any) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 7, 64)).astype(np.float32)
    values, scales = rng.integers(-127, 128, (64, 48)).astype(np.int8), np.ones(48, np.float32)
    loud = x.copy()
    loud[0, 3] *= 1e4
    keep = [0, 1, 2, 4, 5, 6]
    assert np.array_equal(row_product(loud, values, scales)[0, keep], row_product(x, values, scales)[0, keep])


# Measuring


def test_compare_logits_by_hand() -> None:
    # Source: probabilities 3/4 and 1/4, then even; bundle: even, then 1/5 and 4/5.
    source = np.log(np.array([[3.0, 1.0], [1.0, 1.0]])).astype(np.float32)
    bundle = np.log(np.array([[1.0, 1.0], [1.0, 4.0]])).astype(np.float32)
    found = compare_logits(source, bundle, np.array([0, 1]))
    assert found.tokens == 2
    assert found.source_nats == pytest.approx(-math.log(3 / 4) - math.log(1 / 2))
    assert found.bundle_nats == pytest.approx(-math.log(1 / 2) - math.log(4 / 5))
    kl_first = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    kl_second = 0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.8)
    assert found.kl_nats == pytest.approx(kl_first + kl_second)
    assert found.same_top1 == 1  # a tie goes to the first: token 0 both times, then 0 against 1
    assert found.max_abs_logit_difference == pytest.approx(math.log(4))


def test_compare_logits_far_from_zero() -> None:
    logits = np.array([[1e4, 1e4 - 1, -1e4]], np.float32)
    found = compare_logits(logits, logits, np.array([1]))
    assert found.source_nats == pytest.approx(1 + math.log(1 + math.exp(-1)))
    assert found.kl_nats == 0


def test_comparisons_add_up() -> None:
    total = Comparison(2, 1.0, 2.0, 0.5, 1, 0.25) + Comparison(3, 4.0, 5.0, 0.25, 3, 0.125)
    assert total == Comparison(5, 5.0, 7.0, 0.75, 4, 0.25)


@pytest.mark.parametrize(
    ("precision", "bundle_nats", "difference", "greedy", "passed"),
    [
        ("int8", 10 * math.log(1.0099), 9.0, (0, 5), True),
        ("int8", 10 * math.log(1.0101), 0.0, (5, 5), False),
        ("int4", 10 * math.log(1.0499), 9.0, (0, 5), True),
        ("int4", 10 * math.log(1.0501), 0.0, (5, 5), False),
        ("fp32", 0.0, 1e-3, (5, 5), True),
        ("fp32", 0.0, 1.1e-3, (5, 5), False),
        ("fp32", 0.0, 0.0, (4, 5), False),
    ],
)
def test_gates(
    precision: FixedPrecision, bundle_nats: float, difference: float, greedy: tuple[int, int], passed: bool
) -> None:
    # Ten tokens of a source with perplexity e.
    measured = Comparison(10, 10.0, 10.0 + bundle_nats, 0.0, 10, difference)
    found = quality("by hand", measured, Greedy(*greedy, None))
    assert found.source_perplexity == pytest.approx(math.e)
    assert judge(precision, found)[1] is passed


# Text drawn from the source


def test_drawn_texts(tmp_path: Path) -> None:
    model = TorchModel(save_checkpoint(tmp_path / "m", Shape(layers=1, context=16))).model
    drawer = TextDrawer(model, tmp_path / "drawer")
    texts = drawer.draw(100, 0)
    assert [len(text) for text in texts] == [16] * 7  # rounded up to whole rows
    assert all(text.dtype == np.int64 and text.min() >= 0 and text.max() < 300 for text in texts)
    assert {int(text[0]) for text in texts} == {0}  # its BOS
    assert len({text.tobytes() for text in texts}) == 7
    assert all(map(np.array_equal, drawer.draw(100, 0), texts))
    assert not all(map(np.array_equal, drawer.draw(100, 1), texts))


@pytest.mark.parametrize("bos", [None, 300, 50256, -1])
def test_drawn_texts_without_a_usable_bos_begin_anywhere(tmp_path: Path, bos: int | None) -> None:
    model = TorchModel(save_checkpoint(tmp_path / "m", Shape(layers=1, context=8))).model
    model.config.bos_token_id = bos
    assert len({int(text[0]) for text in TextDrawer(model, tmp_path / "drawer").draw(160, 0)}) > 10


def test_drawn_text_follows_the_models_probabilities(tmp_path: Path) -> None:
    model = TorchModel(save_checkpoint(tmp_path / "m", Shape(layers=1, context=4, vocab=3))).model
    with torch.no_grad():
        wanted = torch.stack([torch.softmax(model(torch.tensor([[i]])).logits[0, -1], -1) for i in range(3)]).numpy()
    texts = np.stack(TextDrawer(model, tmp_path / "drawer").draw(12_000, 0))
    for first in range(3):
        rows = texts[texts[:, 0] == first]
        found = np.bincount(rows[:, 1], minlength=3) / len(rows)
        assert np.abs(found - wanted[first]).max() <= 4 * math.sqrt(0.25 / len(rows))


def test_choosing_inverts_the_cumulative_distribution() -> None:
    """A random number chooses the first token whose cumulative probability exceeds it, in vocabularies of all sizes."""
    random = np.random.default_rng(0)
    for vocab in (1, 255, 256, 257, 1000, 50_257):
        logits = random.normal(0, 3, (5, vocab)).astype(np.float32)
        logits[1] -= 1e4  # far from zero
        logits[2, vocab // 2 :] -= 1e3  # probabilities that are 0 in float32
        weights = np.zeros((5, -(-vocab // 256), 256), np.float32)
        cumulative = np.exp(log_softmax(logits)).cumsum(axis=1)
        for uniform in (random.random(5), np.zeros(5), np.full(5, np.nextafter(1, 0))):
            chosen = _choose(logits, uniform, weights)
            assert (chosen >= 0).all() and (chosen < vocab).all()
            for row, token in enumerate(chosen):
                below = cumulative[row, token - 1] if token else 0.0
                assert below - 1e-6 <= uniform[row] <= cumulative[row, token] + 1e-6
                assert logits[row, token] > logits[row].max() - 200


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nothing_is_drawn_from_broken_logits(bad: float) -> None:
    logits = np.zeros((2, 300), np.float32)
    logits[1, 7] = bad
    with pytest.raises(ExportError, match="NaN or infinite logits"):
        _choose(logits, np.full(2, 0.5), np.zeros((2, 2, 256), np.float32))


def test_drawing_feeds_the_model_what_it_would_compute_without_a_cache(tmp_path: Path) -> None:
    model = TorchModel(save_checkpoint(tmp_path / "m", Shape(layers=2, context=16))).model
    seen: list[np.ndarray] = []

    def watched(logits: np.ndarray, *rest: np.ndarray) -> np.ndarray:
        seen.append(logits.copy())
        return _choose(logits, *rest)

    with mock.patch("edgelm_export.source.drawn_text._choose", watched):
        texts = np.stack(TextDrawer(model, tmp_path / "drawer").draw(60, 0))
    with torch.no_grad():
        whole = model(torch.from_numpy(texts)).logits[:, :-1].numpy()  # (B, T - 1, V)
    np.testing.assert_allclose(np.stack(seen, axis=1), whole, atol=1e-4)


def test_the_likeliest_tokens_are_in_order_and_equal_ones_by_id() -> None:
    logits = np.random.default_rng(0).integers(0, 9, (20, 1000)).astype(np.float32)
    for vocab in (8, 9, 100, 1000):
        part = logits[:, :vocab]
        assert (_top(part, 8) == np.argsort(-part, axis=1, kind="stable")[:, :8]).all()


# The account of matrices


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "w8a8", "int4", "int4-small"])
def test_every_matrix_is_accounted_for(tiny_export: TinyExport, precision: FixedPrecision, tied: bool) -> None:
    tiny = tiny_export(Shape(width=48, heads=4, tied=tied), precision)  # heads padded from 12 to 16
    state = tiny.torch.model.state_dict()
    wanted = {name for name, value in state.items() if value.ndim == 2} - ({"lm_head.weight"} if tied else set())
    matrices = tiny.exported.bundle.manifest.recipe.matrices
    assert sorted(matrix.name for matrix in matrices) == sorted(wanted)
    most = {"fp32": 0.0, "fp16": 3e-4, "int8": 0.02, "w8a8": 0.02, "int4": 0.15, "int4-small": 0.15}[precision]
    for matrix in matrices:
        assert matrix.relative_error <= most
        k, n = state[matrix.name].shape
        padded = {"attn.c_attn.weight": (48, 192), "attn.c_proj.weight": (64, 48)}
        assert tuple(matrix.shape) == padded.get(matrix.name.split(".", 3)[-1], (k, n))
    assert tiny.exported.bundle.manifest.source.parameters == sum(p.numel() for p in tiny.torch.model.parameters())


def test_tied_tables_are_stored_once(tiny_export: TinyExport) -> None:
    for precision, share in (("fp32", 4), ("fp16", 2), ("int8", 1.3), ("int4", 1.3)):
        tied, untied = (
            tiny_export(Shape(width=48, heads=4, tied=tied), precision).exported.bundle.size_bytes  # type: ignore[arg-type]
            for tied in (True, False)
        )
        assert untied - tied > 300 * 48 * share * 0.7


def test_graph_passes_the_checker_and_has_few_nodes(tiny_export: TinyExport) -> None:
    for precision, most in (("fp32", 14), ("int8", 10), ("w8a8", 14), ("int4", 10)):
        path = tiny_export(Shape(), precision).exported.bundle.path / "model.onnx"  # type: ignore[arg-type]
        onnx.checker.check_model(str(path))
        graph = onnx.load(str(path), load_external_data=False)
        assert len(graph.graph.node) <= 8 + most * 2
        assert {o.domain: o.version for o in graph.opset_import}[""] == OPSET
        assert {node.domain for node in graph.graph.node} <= {"", CONTRIB, LOCAL}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "w8a8", "int4", "int4-small"])
def test_hidden_states_add_no_node(tiny_export: TinyExport, precision: FixedPrecision) -> None:
    """The logits need the hidden states anyway, so a run that does not bind that output computes nothing more."""
    bundle = tiny_export(Shape(), precision).exported.bundle
    graph = onnx.load(str(bundle.path / "model.onnx"), load_external_data=False).graph
    name = bundle.manifest.graph.hidden_states
    assert [node.op_type for node in graph.node if name in node.output] == ["LayerNormalization"]
    assert any(name in node.input for node in graph.node)
    (output,) = (output for output in graph.output if output.name == name)
    element = onnx.helper.tensor_dtype_to_np_dtype(output.type.tensor_type.elem_type)
    assert element == bundle.manifest.graph.dtype


# The model card


def test_model_card(tiny_export: TinyExport) -> None:
    exported = tiny_export(Shape(), "int8").exported
    manifest = exported.bundle.manifest
    card = model_card(manifest, exported.certificate, "a-folder", "gpt2", "I am the source.")
    front = card.split("---\n")[1]
    assert "license" not in front
    assert "base_model" not in front
    assert "edgelm run -m a-folder" in card
    assert "I am the source." in card
    assert f"{exported.certificate.drawn.bundle_perplexity:.4f}" in card
    assert "```text\nsize        source  ████" in card and "edgelm verify a-folder" in card
    assert (exported.bundle.path / "README.md").read_text(encoding="utf-8").startswith("---\nlibrary_name: edgelm\n")
