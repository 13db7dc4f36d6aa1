"""Recipes from the raw files to the measured bundle, on a tiny base: what is made, and what is not made twice."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import edgelm
from edgelm.bundle.folder import Bundle
from edgelm.bundle.task import read_task
from edgelm.errors import TrainingError
from edgelm_export.pipeline import export
from edgelm_recipes import make as steps
from edgelm_recipes.make import make
from edgelm_recipes.order import Order
from edgelm_recipes.tasks import RECIPES
from tests.recipes.conftest import Kitchen
from tests.recipes.test_readers import FOLDERS

pytestmark = [pytest.mark.export, pytest.mark.usefixtures("few_tokens")]

for _package in ("peft", "sacrebleu", "rouge_score", "scipy"):
    pytest.importorskip(_package)

QUICK = {"epochs": 1.0, "batch_size": 8, "learning_rate": 1e-2}


def say(line: str) -> None:
    pass


@contextmanager
def watch(what: str) -> Iterator[Callable[[float], None]]:
    yield lambda share: None


def order(name: str, kitchen: Kitchen, out: Path, **more: Any) -> Order:
    return Order(RECIPES[name], kitchen.data / FOLDERS[name], out, str(kitchen.base), tuning=QUICK, threads=1, **more)


def never(*args: object, **kwargs: object) -> Any:
    raise AssertionError("this was done before")


@pytest.fixture(scope="module")
def base_bundles(kitchen: Kitchen, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The base in fp32, and quantized."""
    from unittest import mock

    from tests.export.checkpoints import FOOTPRINT

    folder = tmp_path_factory.mktemp("bases")
    with (
        mock.patch("edgelm_export.certify.certificate.measure_footprint", lambda bundle: FOOTPRINT),
        mock.patch("edgelm_export.pipeline.EVALUATION_TOKENS", 400),
        mock.patch("edgelm_export.fit.CALIBRATION_TOKENS", 400),
    ):
        export(str(kitchen.base), folder / "fp32", "fp32", accept_quality_loss=True)
        export(str(kitchen.base), folder / "int8", "int8", accept_quality_loss=True)
    return folder / "fp32", folder / "int8"


