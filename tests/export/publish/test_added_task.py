"""A finished bundle gets a task by a copy: the same weights, another manifest and card."""

import json
from pathlib import Path

import pytest

import edgelm
from edgelm.bundle.folder import Bundle
from edgelm.bundle.manifest import MAX_TASK_BYTES
from edgelm.errors import ExportError
from edgelm_export.publish.added_task import copy_with_task
from edgelm_export.publish.card import quoted_card
from tests.conftest import TINY_BUNDLE

pytestmark = pytest.mark.export

TASK = {"kind": "choose", "template": "The {who} sat on the", "choices": {"rug": " mat", "home": " house"}}


def test_a_copy_with_a_task(tmp_path: Path) -> None:
    given, file = Bundle.read(TINY_BUNDLE), tmp_path / "task.json"
    file.write_text(json.dumps(TASK), encoding="utf-8")
    first = copy_with_task(given, file, tmp_path / "first")
    measured = [{"metric": "accuracy", "value": 0.75, "data": "pets", "count": 12}]
    file.write_text(json.dumps({**TASK, "measured": measured}), encoding="utf-8")
    second = copy_with_task(first, file, tmp_path / "second")  # in place of the first task
    second.verify()
    assert second.manifest.required_features == (*given.manifest.required_features, "task")
    assert second.read_file("task.json", MAX_TASK_BYTES) == file.read_bytes()
    for name in (given.manifest.graph.file, given.manifest.graph.weights_file, "tokenizer.json"):
        assert second.manifest.files[name] == given.manifest.files[name]
    assert second.manifest.certificate == given.manifest.certificate
    cards = [bundle.read_file("README.md", 2**20).decode() for bundle in (given, second)]
    assert "| accuracy | 0.75 |" in cards[1] and "edgelm run -m second" in cards[1]
    assert quoted_card(cards[0]) == quoted_card(cards[1])
    with edgelm.load(second.path, device="cpu", threads=1) as model:
        assert str(model.task("cat")) in ("rug", "home")
    file.write_text(json.dumps({"kind": "chat"}), encoding="utf-8")
    with pytest.raises(ExportError, match="cannot use the task"):
        copy_with_task(given, file, tmp_path / "third")
    file.write_text(json.dumps(TASK), encoding="utf-8")
    with pytest.raises(ExportError, match="is not empty"):
        copy_with_task(given, file, tmp_path / "first")
    assert not (tmp_path / "third").exists()
