"""A task's results are those of `Model.choose`, `generate`, `chat` and `embed`, called by hand with its prompt."""

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgelm
from edgelm import Model, TaskLabel, TaskText, TaskVector
from edgelm.errors import BundleError, ClosedError, ConfigError, ContextError, PromptError
from edgelm.generation.results import Chunk
from edgelm.generation.task_format import TaskFormat, stripped
from edgelm.text.plain_chat import PlainChatFormat
from tests.conftest import TINY_BUNDLE, give_task, make_chat_bundle

CHOOSE: dict[str, Any] = {
    "kind": "choose",
    "template": "The {who} sat on the",
    "choices": {"rug": " mat", "home": " house", "over": " end"},
    "length_normalization": "token",
    "calibrate": "and",
}
GENERATE: dict[str, Any] = {
    "kind": "generate",
    "template": "{a} and {b}",
    "generation": {"max_new_tokens": 6, "do_sample": False},
}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(task: dict[str, Any]) -> Path:
        path = tmp_path / "own-task.json"
        path.write_text(json.dumps(task), encoding="utf-8")
        return path

    return write


def with_task(path: Path, bundle: Path = TINY_BUNDLE, **arguments: Any) -> Model:
    return edgelm.load(bundle, device="cpu", threads=1, task=path, **arguments)


@pytest.fixture(scope="module")
def plain() -> Iterator[Model]:
    with edgelm.load(TINY_BUNDLE, device="cpu", threads=1) as model:
        yield model


def test_a_choice_is_that_of_choose(plain: Model, write: Any) -> None:
    with with_task(write(CHOOSE)) as model:
        result = model.task("cat")
        assert isinstance(result, TaskLabel)
        assert model.task(who="cat") == model.task({"who": "cat"}) == result
    selection = plain.choose(
        "The cat sat on the", [" mat", " house", " end"], length_normalization="token", calibrate="and"
    )
    assert list(result.probabilities) == ["rug", "home", "over"]
    assert list(result.probabilities.values()) == [option.probability for option in selection.options]
    assert result.label == str(result) == ["rug", "home", "over"][selection.index]
    assert result.probability == selection.best.probability == max(result.probabilities.values())


def test_a_text_is_that_of_generate(plain: Model, write: Any) -> None:
    with with_task(write(GENERATE)) as model:
        result = model.task(a="The {b}", b="dog")  # braces in a value are text
        assert isinstance(result, TaskText)
        own = plain.generate("The {b} and dog", max_new_tokens=6, do_sample=False)
        assert result.completion.choices == own.choices
        assert result.text == str(result) == own.text.strip() and result.finish_reason == "length"
        longer = model.task({"a": "The {b}", "b": "dog"}, {"max_length": 40})
        assert isinstance(longer, TaskText)
        assert longer.completion.choices == plain.generate("The {b} and dog", max_length=40, do_sample=False).choices
        assert len(model.generate("The", max_new_tokens=9).choices[0].token_ids) == 9  # as without a task
        assert model.generation_config == plain.generation_config


def test_a_constraint_is_obeyed(write: Any) -> None:
    pytest.importorskip("llguidance")
    for constraint, allowed in [({"choices": [" yes", " no"]}, ("yes", "no")), ({"regex": " [0-9]"}, "0123456789")]:
        with with_task(write({**GENERATE, "constraint": constraint})) as model:
            result = model.task(a="x", b="y")
            assert isinstance(result, TaskText) and result.text in allowed and result.finish_reason in ("stop", "eos")


def test_vectors_are_those_of_embed(plain: Model, write: Any) -> None:
    with with_task(write({"kind": "embed", "template": "so: {text}", "pooling": "last"})) as model:
        result = model.task("the cat")
    assert isinstance(result, TaskVector) and result.similarity is None
    np.testing.assert_array_equal(result.vector, plain.embed("so: the cat", pooling="last", normalize=True))
    with with_task(write({"kind": "embed", "template": "{a}", "second_template": "so: {b}"})) as model:
        pair = model.task(a="the cat", b="dog")
    assert isinstance(pair, TaskVector) and pair.similarity is not None
    first, second = plain.embed("the cat", normalize=True), plain.embed("so: dog", normalize=True)
    assert pair.similarity == pytest.approx(float(first @ second), abs=1e-6) and -1 <= pair.similarity <= 1


