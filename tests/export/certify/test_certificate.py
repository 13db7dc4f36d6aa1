"""The certificate is measured at export and again anywhere; repaired hashes do not fool it."""

import json
import math
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from benchmarks.alterations import (
    Array,
    alter,
    low_bits_flipped,
    scaled,
    sign_flipped,
    stored_tensors,
    two_rows_swapped,
    zeroed,
)
from edgelm.bundle.folder import Bundle, default_bundle_path
from edgelm.bundle.manifest import FixedPrecision
from edgelm.bundle.reference import read_reference, rounded
from edgelm.decoding.logprobs import log_softmax
from edgelm.engine.graph import Graph
from edgelm.errors import ExportError
from edgelm.ids import IdArray, Logits
from edgelm.loading import load
from edgelm.scoring.verification import Check, checks, drift, figures, observe_session, source_perplexity
from edgelm_export.certify.certificate import _top, make_reference, measure_footprint, read_eval_text
from edgelm_export.fit import _runtime_bytes
from edgelm_export.pipeline import export
from tests.conftest import TINY_BUNDLE, RunCommand
from tests.export.checkpoints import Shape, Tiny, TinyExport, TorchModel, save_checkpoint

pytestmark = pytest.mark.export

SHAPES = [Shape(width=128, heads=2), Shape(width=48, heads=4, tied=False, context=48)]
BODY = "transformer.h.0.mlp.c_fc.weight"


@pytest.fixture(scope="module", params=get_args(FixedPrecision))
def tiny(request: pytest.FixtureRequest, tiny_export: TinyExport) -> Tiny:
    """A bundle of every recipe."""
    return tiny_export(SHAPES[0], request.param)


def measured_again(bundle: Path, threads: int = 2) -> list[Check]:
    """The result of `edgelm verify`."""
    opened = Bundle.read(bundle)
    opened.verify()
    facts, data = read_reference(opened)
    observed = observe_session(facts, data, Graph.open(opened, device="cpu", threads=threads).session())
    return checks(facts, data, figures(facts, data, observed), drift(data, observed))


def failed(bundle: Path) -> list[str]:
    """Names of the checks that fail."""
    return [check.name for check in measured_again(bundle) if not check.passed]


@pytest.mark.parametrize("precision", get_args(FixedPrecision))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_untouched_bundles_pass_bit_for_bit(
    tiny_export: TinyExport, shape: Shape, precision: FixedPrecision, threads: int
) -> None:
    for check in measured_again(tiny_export(shape, precision).exported.bundle.path, threads):
        assert check.passed, check
        if "differ" in check.name:  # 0 up to the float32 of the stored means
            assert check.measured <= 1e-6


ALTERATIONS: list[tuple[str, Callable[[Array], Array]]] = [
    (BODY, zeroed),
    (BODY, two_rows_swapped),
    (BODY, low_bits_flipped),
    ("transformer.wte.weight", zeroed),
    ("transformer.wte.weight", two_rows_swapped),
    ("transformer.wte.weight", low_bits_flipped),
    ("transformer.wpe.weight", two_rows_swapped),
]
OF_FLOATS = [(name, scaled) for name in (BODY, "transformer.wte.weight", "transformer.h.1.attn.c_proj.weight")]
OF_SCALES = [(f"{name}.scales", change) for name, _ in OF_FLOATS for change in (scaled, sign_flipped)]


