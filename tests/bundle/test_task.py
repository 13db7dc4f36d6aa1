"""A task is data: read strictly, with every size bounded, and never run."""

import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.bundle.folder import Bundle
from edgelm.bundle.manifest import MAX_TASK_BYTES
from edgelm.bundle.strict_json import StrictJsonError
from edgelm.bundle.task import (
    MAX_CHOICES,
    MAX_FIELDS,
    MAX_TEMPLATE_CHARACTERS,
    ChooseTask,
    EmbedTask,
    GenerateTask,
    Measured,
    TaskConstraint,
    TaskFile,
    fields_of,
    parse_task,
    read_task,
    read_task_file,
)
from edgelm.bundle.template import Template
from edgelm.errors import BundleError, ConfigError
from tests.conftest import edit_manifest, give_task, replace_file

CHOOSE: dict[str, Any] = {
    "kind": "choose",
    "template": "{sentence} It was",
    "choices": {"negative": " bad.", "positive": " good."},
}
GENERATE: dict[str, Any] = {"kind": "generate", "template": "{text} ="}


def parsed(content: dict[str, Any], **changes: Any) -> Any:
    return parse_task(json.dumps({**content, **changes}).encode())


def test_a_task_is_read_as_it_was_written() -> None:
    score = {"metric": "accuracy", "value": 0.5, "data": "SST-2, dev", "count": 872, "float_value": 0.51}
    assert parsed(CHOOSE, length_normalization="token", calibrate="x", measured=[score]) == ChooseTask(
        "choose",
        "{sentence} It was",
        {"negative": " bad.", "positive": " good."},
        "token",
        "x",
        None,
        (Measured("accuracy", 0.5, "SST-2, dev", 872, 0.51),),
    )
    assert list(parsed(CHOOSE).choices) == ["negative", "positive"]  # the order of the file
    assert parsed(GENERATE, generation={"max_new_tokens": 5}, constraint={"regex": "a+"}) == GenerateTask(
        "generate", "{text} =", {"max_new_tokens": 5}, TaskConstraint(regex="a+")
    )
    assert fields_of(parsed({"kind": "chat", "system": "{not} a template"})) == ("message",)
    pair = parsed({"kind": "embed", "template": "{a}", "second_template": "{b} {a}"})
    assert pair == EmbedTask("embed", "{a}", "{b} {a}") and fields_of(pair) == ("a", "b")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**CHOOSE, "code": "import os"}, "unknown field 'code'"),
        ({**CHOOSE, "generation": {}}, "unknown field 'generation'"),  # of another kind
        ({**GENERATE, "choices": {}}, "unknown field 'choices'"),
        ({**GENERATE, "kind": "eval"}, "kind must be one of 'choose', 'generate', 'chat', 'embed', got 'eval'"),
        ({**GENERATE, "kind": ["chat"]}, "kind must be one of"),
        ({"template": "{text}"}, "kind must be one of .* got None"),
        ({"kind": "choose", "template": "{a}"}, "lacks the field 'choices'"),
        ({"kind": "generate"}, "lacks the field 'template'"),
        ({**GENERATE, "template": ""}, "template is shorter than 1"),
        ({**GENERATE, "template": "{a}" + "x" * MAX_TEMPLATE_CHARACTERS}, "template is longer than 65536"),
        ({**GENERATE, "template": 7}, "template must be a text"),
        ({**GENERATE, "template": "no field"}, "names no field"),
        ({**GENERATE, "template": "{{text}}"}, "names no field"),
        ({**GENERATE, "template": "{text"}, "template cannot be read: .*brace"),
        ({**GENERATE, "template": "text}"}, "template cannot be read: .*brace"),
        ({**GENERATE, "template": "{}"}, "names in its braces"),
        ({**GENERATE, "template": "{text!r}"}, "names in its braces"),
        ({**GENERATE, "template": "{text:>9}"}, "names in its braces"),
        ({**GENERATE, "template": "{text:}"}, "more than a name in a pair of braces"),
        ({**GENERATE, "template": "{text.__class__}"}, "'text.__class__' in braces"),
        ({**GENERATE, "template": "{text[0]}"}, "in braces: a field is a word"),
        ({**GENERATE, "template": "{0}"}, "in braces: a field is a word"),
        ({**GENERATE, "template": "{naïve}"}, "in braces: a field is a word"),
        ({**GENERATE, "template": "{" + "a" * 65 + "}"}, "in braces: a field is a word"),
        ({**GENERATE, "template": "".join(f"{{f{i}}}" for i in range(MAX_FIELDS + 1))}, "names 33 fields"),
        ({**CHOOSE, "choices": {}}, "choices must be 2 to 1,024 labels"),
        ({**CHOOSE, "choices": {"a": " a"}}, "choices must be 2 to 1,024 labels"),
        ({**CHOOSE, "choices": {f"l{i}": f" {i}" for i in range(MAX_CHOICES + 1)}}, "labels with their texts, got"),
        ({**CHOOSE, "choices": {"a": " x", "b": " x"}}, "'a' and 'b' the same text"),
        ({**CHOOSE, "choices": {"a": "", "b": " x"}}, "choices.a is shorter than 1"),
        ({**CHOOSE, "choices": {"": " a", "b": " x"}}, "the label ''"),
        ({**CHOOSE, "choices": {" a": " a", "b": " x"}}, "the label ' a'"),
        ({**CHOOSE, "choices": {"a\nb": " a", "b": " x"}}, "the label 'a"),
        ({**CHOOSE, "choices": {"\x1b[31m": " a", "b": " x"}}, "the label '"),
        ({**CHOOSE, "choices": [" a", " b"]}, "choices must be an object"),
        ({**CHOOSE, "length_normalization": "word"}, "length_normalization must be one of"),
        ({**CHOOSE, "measured": [{"metric": "accuracy"}]}, r"lacks the field 'measured\[0\].value'"),
        ({**CHOOSE, "measured": [{"metric": "a", "value": 1, "data": "d", "count": 0}]}, "count must be between"),
        ({**GENERATE, "constraint": {}}, "constraint must have one of"),
        ({**GENERATE, "constraint": {"regex": "a", "choices": ["b"]}}, "constraint must have one of"),
        ({**GENERATE, "generation": [1]}, "generation must be an object"),
        ({"kind": "chat", "plain": "xml"}, "plain must be one of"),
        ({"kind": "chat", "template": "{text}"}, "unknown field 'template'"),
        ({**GENERATE, "description": "\ud800"}, "lone surrogate"),
        ({**CHOOSE, "choices": {"\udc00": " a", "b": " x"}}, "lone surrogate"),
        ({**GENERATE, "generation": {"stop_strings": ["\ud800"]}}, "lone surrogate"),
    ],
)
def test_what_is_no_task_is_refused_by_name(content: dict[str, Any], message: str) -> None:
    with pytest.raises(StrictJsonError, match=message) as caught:
        parse_task(json.dumps(content).encode())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "must be an object"),
        (b"{", "not valid JSON"),
        (b"\xff", "not UTF-8"),
        (b'{"kind": "chat", "kind": "embed"}', "'kind' twice"),
        (b'{"kind": "choose", "template": "{a}", "choices": {"a": "b", "a": "c"}}', "'a' twice"),
        (b'{"kind": "generate", "template": "{a}", "generation": {"temperature": NaN}}', "NaN"),
        (b'{"kind": "generate", "template": "{a}", "generation": {"x": ' + b"[" * 10**5, "nested too deeply|not valid"),
    ],
)
def test_what_is_no_json_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(StrictJsonError, match=message):
        parse_task(content)


