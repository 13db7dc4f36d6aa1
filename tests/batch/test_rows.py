"""Rows: what a line may say, and what is said about one that may not."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.batch.lines import LineError
from edgelm.batch.rows import (
    ChooseFields,
    ScoreFields,
    check_options,
    generate_fields,
    read_object,
    row_seed,
    scoring_fields,
    take_id,
)
from edgelm.decoding.generation_config import GenerationConfig
from edgelm.errors import ConfigError
from edgelm.text.constraints import Choices


def test_seeds_of_rows_are_fixed_and_differ() -> None:
    """`printf 7:1 | sha256sum`: its first 8 bytes, most significant first."""
    assert row_seed(7, 1) == 0xD7A0CEE7B61EB0E3
    seeds = {row_seed(seed, number) for seed in range(20) for number in range(1, 21)}
    assert len(seeds) == 400 and all(0 <= seed < 2**64 for seed in seeds)


@pytest.mark.parametrize(
    "line, words",
    [
        (b"", "is empty"),
        (b" \r\n", "is empty"),
        (b"{", "is not valid JSON"),
        (b"[1]", "must be a JSON object"),
        (b'"a"', "must be a JSON object"),
        (b'{"a": 1, "a": 2}', "has the field 'a' twice"),
        (b'{"a": NaN}', "holds NaN"),
        (b"\xff", "is not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "too large"),
    ],
)
def test_lines_that_are_no_rows(line: bytes, words: str) -> None:
    with pytest.raises(LineError, match=words):
        read_object(line)


def test_an_id_is_a_text_or_a_number() -> None:
    row: dict[str, object] = {"id": "a", "prompt": "x"}
    assert take_id(row) == "a" and row == {"prompt": "x"}
    assert take_id({"id": 0}) == 0 and take_id({"id": None}) is None and take_id({}) is None
    refused: tuple[object, ...] = (True, 1.5, [], {}, "x" * 1025)
    for wrong in refused:
        with pytest.raises(LineError, match="id"):
            take_id({"id": wrong})


def test_a_row_to_continue() -> None:
    fields = generate_fields({"prompt": "a", "top_k": 3, "constraint": {"choices": ["b", "c"]}}, None)
    assert (fields.prompt, fields.messages, fields.task_input) == ("a", None, None)
    assert fields.options == {"top_k": 3, "constraint": Choices(("b", "c"))}
    assert generate_fields({"prompt": [1, 2]}, None).prompt == [1, 2]
    assert generate_fields({"messages": []}, None).messages == []
    task = generate_fields({"premise": "a", "prompt": "b", "seed": 1}, ("premise", "prompt"))
    assert task.task_input == {"premise": "a", "prompt": "b"} and task.options == {"seed": 1}
    assert generate_fields({"seed": "a"}, ("seed",)).options == {}  # a field of the task, whatever else it means


@pytest.mark.parametrize(
    "row, words",
    [
        ({}, "one of the fields prompt and messages"),
        ({"prompt": "a", "messages": []}, "one of the fields prompt and messages"),
        ({"prompt": None}, "must have a text"),
        ({"prompt": 3}, "must have a text"),
        ({"messages": "a"}, "must have a text as prompt or a list as messages"),
        ({"prompt": "a", "tempratur": 1}, "unknown field 'tempratur'"),
        ({"prompt": "a", "cancel": None}, "unknown field 'cancel'"),
        ({"prompt": "a", "constraint": {"choices": ["a"], "regex": "b"}}, "constraint must have one of"),
        ({"prompt": "a", "constraint": "b"}, "constraint must be an object"),
    ],
)
def test_rows_that_cannot_be_continued(row: dict[str, Any], words: str) -> None:
    with pytest.raises(LineError, match=words):
        generate_fields(row, None)


def test_rows_that_are_scored() -> None:
    assert scoring_fields(ScoreFields, {"prompt": "a", "continuation": ""}) == ScoreFields("a", "")
    chosen = scoring_fields(ChooseFields, {"prompt": "a", "options": ["b"], "length_normalization": "token"})
    assert chosen == ChooseFields("a", ("b",), "token")
    wrong: list[tuple[dict[str, object], str]] = [
        ({"prompt": "a"}, "lacks the field 'continuation'"),
        ({"prompt": "a", "continuation": 1}, "must be a text"),
        ({"prompt": "a", "continuation": "b", "seed": 1}, "unknown field 'seed'"),
    ]
    for row, words in wrong:
        with pytest.raises(LineError, match=words):
            scoring_fields(ScoreFields, row)


def test_options_that_rows_cannot_have() -> None:
    check_options(GenerationConfig())
    wrong: tuple[dict[str, Any], ...] = (
        {"num_beams": 2},
        {"max_time": 1.0},
        {"num_return_sequences": 2, "do_sample": True},
        {"penalty_alpha": 0.5},
    )
    for options in wrong:
        with pytest.raises(ConfigError, match=next(iter(options))):
            check_options(GenerationConfig().updated(options))


@given(
    st.dictionaries(
        st.sampled_from(["prompt", "messages", "id", "constraint", "seed", "x"]),
        st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3), st.lists, max_leaves=4),
    )
)
def test_any_object_is_read_or_refused(row: dict[str, Any]) -> None:
    try:
        content = read_object(json.dumps(row).encode())
        take_id(content)
        generate_fields(content, None)
    except LineError as error:
        assert len(str(error)) < 400