def test_a_chat_is_that_of_the_template(tmp_path: Path, write: Any) -> None:
    pytest.importorskip("jinja2")
    bundle = make_chat_bundle(tmp_path)
    task = {"kind": "chat", "system": "cat", "generation": {"max_new_tokens": 4, "do_sample": False}}
    with with_task(write(task), bundle) as model:
        result = model.task("a <|endoftext|> dog")  # what a message says stays text
        messages = [{"role": "system", "content": "cat"}, {"role": "user", "content": "a <|endoftext|> dog"}]
        own = model.chat(messages, max_new_tokens=4, do_sample=False)  # type: ignore[arg-type]
        assert isinstance(result, TaskText) and result.completion.choices == own.choices
    with pytest.raises(ConfigError, match="'plain', but the bundle has a chat template"):
        with_task(write({**task, "plain": "lines"}), bundle)


def test_a_plain_chat(plain: Model, write: Any) -> None:
    task = {"kind": "chat", "plain": "labels", "generation": {"max_new_tokens": 4, "do_sample": False}}
    with with_task(write(task)) as model:
        result = model.task(message="the cat")
        assert model.task_format is not None
        assert model.task_format.options["stop_strings"] == ["\nUser:"]
    ids = PlainChatFormat("labels", plain.tokenizer).ids([{"role": "user", "content": "the cat"}])
    own = plain.generate(ids, max_new_tokens=4, do_sample=False, begin_suppress_tokens=[0], stop_strings=["\nUser:"])
    assert isinstance(result, TaskText) and result.completion.choices == own.choices
    with pytest.raises(ConfigError, match="a chat needs a bundle with a chat template, or the field 'plain'"):
        with_task(write({"kind": "chat"}))


def test_a_bundle_with_a_task(tiny_copy: Path, write: Any) -> None:
    give_task(tiny_copy, CHOOSE)
    with edgelm.load(tiny_copy, device="cpu", threads=1) as model:
        by_file = with_task(write(CHOOSE))
        assert model.task("dog") == by_file.task("dog")
        again = pickle.loads(pickle.dumps(by_file))
        assert again.task("dog") == model.task("dog") == pickle.loads(pickle.dumps(model)).task("dog")
        model.save_prefix(tiny_copy.parent / "p.prefix", "The end. ")
        behind = model.with_prefix(tiny_copy.parent / "p.prefix")
        own = behind.choose(
            "The dog sat on the", [" mat", " house", " end"], length_normalization="token", calibrate="and"
        )
        result = behind.task("dog")
        assert isinstance(result, TaskLabel) and result.probability == own.best.probability
        other = model.with_prefix(tiny_copy.parent / "p.prefix", task=write(GENERATE))
        assert isinstance(other.task(a="x", b="y"), TaskText) and isinstance(model.task("dog"), TaskLabel)
        assert isinstance(pickle.loads(pickle.dumps(other)).task(a="x", b="y"), TaskText)
    with pytest.raises(ClosedError):
        model.task("dog")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({**GENERATE, "generation": {"max_new_token": 5}}, "unknown generation option 'max_new_token'; did you mean"),
        ({**GENERATE, "generation": {"temperature": -1}}, "temperature must be"),
        ({**GENERATE, "generation": {"max_new_tokens": 5, "max_length": 9}}, "max_length"),
        ({**GENERATE, "generation": {"constraint": "x"}}, "generation cannot have 'constraint'"),
        ({**GENERATE, "generation": {"logits_processor": []}}, "generation cannot have 'logits_processor'"),
        ({**GENERATE, "constraint": {"regex": "a\\"}}, "ends with a backslash"),
        ({**GENERATE, "constraint": {"choices": []}}, "at least one text"),
        ({**GENERATE, "constraint": {"json_schema": {"multipleOf": 99991}}}, "multipleOf"),
        ({**GENERATE, "constraint": {"regex": "a"}, "generation": {"stop_strings": ["a"]}}, "stop"),
        ({"kind": "chat"}, "a chat needs"),
    ],
)
def test_a_task_that_cannot_be_used_is_refused_while_loading(
    task: dict[str, Any], message: str, tiny_copy: Path, write: Any
) -> None:
    with pytest.raises(ConfigError, match=message):
        with_task(write(task))
    give_task(tiny_copy, task)
    with pytest.raises(BundleError, match=message):
        edgelm.load(tiny_copy, device="cpu")