def test_the_limits_themselves_are_allowed() -> None:
    assert parsed(GENERATE, template="{a}" + "x" * (MAX_TEMPLATE_CHARACTERS - 3))
    assert len(parsed(CHOOSE, choices={f"l{i}": f" {i}" for i in range(MAX_CHOICES)}).choices) == MAX_CHOICES
    assert len(fields_of(parsed(GENERATE, template="".join(f"{{f{i}}}" for i in range(MAX_FIELDS))))) == MAX_FIELDS
    assert parsed(CHOOSE, template="{{{a}}} ☕ {{", choices={"ja 🙂": " да", "nein": "\n"})


def test_bundles_have_the_file_and_the_feature_or_neither(tiny_copy: Path) -> None:
    assert read_task(Bundle.read(tiny_copy)) is None
    give_task(tiny_copy, CHOOSE)
    assert read_task(Bundle.read(tiny_copy)) == parsed(CHOOSE)
    edit_manifest(tiny_copy, lambda m: m.update(required_features=[]))
    with pytest.raises(BundleError, match=r"the feature 'task' without 'task.json', or the file alone"):
        Bundle.read(tiny_copy)


def test_a_damaged_task_is_an_error_of_the_bundle(tiny_copy: Path) -> None:
    give_task(tiny_copy, {**CHOOSE, "code": ""})
    with pytest.raises(BundleError, match=r"task.json has the unknown field 'code'"):
        read_task(Bundle.read(tiny_copy))
    replace_file(tiny_copy, "task.json", b" " * (MAX_TASK_BYTES + 1))
    with pytest.raises(BundleError, match=r"task.json has 1,048,577 bytes"):
        read_task(Bundle.read(tiny_copy))


