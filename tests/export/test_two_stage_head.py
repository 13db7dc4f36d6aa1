"""A head of two stages: all logits at 4 bits, and those of the likeliest tokens from the 8-bit table."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgelm.bundle.manifest import TWO_STAGE_HEAD_FEATURE, FixedPrecision, read_manifest
from edgelm.cli.shared import storage_formats
from edgelm.engine.memory import PREPACKED_SHARE, ModelMemory
from edgelm.errors import BundleError, ExportError
from edgelm_export.pipeline import export
from edgelm_export.quantize.recipe import EXACT_LOGITS
from edgelm_export.quantize.storage import block_size_for, quantize_blocks
from tests.export.checkpoints import Shape, TinyExport, save_checkpoint

pytestmark = pytest.mark.export

ODD = Shape(width=36, heads=3)  # no block divides the width
CASES: list[tuple[FixedPrecision, Shape]] = [
    ("int8", Shape()),
    ("int8", Shape(tied=False)),
    ("w8a8", Shape()),
    ("int4", ODD),  # also of test_sameness
]


@pytest.mark.parametrize(("precision", "shape"), CASES, ids=str)
def test_the_likeliest_logits_are_computed_from_the_finer_table(
    precision: FixedPrecision, shape: Shape, tiny_export: TinyExport
) -> None:
    tiny = tiny_export(shape, precision, two_stage_head=True)
    head = tiny.torch.model.get_output_embeddings().weight.detach().numpy()  # (V, D)
    table = quantize_blocks(head, 8, block_size_for(head.shape[1], 256)).restored()
    ids = tiny.text()
    hidden = tiny.session().step_hidden(ids)[1]  # (T, D)
    logits = tiny.session().score(ids)  # (T, V)
    exact = hidden @ table.T
    assert (logits.argmax(axis=1) == exact.argmax(axis=1)).all()
    is_exact = np.isclose(logits, exact, rtol=1e-4, atol=1e-5)
    likeliest = np.argsort(-logits, axis=1)
    # A token at the edge may be among the 128 in the first stage alone.
    assert np.take_along_axis(is_exact, likeliest[:, :96], axis=1).all()
    assert is_exact.sum(axis=1).min() >= EXACT_LOGITS
    assert is_exact.mean() < 0.6


def test_a_smoothed_head_keeps_its_choices(tiny_export: TinyExport) -> None:
    """The head of one stage rounds what enters it to 8 bits, so near ties may fall the other way."""
    shape = Shape(family="llama", heads=4, kv_heads=2)
    one, two = (
        tiny_export(shape, "int8", two_stage_head=flag).session().score(np.arange(60)) for flag in (False, True)
    )
    assert (one.argmax(axis=1) == two.argmax(axis=1)).mean() > 0.9
    top = np.argsort(-two, axis=1)[:, :96]
    difference = np.take_along_axis(one - two, top, axis=1)
    assert np.abs(difference).max() < 0.1 * one.std()


def test_the_bundle_says_so(tiny_export: TinyExport) -> None:
    one, two = (tiny_export(Shape(), "int8", two_stage_head=flag).exported.bundle for flag in (False, True))
    assert two.manifest.graph.exact_logits == EXACT_LOGITS and one.manifest.graph.exact_logits is None
    assert TWO_STAGE_HEAD_FEATURE in two.manifest.required_features
    assert "exact_logits" not in one.manifest.to_json()
    assert [matrix.name for matrix in one.manifest.recipe.matrices] == [m.name for m in two.manifest.recipe.matrices]
    assert "with a head of two stages (128 logits exact)" in (two.path / "README.md").read_text(encoding="utf-8")
    assert storage_formats(two).endswith("; a head of two stages, 128 logits exact")
    facts = two.manifest.architecture
    memory, weights = ModelMemory.of(two), two.manifest.files["model.onnx.data"].size_bytes
    mapped = facts.vocab_size * facts.hidden_size  # a byte for a value
    assert memory.prepacked_bytes == pytest.approx((weights - mapped) * PREPACKED_SHARE, abs=2)


def test_scoring_looks_up_few_rows_at_once(tiny_export: TinyExport) -> None:
    shape = Shape(context=150)
    one, two = (tiny_export(shape, "int8", two_stage_head=flag) for flag in (False, True))
    assert [len(piece) for piece in two.session().score_pieces(two.text())] == [64, 64, 22]
    assert [len(piece) for piece in one.session().score_pieces(one.text())] == [150]


def test_the_feature_and_the_field_stand_together(tiny_export: TinyExport) -> None:
    manifest = tiny_export(Shape(), "int8", two_stage_head=True).exported.bundle.manifest
    for other in (
        replace(manifest, required_features=()),
        replace(manifest, graph=replace(manifest.graph, exact_logits=None)),
    ):
        with pytest.raises(BundleError, match="has the feature 'two_stage_head' without a graph's 'exact_logits'"):
            read_manifest(other.sealed().to_json().encode())


@pytest.mark.parametrize(("precision", "bits"), [("fp32", 32), ("fp16", 16), ("int4-small", 4)])
def test_other_tables_are_refused(precision: FixedPrecision, bits: int, tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "m", Shape())
    with pytest.raises(ExportError, match=f"a head of two stages needs a table of 8 bits, but {precision} has {bits}"):
        export(str(source), tmp_path / "bundle", precision, two_stage_head=True)
    assert not (tmp_path / "bundle").exists()


def test_a_small_vocabulary_is_refused(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "m", Shape(vocab=255))
    with pytest.raises(ExportError, match="a vocabulary of 255 tokens has too few others"):
        export(str(source), tmp_path / "bundle", "int8", two_stage_head=True)