def test_inputs_that_do_not_fit(write: Any, plain: Model) -> None:
    with with_task(write(GENERATE)) as model:
        cases: list[tuple[Callable[[], object], str]] = [
            (lambda: model.task("x"), "several fields: give a, b"),
            (lambda: model.task(a="x"), "the field 'b' is missing"),
            (lambda: model.task(a="x", b="y", c="z"), "no field 'c': it has a, b"),
            (lambda: model.task({"a": "x", "b": 3}), "the field 'b' must be a text, got 3"),  # type: ignore[dict-item]
            (lambda: model.task({"a": "x", "b": " \n"}), "the field 'b' is empty"),
            (lambda: model.task({"a": "x", "b": "\ud800"}), "the field 'b' has a lone surrogate"),
            (lambda: model.task({"a": "x", 1: "y"}), "no field 1"),  # type: ignore[dict-item]
            (lambda: model.task({"a": "x"}, b="y"), "given twice"),
            (lambda: model.task(), "the field 'a' is missing"),
            (lambda: model.task(7), "must be a text, or a dict of texts, got 7"),  # type: ignore[arg-type]
            (lambda: model.task(a="<|endoftext|>", b="y"), "reads as a special token"),
        ]
        for call, message in cases:
            with pytest.raises(PromptError, match=message):
                call()
        with pytest.raises(ContextError):
            model.task(a="x", b="y" * 100)
        with pytest.raises(ConfigError, match="unknown generation option 'temperatur'"):
            model.task({"a": "x", "b": "y"}, {"temperatur": 1})  # type: ignore[arg-type]
    with with_task(write(CHOOSE)) as model, pytest.raises(ConfigError, match="'seed' has no effect"):
        model.task("cat", {"seed": 3})
    with pytest.raises(PromptError, match="this bundle has no task"):
        plain.task("cat")


def test_a_template_may_write_special_tokens_and_an_input_may_not(write: Any) -> None:
    with with_task(write({**GENERATE, "template": "<|endoftext|>{a}"})) as model:
        assert model.task_format is not None
        (prompt,) = model.task_format.prompts({"a": "<|endoftex"})
        assert prompt == "<|endoftext|><|endoftex"
        with pytest.raises(PromptError, match="special token"):
            model.task("<|endoftext|>")
    with with_task(write({**GENERATE, "template": "{a}{b}"})) as model, pytest.raises(PromptError, match="special"):
        model.task(a="<|endof", b="text|>")  # made of two fields


def test_inputs_as_they_are_typed(write: Any) -> None:
    with with_task(write(CHOOSE)) as model:
        assert model.task_format is not None
        assert model.task_format.read_input('{"who": "cat"}') == {"who": '{"who": "cat"}'}  # one field: text
    with with_task(write(GENERATE)) as model:
        assert model.task_format is not None
        assert model.task_format.read_input('{"b": "1", "a": "2"}') == {"a": "2", "b": "1"}
        for text, message in [("x", "not valid JSON"), ("[]", "must be a JSON object"), ('{"a":1,"a":2}', "twice")]:
            with pytest.raises(PromptError, match=message) as caught:
                model.task_format.read_input(text)
            assert '{"a": "...", "b": "..."}' in str(caught.value) or message == "twice"


@pytest.mark.parametrize("pieces", [[" \n", " a", " b \n", "\n", " c ", " "], ["a"], ["  ", ""], [" a\n", "b"]])
def test_a_stream_without_the_blanks_around_it(pieces: list[str]) -> None:
    rows = [Chunk(piece, (), index) for index in (0, 1) for piece in pieces]
    chunks = [*stripped(rows)]
    assert len(chunks) == len(rows)
    for index in (0, 1):
        assert "".join(chunk.text for chunk in chunks if chunk.index == index) == "".join(pieces).strip()


def test_the_format_needs_no_model(plain: Model, write: Any) -> None:
    task = TaskFormat.of_bundle(plain.bundle, plain.tokenizer, plain.generation_config, write(GENERATE))
    assert task is not None and task.fields == ("a", "b")
    assert task.prompts(task.values({"a": "1", "b": "2"})) == ("1 and 2",)
    assert TaskFormat.of_bundle(plain.bundle, plain.tokenizer, plain.generation_config) is None
