"""``edgelm export --task``: the task reaches the bundle unchanged, and a wrong one stops the export early."""

import json
from pathlib import Path

import pytest

import edgelm
from edgelm import ExportError, TaskLabel
from edgelm.bundle.manifest import MAX_TASK_BYTES
from edgelm.bundle.task import parse_task
from edgelm_export.pipeline import export
from edgelm_export.publish.card import model_card
from tests.conftest import TINY_BUNDLE, RunCommand
from tests.export.checkpoints import Shape, save_checkpoint

pytestmark = pytest.mark.export

TASK = {
    "kind": "choose",
    "description": "Which | letter.",
    "template": "{text} is",
    "choices": {"first": " a", "second": " b"},
    "measured": [{"metric": "accuracy", "value": 0.75, "data": "letters, dev", "count": 1200, "float_value": 0.76}],
}


@pytest.mark.usefixtures("few_tokens")
def test_a_bundle_with_a_task(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", Shape(layers=1, context=32, vocab=256))
    file = tmp_path / "letters.json"
    file.write_text(json.dumps(TASK, indent=7), encoding="utf-8")
    bundle = export(str(source), tmp_path / "letters", "fp32", accept_quality_loss=True, task=file).bundle
    assert bundle.manifest.required_features == ("task",)
    assert bundle.read_file("task.json", MAX_TASK_BYTES) == file.read_bytes()
    bundle.verify()
    with edgelm.load(bundle.path, device="cpu", threads=1) as model:
        result, own = model.task("x y"), model.choose("x y is", [" a", " b"])
    assert isinstance(result, TaskLabel) and result.probability == own.best.probability
    card = bundle.read_file("README.md", 2**20).decode()
    assert 'edgelm run -m letters "..."' in card and "Which \\| letter." in card
    assert "| accuracy | 0.75 | 0.76 | letters, dev | 1,200 |" in card


def test_a_task_that_the_bundle_cannot_do_writes_nothing(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", Shape(layers=1, context=32, vocab=256))
    file = tmp_path / "task.json"
    for content, message in [
        ({**TASK, "code": ""}, "unknown field 'code'"),
        ({"kind": "generate", "template": "no field"}, "names no field"),
        ({"kind": "generate", "template": "{a}", "generation": {"max_new_token": 3}}, "cannot use the task: unknown"),
        ({"kind": "chat"}, "cannot use the task: a chat needs a bundle with a chat template"),
    ]:
        file.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(ExportError, match=message):
            export(str(source), tmp_path / "out", "fp32", task=file)
    assert not (tmp_path / "out").exists()


def test_a_wrong_task_is_told_before_torch_is_loaded(edgelm_command: RunCommand, tmp_path: Path) -> None:
    (tmp_path / "task.json").write_text("{", encoding="utf-8")
    result = edgelm_command("export", "nowhere", "-o", "out", "--task", "task.json")
    assert "the task 'task.json' is not valid JSON" in result.one_line() and result.status == 2


@pytest.mark.parametrize(
    ("task", "command"),
    [
        ({"kind": "chat"}, "edgelm chat -m out"),
        ({"kind": "embed", "template": "{a}"}, 'edgelm run -m out "..."'),
        ({"kind": "generate", "template": "{a} {b}"}, 'edgelm run -m out --field a="..." --field b="..."'),
    ],
)
def test_the_card_says_how_to_call_it(task: dict[str, str], command: str) -> None:
    manifest = edgelm.Bundle.read(TINY_BUNDLE).manifest
    assert manifest.certificate is not None
    card = model_card(manifest, manifest.certificate, "out", "gpt2", "", None, parse_task(json.dumps(task).encode()))
    assert f"```sh\n{command}\n```\n" in card