def test_from_sentences_to_a_measured_bundle(kitchen: Kitchen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    asked = order("sentiment", kitchen, out, augment=("drop",), command="edgelm recipe sentiment ...")

    def killed(*args: object, **kwargs: object) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(steps, "export", killed)
        with pytest.raises(KeyboardInterrupt):
            make(asked, say, watch)
    assert (out / "tuned" / "report.json").is_file() and not (out / "bundle").exists()
    monkeypatch.setattr(steps, "finetune", never)
    report = make(asked, say, watch).report
    assert report is not None
    task = read_task(Bundle.read(out / "bundle"))
    assert task is not None and task.measured is not None
    (accuracy,) = task.measured
    assert (accuracy.metric, accuracy.count) == ("accuracy", 6)
    assert accuracy.value == report.scores["quantized"].value("accuracy")
    assert accuracy.float_value == report.scores["float"].value("accuracy")
    with edgelm.load(out / "bundle", device="cpu") as model:
        assert str(model.task("red cat dog")) in ("positive", "negative")
    content = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert content["budget"]["tokens"] > 0 and content["speed"]["inputs"] == 6 and content["learning_curve"]
    text = (out / "report.md").read_text(encoding="utf-8")
    for part in ("| fp32 |", "| int8 |", "the more common label", "--augment drop", "edgelm recipe sentiment ..."):
        assert part in text
    assert "accuracy" in (out / "bundle" / "README.md").read_text(encoding="utf-8")

    # Another limit measures again, and makes nothing else again.
    monkeypatch.setattr(steps, "export", never)
    stamp = (out / "bundle" / "bundle.json").stat().st_mtime_ns
    monkeypatch.setattr(steps, "measure", never)
    assert make(asked, say, watch).report is not None
    assert (out / "bundle" / "bundle.json").stat().st_mtime_ns == stamp
    monkeypatch.undo()
    monkeypatch.setattr(steps, "finetune", never)
    monkeypatch.setattr(steps, "export", never)
    again = make(replace(asked, limit=4), say, watch).report
    assert again is not None and again.scores["quantized"].measured[0].count == 4
    task = read_task(Bundle.read(out / "bundle"))
    assert task is not None and task.measured is not None
    assert task.measured[0].data.endswith("development part, 4 of 6 rows")
    with pytest.raises(TrainingError, match="was started with no --rows, not --rows 30"):
        make(replace(asked, rows=30), say, watch)


def test_an_adapter_that_writes(kitchen: Kitchen, tmp_path: Path) -> None:
    asked = order("translation-en-de", kitchen, tmp_path / "out", method="lora", rows=12, limit=3)
    report = make(asked, say, watch).report
    assert report is not None and report.speed.peak_rss_bytes > 0
    assert set(json.loads((tmp_path / "out" / "task.json").read_bytes())["generation"]) == {
        "do_sample",
        "max_new_tokens",
        "stop_strings",
    }
    task = read_task(Bundle.read(tmp_path / "out" / "bundle"))
    assert task is not None and task.measured is not None
    assert [one.metric for one in task.measured] == ["BLEU", "ROUGE-L"]
    assert any("12 of 40 examples" in note for note in report.facts.notes)


def test_a_prefix_leaves_the_bundle_of_its_base(
    kitchen: Kitchen, tmp_path: Path, base_bundles: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    asked = order("summary", kitchen, out, method="prefix", rows=12, limit=3, bundles=base_bundles)
    monkeypatch.setattr(steps, "export", never)
    report = make(asked, say, watch).report
    assert report is not None and not (out / "bundle").exists()
    with edgelm.load(base_bundles[1], device="cpu", prefix=out / "prefix.safetensors") as model:  # with its task
        assert model.task_format is not None and model.task_format.task.measured is not None
    assert str(base_bundles[1]) in report.commands[1]


def test_a_chat_is_measured_by_its_perplexity(
    kitchen: Kitchen, tmp_path: Path, base_bundles: tuple[Path, Path]
) -> None:
    out = tmp_path / "out"
    report = make(order("chat", kitchen, out, bundles=base_bundles[:1], limit=2), say, watch).report
    assert report is not None
    perplexities = {name: scores.value("perplexity") for name, scores in report.scores.items()}
    assert perplexities["float"] < perplexities["baseline"]
    assert perplexities["quantized"] == pytest.approx(perplexities["float"], rel=0.1)
    with edgelm.load(out / "bundle", device="cpu") as model:
        rows = [json.loads(line) for line in (out / "data" / "dev.jsonl").read_text(encoding="utf-8").splitlines()]
        assert model.task_format is not None  # it writes what was learned
        assert model.task_format.prompts({"message": rows[0]["message"]}) == (
            model.tokenizer.encode_prompt(rows[0]["prompt"]),
        )
        assert str(model.task(rows[0]["message"]))


def test_similar_texts_get_similar_vectors(kitchen: Kitchen, tmp_path: Path, base_bundles: tuple[Path, Path]) -> None:
    out = tmp_path / "out"
    report = make(order("similarity", kitchen, out, bundles=base_bundles[:1]), say, watch).report
    assert report is not None and report.scores["baseline"].value("Spearman") <= 1
    with edgelm.load(out / "bundle", device="cpu") as model:
        result = model.task(first="red cat", second="red cat")
    assert isinstance(result, edgelm.TaskVector) and result.similarity == pytest.approx(1, abs=1e-5)
    assert "1 - Spearman" in (out / "report.md").read_text(encoding="utf-8")


def test_what_is_refused_first(kitchen: Kitchen, tmp_path: Path, base_bundles: tuple[Path, Path]) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(TrainingError, match="is not empty"):
        order("sentiment", kitchen, tmp_path / "taken").check()
    with pytest.raises(edgelm.EdgelmError, match="nowhere"):
        replace(order("sentiment", kitchen, tmp_path / "out"), base=str(tmp_path / "nowhere")).check()
    with pytest.raises(TrainingError, match="--epochs must be more than 0"):
        replace(order("sentiment", kitchen, tmp_path / "out"), tuning={"epochs": 0.0}).check()
    with pytest.raises(TrainingError, match=r"has no file 'train.tsv'"):
        replace(order("sentiment", kitchen, tmp_path / "out"), data=tmp_path).check()
    with pytest.raises(edgelm.BundleError, match="are both quantized"):
        order("sentiment", kitchen, tmp_path / "out", bundles=(base_bundles[1],) * 2).check()
    order("sentiment", kitchen, tmp_path / "out").check()
    assert not (tmp_path / "out").exists()