def test_a_task_in_a_file_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "task.json"
    file.write_text(json.dumps(GENERATE), encoding="utf-8")
    assert read_task_file(file) == TaskFile(parsed(GENERATE), file.read_bytes())
    for path, message in [
        (tmp_path / "none.json", "cannot read the task .*none.json': No such file"),
        (tmp_path, "[Ii]s a directory|a folder|denied"),
        (tmp_path / "\0", "null byte|NUL|null character"),
    ]:
        with pytest.raises(ConfigError, match=message):
            read_task_file(path)


texts = st.text(st.characters(codec="utf-8"), max_size=30)


@given(parts=st.lists(texts, min_size=2, max_size=5), values=st.lists(texts, min_size=5, max_size=5))
def test_filling_in_is_plain_substitution(parts: list[str], values: list[str]) -> None:
    """Whatever braces the texts and the values have."""
    names = [*string.ascii_lowercase[: len(parts) - 1]]
    escaped = [part.replace("{", "{{").replace("}", "}}") for part in parts]
    written = escaped[0] + "".join(f"{{{name}}}{part}" for name, part in zip(names, escaped[1:], strict=True))
    task = parsed(GENERATE, template=written)
    assert fields_of(task) == tuple(names)
    expected = parts[0] + "".join(value + part for value, part in zip(values, parts[1:], strict=False))
    assert Template.read(task.template).fill(dict(zip(names, values, strict=False))) == expected


@given(st.text(max_size=60))
def test_any_text_is_a_template_or_refused(text: str) -> None:
    try:
        task = parsed(GENERATE, template=text)
    except StrictJsonError:
        return
    assert all(name.isidentifier() and name.isascii() for name in fields_of(task))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
fields = st.sampled_from(["template", "choices", "generation", "constraint", "measured", "system", "plain", "pooling"])


@given(st.sampled_from(["choose", "generate", "chat", "embed"]), st.dictionaries(fields, json_values, max_size=4))
def test_any_json_is_a_task_or_refused_in_one_line(kind: str, content: dict[str, Any]) -> None:
    try:
        parsed({"kind": kind, "template": "{a}"} if kind != "chat" else {"kind": kind}, **content)
    except StrictJsonError as error:
        assert "\n" not in str(error) and len(str(error)) < 400
