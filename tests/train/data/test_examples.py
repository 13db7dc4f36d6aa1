"""Templates and examples against vectors made by hand; only completions have labels."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.errors import ConfigError, TrainingError
from edgelm.text.tokenizer import Tokenizer
from edgelm_export.source.tokenizer import load_tokenizer
from edgelm_train.data.examples import Example, Examples, encode_example, pad, read_examples
from edgelm_train.data.templates import Task, Template, escaped, unescaped
from tests.export.checkpoints import save_tokenizer

pytestmark = pytest.mark.export

EOS = 54


@given(st.text(st.sampled_from("ab\\\n\t nt{}")))
def test_what_is_escaped_comes_back(text: str) -> None:
    assert unescaped(escaped(text)) == text


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Each letter is a token: a is 0, b is 1."""
    folder = tmp_path_factory.mktemp("letters")
    save_tokenizer(folder, 54)
    return load_tokenizer(folder)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{source}", "Hallo"),
        (r"Translate: {source}\n{target}", "Translate: Hallo\nHello"),
        (r"a\tb\\n{source}", "a\tb\\nHallo"),
        ("{{{source}}}", "{Hallo}"),
        ("{two words}!", "2!"),
        ("nothing", "nothing"),
    ],
)
def test_templates(template: str, expected: str) -> None:
    row = {"source": "Hallo", "target": "Hello", "two words": "2"}
    assert Template.parse(template).fill(row) == expected


def test_values_are_not_read_as_templates() -> None:
    assert Template.parse("{a}").fill({"a": r"{b}\n"}) == r"{b}\n"


@pytest.mark.parametrize("template", ["{", "}", "{}", "{a!r}", "{a:>9}", "{a{b}}"])
def test_templates_that_are_refused(template: str) -> None:
    with pytest.raises(ConfigError, match="template") as caught:
        Template.parse(template)
    assert "\n" not in str(caught.value)


def test_both_templates_or_none() -> None:
    assert Task.parse(None, None).completion.columns == ("completion",)
    for prompt, completion in [("{a}", None), (None, "{a}")]:
        with pytest.raises(ConfigError, match="the other way round"):
            Task.parse(prompt, completion)
    with pytest.raises(ConfigError, match="names no column"):
        Task.parse("{a}", "yes")


def test_only_the_completion_and_its_end_are_learned(letters: Tokenizer) -> None:
    example = encode_example(letters, "abc", "de", EOS)
    assert example == Example((0, 1, 2, 3, 4, EOS), 3)
    assert example.labels == [-100, -100, -100, 3, 4, EOS]
    assert encode_example(letters, "abc", "de", None).labels == [-100, -100, -100, 3, 4]


def test_padding_costs_nothing() -> None:
    ids, labels = pad([Example((5, 6, 7, 8), 1), Example((9, 3), 1)], pad_token_id=0)
    assert ids == [[5, 6, 7, 8], [9, 3, 0, 0]]
    assert labels == [[-100, 6, 7, 8], [-100, 3, -100, -100]]


def read(tmp_path: Path, tokenizer: Tokenizer, rows: list[dict[str, object]], context: int = 10) -> Examples:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = Task.parse("{q} ", "{a}")
    return read_examples(path, task, tokenizer, eos_token_id=EOS, context_length=context)


def test_rows_that_are_left_out_are_counted(letters: Tokenizer, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"q": "abc", "a": "d"},
        {"q": "abcdefgh", "a": "d"},
        {"q": "abcdefg", "a": "d"},
        {"q": "a", "a": " "},
        {"q": "a"},
    ]
    examples = read(tmp_path, letters, rows)
    assert [len(example.ids) for example in examples.examples] == [6, 10]
    assert examples.notes == (
        "left out 2 of 5 examples: their completion is empty",
        "left out 1 of 5 examples: they are longer than 10 tokens",
    )


def test_no_usable_example_and_a_missing_column_are_refused(letters: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"no usable example: left out 1 of 1 .*longer than 3 tokens"):
        read(tmp_path, letters, [{"q": "abc", "a": "d"}], context=3)
    with pytest.raises(TrainingError, match=r"no column 'a', only 'q', 'b'; give --prompt and --completion"):
        read(tmp_path, letters, [{"q": "abc", "b": "d"}])


def test_a_prompt_template_may_be_empty(letters: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nab\n", encoding="utf-8")
    task = Task.parse("", "{text}")
    (example,) = read_examples(tmp_path / "a.csv", task, letters, eos_token_id=None, context_length=9).examples
    assert example.prompt_length == 0 and letters.decode(list(example.ids)) == "ab"
    with pytest.raises(ConfigError, match="names no column"):
        Task.parse("{text}", "")
