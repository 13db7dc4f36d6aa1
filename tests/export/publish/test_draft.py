"""``edgelm export --draft``: a small model comes into the bundle of a large one, and changes no token of it."""

import re
from pathlib import Path
from typing import Any

import pytest

import edgelm
from edgelm import Bundle, BundleError, ExportError
from edgelm.bundle.packing import pack
from edgelm.serve.loading import load_place
from edgelm.serve.settings import ServeSettings
from edgelm.serve.shelf import Place
from edgelm_export.pipeline import export
from tests.conftest import RunCommand, edit_manifest, replace_file
from tests.export.checkpoints import Shape, save_checkpoint

pytestmark = [pytest.mark.export, pytest.mark.usefixtures("few_tokens")]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A bundle of one layer, and of a shorter context than the large model has."""
    source = save_checkpoint(tmp_path / "small-source", Shape(layers=1, context=24, vocab=256))
    return export(str(source), tmp_path / "small", "int8", accept_quality_loss=True).bundle.path


def test_a_bundle_with_a_model_that_drafts(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edgelm_command: RunCommand
) -> None:
    source = str(save_checkpoint(tmp_path / "source", Shape(layers=2, context=64, vocab=256)))
    plain = export(source, tmp_path / "plain", "fp32").bundle
    bundle = export(source, tmp_path / "with-draft", "fp32", draft_model=small).bundle
    assert bundle.manifest.required_features == ("draft",)
    assert bundle.draft is not None and bundle.draft.manifest.recipe == Bundle.read(small).manifest.recipe
    bundle.verify()
    told = edgelm_command("info", str(bundle.path)).stdout
    assert re.search(r"^drafts +.*small-source, int8, 0\.\d MB, guesses tokens$", told, re.MULTILINE), told
    packed = tmp_path / "packed.edgelm"
    pack(bundle, packed)
    monkeypatch.setattr("edgelm.generation.text_generation.step_cost", lambda small, large: 0.05)
    monkeypatch.setattr("edgelm.decoding.draft_model._probability", lambda logits, token: 0.95)
    with edgelm.load(plain.path, device="cpu", threads=1) as model:
        expected = model.generate([5, 6, 7], max_new_tokens=30, do_sample=False, eos_token_id=())
    for path in (bundle.path, packed):
        with edgelm.load(path, device="cpu", threads=1) as model:
            assert model.draft is not None and model.draft.bundle.manifest.architecture.context_length == 24
            with edgelm.load(plain.path, device="cpu", threads=1) as alone:
                assert model.memory.weights_bytes > alone.memory.weights_bytes
            assert model.warmup() > 0
            fast = model.generate([5, 6, 7], max_new_tokens=30, do_sample=False, eos_token_id=())
            with model.scheduler(drafts=True) as scheduler:
                options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": ()}
                texts = [scheduler.submit([5, 6, 7], **options).completion() for _ in range(2)]
        for text in [fast, *texts]:
            assert text.choices[0].token_ids == expected.choices[0].token_ids
            assert text.stats.drafted_tokens > 0
    with edgelm.load(bundle.path, device="cpu", threads=1, draft=False) as model:
        assert model.draft is None
    place = Place("served", bundle)
    needed = {drafts: place.memory_bytes(ServeSettings(drafts=drafts)) for drafts in (True, False)}
    assert needed[True] > needed[False]
    for drafts in (True, False):
        served = load_place(place, None, ServeSettings(drafts=drafts), device="cpu", threads=1)
        assert (served.model.draft is not None) is drafts
        served.close()
    assert "guesses tokens" in bundle.read_file("README.md", 2**20).decode()


def test_another_vocabulary_writes_nothing(small: Path, tmp_path: Path) -> None:
    source = str(save_checkpoint(tmp_path / "source", Shape(layers=1, context=32, vocab=20)))
    with pytest.raises(ExportError, match="has another vocabulary than the source"):
        export(source, tmp_path / "out", "fp32", draft_model=small)
    with pytest.raises(ExportError, match="cannot take the model that drafts: cannot use the bundle"):
        export(source, tmp_path / "out", "fp32", draft_model=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_what_the_manifest_says_of_it_is_checked(small: Path, tmp_path: Path) -> None:
    source = str(save_checkpoint(tmp_path / "source", Shape(layers=2, context=64, vocab=256)))
    bundle = export(source, tmp_path / "with-draft", "fp32", draft_model=small).bundle.path
    good = (bundle / "bundle.json").read_bytes()
    for edit, message in (
        (lambda m: m["required_features"].remove("draft"), "has the feature 'draft' without the entry 'draft'"),
        (lambda m: m.pop("draft"), "has the feature 'draft' without the entry 'draft'"),
        (lambda m: m["draft"]["graph"].update(file="model.onnx"), "gives two parts of the bundle one file"),
        (lambda m: m["draft"]["graph"].update(file="config.json"), "gives two parts of the bundle one file"),
        (lambda m: m["draft"]["graph"].update(weights_file="nowhere.data"), "lists no file 'nowhere.data'"),
        (lambda m: m["draft"]["graph"].update(devices=[]), "draft.graph.devices is empty"),
        (lambda m: m["draft"]["architecture"].update(num_layers=2), "is not one that edgelm writes"),
        (lambda m: m["draft"].update(source_name=5), "draft.source_name must be a text"),
    ):
        edit_manifest(bundle, edit)
        with pytest.raises(BundleError, match=message):
            Bundle.read(bundle)
        (bundle / "bundle.json").write_bytes(good)
    replace_file(bundle, "draft.onnx", (bundle / "model.onnx").read_bytes())
    with pytest.raises(BundleError, match="is not one that edgelm writes"):
        Bundle.read(bundle)