@pytest.mark.parametrize(
    ("name", "change"),
    [*ALTERATIONS, *OF_FLOATS, *OF_SCALES],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_altered_weights_fail_with_hashes_fixed_up(
    tiny: Tiny, tmp_path: Path, name: str, change: Callable[[Array], Array]
) -> None:
    copy = Path(shutil.copytree(tiny.exported.bundle.path, tmp_path / "altered"))
    stored = {tensor.name: tensor for tensor in stored_tensors(copy)}
    if name.endswith(".scales") and name not in stored:
        pytest.skip("this recipe stores that matrix as floats, or its scales inside the graph")
    if change is scaled and not np.issubdtype(stored[name].dtype, np.floating):
        pytest.skip("this recipe stores that matrix as integers; its scales are scaled instead")
    alter(copy, name, change)
    assert failed(copy)


@pytest.mark.parametrize(
    ("layer", "change"),
    [
        *product([0, 3, 5], [zeroed, scaled, sign_flipped, low_bits_flipped]),
        (3, two_rows_swapped),  # in layers 0 and 5 the change is smaller than that of another CPU: docs/quality.md
    ],
)
def test_an_altered_layer_of_the_embedded_model_fails(
    tmp_path: Path, layer: int, change: Callable[[Array], Array]
) -> None:
    copy = Path(shutil.copytree(default_bundle_path(), tmp_path / "altered"))
    name = f"transformer.h.{layer}.attn.c_attn.weight"
    if change in (scaled, sign_flipped):
        alter(copy, f"{name}.scales", change)
    elif change is low_bits_flipped:  # in every matrix
        for tensor in stored_tensors(copy):
            if tensor.dtype.kind in "iu":
                alter(copy, tensor.name, change)
    else:
        alter(copy, name, change)
    assert failed(copy)


def test_the_command_says_what_failed(tiny: Tiny, tmp_path: Path, edgelm_command: RunCommand) -> None:
    copy = Path(shutil.copytree(tiny.exported.bundle.path, tmp_path / "altered"))
    alter(copy, BODY, two_rows_swapped)
    done = edgelm_command("verify", str(copy))
    assert done.status == 1
    assert "FAILED" in done.stdout and "Traceback" not in done.stderr
    assert "does not compute what its certificate says" in done.stderr.splitlines()[-1]
    assert edgelm_command("verify", str(copy), "--hashes-only").status == 0
    good = edgelm_command("verify", str(tiny.exported.bundle.path), "--threads", "1")
    assert good.status == 0 and "FAILED" not in good.stdout


def test_the_reference_holds_what_torch_computes(tiny_export: TinyExport) -> None:
    tiny = tiny_export(SHAPES[0], "fp32")
    facts, data = read_reference(tiny.exported.bundle)
    assert facts.row_tokens == tiny.shape.context and facts.tokens >= 400
    logs = np.concatenate(
        [log_softmax(tiny.torch.logits(row)) for row in np.split(data.ids, range(64, len(data.ids), 64))]
    )
    for stored in (data.source_top, data.bundle_top):
        assert np.abs(stored - np.take_along_axis(logs, data.top_ids, 1)).max() <= 0.5 / 1024 + 1e-3
    assert np.array_equal(data.top_ids[:, 0], logs.argmax(axis=1))
    assert np.abs(data.bundle_mean - logs.mean(axis=0)).max() <= 1e-3
    nats = [logs[t, data.ids[t + 1]] for t in range(len(data.ids) - 1) if (t + 1) % 64]
    assert source_perplexity(facts, data) == pytest.approx(math.exp(-np.mean(nats)), rel=1e-3)


@pytest.mark.parametrize(("drawn", "kept"), [(64, 64), (65, 64), (66, 66), (127, 127), (129, 128), (3000, 2048)])
def test_a_reference_has_no_row_of_one_token(drawn: int, kept: int) -> None:
    """A row of one token predicts nothing; the context of the tiny bundle is 64."""
    session = Graph.open(Bundle.read(TINY_BUNDLE), device="cpu", threads=1).session()

    def source(row: IdArray) -> Logits:
        session.reset()
        return session.score(row)

    ids = np.random.default_rng(0).integers(0, session.vocab_size, drawn)
    facts, data = make_reference(source, session.sibling(), np.split(ids, range(64, drawn, 64)))
    assert (facts.tokens, facts.row_tokens) == (kept, 64)
    assert np.array_equal(data.ids, ids[:kept])
    assert facts.perplexity_ratio == pytest.approx(1, abs=1e-3)


def test_top_ids_by_hand() -> None:
    logits = np.array([[1, 5, 3, 5], [0, 0, 0, 9]], np.float32)
    assert _top(logits, 3).tolist()[0] == [1, 3, 2]
    assert _top(logits, 1).tolist()[1] == [3]


def test_rounding_to_the_files_steps() -> None:
    values = np.array([0.0, -0.3, -12.34, -100.0])
    assert np.allclose(rounded(values)[:3], values[:3], atol=0.5 / 1024)
    assert rounded(values)[3] == -65_535 / 1024


def test_eval_texts_are_measured_and_shown(tmp_path: Path, few_tokens: None, edgelm_command: RunCommand) -> None:
    source = save_checkpoint(tmp_path / "m", Shape(layers=1, context=16))
    (tmp_path / "first|text.txt").write_text("Once upon a time there was a model. " * 5, encoding="utf-8")
    (tmp_path / "second.txt").write_text("你好", encoding="utf-8")
    texts = [tmp_path / "first|text.txt", tmp_path / "second.txt"]
    exported = export(str(source), tmp_path / "out", "int8", accept_quality_loss=True, eval_texts=texts)
    _, first, second = exported.certificate.texts
    assert (first.text, second.text) == ("first|text.txt", "second.txt")
    ids = [0, *b"Once upon a time there was a model. " * 5]
    assert first.tokens == len(ids) - -(-len(ids) // 16)
    model = TorchModel(source)
    rows = read_eval_text(texts[0], load(exported.bundle.path).tokenizer, 0, 16).rows
    nats = [-log_softmax(model.logits(row))[np.arange(len(row) - 1), row[1:]] for row in rows]
    assert first.source_perplexity == pytest.approx(math.exp(np.concatenate(nats).mean()), rel=1e-3)
    shown = edgelm_command("info", "out").stdout
    assert "tokens, second.txt" in shown and "tokens, drawn from the source" in shown
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "first\\|text.txt" in card
    content = json.loads(edgelm_command("info", "out", "--json").stdout)
    assert len(content["certificate"]["texts"]) == 3
    compared = edgelm_command("compare", "out", "out")
    assert compared.status == 0 and "second.txt" in compared.stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read the --eval-text"), (b"\xff", "not UTF-8 text"), (b"", "fewer than two tokens")],
)
def test_eval_texts_that_cannot_be_measured(tmp_path: Path, content: bytes | None, message: str) -> None:
    source = save_checkpoint(tmp_path / "m", Shape(layers=1, context=16))
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ExportError, match=message):
        export(str(source), tmp_path / "out", "fp32", eval_texts=[path])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["click", "numpy", "edgelm"])
def test_no_module_of_the_current_folder_is_imported(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{name}.py").write_text("open('was-run', 'w')\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert measure_footprint(TINY_BUNDLE).new_tokens > 0
    assert _runtime_bytes(TINY_BUNDLE / "tokenizer.json") > 0
    assert not (tmp_path / "was-run").exists()
