"""A prefix file that carries a task: one bundle does several jobs, and a wrong task is refused with the prefix."""

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

import edgelm
from edgelm import Bundle, ConfigError, Model, PrefixError, PromptError, TaskLabel, TaskText
from edgelm.bundle.manifest import MAX_TASK_BYTES
from edgelm.bundle.task import parse_task
from edgelm.generation.prefix_task import give_task
from edgelm.reuse.kv_file import read_kv_file, write_kv_file
from edgelm.reuse.prefix import copy_prefix, read_prefix, write_learned_prefix
from tests.conftest import TINY_BUNDLE, edit_manifest
from tests.conftest import give_task as give_bundle_task
from tests.reuse.kv_files import facts_changed, header_changed, saved_again

CHOOSE: dict[str, Any] = {
    "kind": "choose",
    "template": "The {who} sat on the",
    "choices": {"rug": " mat", "home": " house"},
}
GENERATE: dict[str, Any] = {
    "kind": "generate",
    "template": "{a} and {b}",
    "generation": {"max_new_tokens": 4, "do_sample": False},
}
EMBED: dict[str, Any] = {"kind": "embed", "template": "{x}"}
BODY = "ab" * 32


def loaded(bundle: Path = TINY_BUNDLE, **options: Any) -> Model:
    return edgelm.load(bundle, device="cpu", threads=1, **options)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with three tasks, and with prefix files: two that have a task, and one that has none."""
    for name, task in (("choose", CHOOSE), ("generate", GENERATE), ("embed", EMBED)):
        (tmp_path / f"{name}.json").write_text(json.dumps(task, indent=3), encoding="utf-8")
    with loaded() as model:
        model.save_prefix(tmp_path / "choose.prefix", "The cat. ", task=tmp_path / "choose.json")
        model.save_prefix(
            tmp_path / "generate.prefix", "The dog ran. ", dtype="float16", task=tmp_path / "generate.json"
        )
        model.save_prefix(tmp_path / "plain.prefix", "The end. ")
    return tmp_path


def test_one_graph_does_the_job_of_each_prefix(files: Path) -> None:
    with loaded() as model:
        chooses, writes = model.with_prefix(files / "choose.prefix"), model.with_prefix(files / "generate.prefix")
        label, text = chooses.task("cat"), writes.task(a="x", b="y")
        assert isinstance(label, TaskLabel) and isinstance(text, TaskText)
        behind = chooses.choose("The cat sat on the", [" mat", " house"])
        assert label.probability == behind.best.probability
        assert text.completion.choices == writes.generate("x and y", max_new_tokens=4, do_sample=False).choices
        with pytest.raises(PromptError, match="this bundle has no task"):
            model.task("cat")
        for one in (chooses, writes):  # kilobytes, because the graph and its weights are the same objects
            assert one.graph is model.graph and one.prefix is not None
            assert one.memory.prefix_bytes == one.prefix.size_bytes < 20_000
            assert one.memory.weights_bytes == model.memory.weights_bytes
        again = pickle.loads(pickle.dumps(chooses))
        assert again.task("cat") == label
        again.close()


def test_which_task_counts(files: Path, tiny_copy: Path) -> None:
    bundle = give_bundle_task(tiny_copy, EMBED)

    def kind(model: Model) -> str | None:
        """Of the model, and of one that is loaded from its pickle."""
        copy = pickle.loads(pickle.dumps(model))
        kinds = [None if one.task_format is None else one.task_format.task.kind for one in (model, copy)]
        copy.close()
        assert kinds[0] == kinds[1]
        return kinds[0]

    with loaded(bundle, prefix=files / "choose.prefix") as model:
        assert kind(model) == "choose"
        assert kind(model.with_prefix(files / "generate.prefix")) == "generate"
        assert kind(model.with_prefix(files / "plain.prefix")) == "embed", "the task went with its prefix"
        assert kind(model.with_prefix(files / "generate.prefix", task=files / "choose.json")) == "choose"
    with loaded(prefix=files / "choose.prefix") as model:
        assert kind(model.with_prefix(files / "plain.prefix")) is None
    with loaded(bundle, prefix=files / "choose.prefix", task=files / "generate.json") as model:
        assert kind(model) == "generate"
        assert kind(model.with_prefix(files / "plain.prefix")) == "generate"
        assert kind(model.with_prefix(files / "choose.prefix")) == "choose"


def test_a_learned_prefix_gets_a_task_and_loses_it(files: Path, tiny_copy: Path) -> None:
    edit_manifest(tiny_copy, lambda m: m["source"].update(body_sha256=BODY))
    bundle, path = Bundle.read(tiny_copy), files / "learned.safetensors"
    content = read_prefix(files / "plain.prefix", Bundle.read(TINY_BUNDLE)).content
    write_learned_prefix(path, content, source="tiny-gpt2", body_sha256=BODY)
    before, first = path.read_bytes(), read_prefix(path, bundle)
    with loaded(tiny_copy, prefix=path) as model:
        model.save_state(files / "state", "The cat")
    give_task(path, files / "choose.json", path, bundle)
    given = read_prefix(path, bundle)
    assert given.task == parse_task((files / "choose.json").read_bytes()) and given.sha256 == first.sha256
    assert read_kv_file(path, "prefix", "learned").task == (files / "choose.json").read_bytes()
    with loaded(tiny_copy, prefix=path) as model:
        model.load_state(files / "state")  # what the prefix is for changes no key or value
        assert isinstance(model.task("cat"), TaskLabel)
    copy_prefix(path, path, None)
    assert path.read_bytes() == before


def test_a_task_is_checked_before_it_is_written(files: Path) -> None:
    (files / "wrong.json").write_text(json.dumps({**GENERATE, "generation": {"max_new_token": 5}}), encoding="utf-8")
    (files / "chat.json").write_text('{"kind": "chat"}', encoding="utf-8")
    before = (files / "plain.prefix").read_bytes()
    with loaded() as model:
        for name, words in (
            ("wrong", "did you mean"),
            ("chat", "needs a bundle with a chat template"),
            ("none", "read"),
        ):
            with pytest.raises(ConfigError, match=words):
                model.save_prefix(files / "new.prefix", "The cat", task=files / f"{name}.json")
            with pytest.raises(ConfigError, match=words):
                give_task(files / "plain.prefix", files / f"{name}.json", files / "plain.prefix", model.bundle)
    assert not (files / "new.prefix").exists() and (files / "plain.prefix").read_bytes() == before


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (b"{", "its task is not valid JSON"),
        (b"\xff", "its task is not UTF-8"),
        (b"[]", "its task must be an object"),
        (json.dumps({**CHOOSE, "code": "x"}).encode(), "its task has the unknown field 'code'"),
        (b'{"kind": "chat", "kind": "chat"}', "its task has the field 'kind' twice"),
        (json.dumps({**CHOOSE, "template": "{who}" + "x" * 2**16}).encode(), "its task template is longer"),
        (json.dumps({**CHOOSE, "template": "\ud800{who}"}).encode(), "its task has a lone surrogate"),
        (b" " * (MAX_TASK_BYTES + 1), "its task has 1,048,577 bytes, more than 1,048,576"),
        (json.dumps({**GENERATE, "generation": {"max_new_token": 5}}).encode(), "the task of the prefix"),
        (json.dumps({**GENERATE, "generation": {"logits_processor": []}}).encode(), "generation cannot have"),
        (b'{"kind": "chat"}', "the task of the prefix .*needs a bundle with a chat template"),
    ],
)
def test_a_hostile_task_is_refused_with_the_prefix(task: bytes, words: str, files: Path) -> None:
    path = files / "plain.prefix"
    file = read_kv_file(path, "prefix", "text")
    write_kv_file(path, file.metadata, file.keys_values, "float32", tuple(file.ids.tolist()), file.text, task)
    with pytest.raises(PrefixError, match=words) as refused:
        loaded(prefix=path)
    assert "\n" not in str(refused.value)
    with loaded() as model, pytest.raises(PrefixError, match=words):
        model.with_prefix(path)


def test_a_damaged_task_is_refused(files: Path) -> None:
    content, path, bundle = (files / "choose.prefix").read_bytes(), files / "damaged", Bundle.read(TINY_BUNDLE)
    other = json.dumps(EMBED).encode()
    for damaged, words in (
        (content.replace(b" mat", b" map"), "its task is damaged"),
        (facts_changed(content, task_sha256=hashlib.sha256(other).hexdigest()), "its task is damaged"),
        (facts_changed(content, task_sha256=None), "describes other tensors"),
        (facts_changed((files / "plain.prefix").read_bytes(), task_sha256="ab" * 32), "describes other tensors"),
        (saved_again(content, lambda t: t | {"task": t["task"][None]}), "describes other tensors"),
        (header_changed(content, "task", dtype="F16"), "describes other tensors"),
        (header_changed(content, "task", shape=[2**30]), "its task has 1,073,741,824 bytes"),
        (facts_changed(content, kind="state"), "it is no prefix file"),
    ):
        assert damaged != content
        path.write_bytes(damaged)
        with pytest.raises(PrefixError, match=words):
            read_prefix(path, bundle)
