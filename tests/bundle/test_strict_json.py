"""JSON that readers could understand differently is refused."""

import contextlib
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.bundle.strict_json import Between, StrictJsonError, from_json, parse_json


@dataclass(frozen=True)
class Inner:
    size: Annotated[int, Between(1, 9)]


@dataclass(frozen=True)
class Outer:
    name: str
    ratio: Annotated[float, Between(0, 1)]
    flag: bool
    kind: Literal["a", "b"]
    maybe: Annotated[int, Between(0, 5)] | None
    items: tuple[Inner, ...]
    table: dict[str, Inner]


GOOD = {
    "name": "x",
    "ratio": 1,
    "flag": True,
    "kind": "a",
    "maybe": None,
    "items": [{"size": 1}],
    "table": {"k": {"size": 9}},
}


def test_builds_nested_dataclasses() -> None:
    outer = from_json(Outer, GOOD)
    assert outer == Outer("x", 1.0, True, "a", None, (Inner(1),), {"k": Inner(9)})
    assert isinstance(outer.ratio, float)


def test_a_field_whose_default_is_none_may_be_absent() -> None:
    @dataclass(frozen=True)
    class Newer:
        size: int
        name: str | None = None

    assert from_json(Newer, {"size": 1}) == Newer(1, None)
    assert from_json(Newer, {"size": 1, "name": "x"}) == Newer(1, "x")
    with pytest.raises(StrictJsonError, match="name must be a text"):
        from_json(Newer, {"size": 1, "name": 2})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"more": 1}, "unknown field 'more'"),
        ({"name": 3}, "name must be a text, got 3"),
        ({"name": "x" * 5000}, "longer than 4096"),
        ({"ratio": 1.5}, "ratio must be between 0 and 1, got 1.5"),
        ({"ratio": True}, "ratio must be a number, got True"),
        ({"flag": 1}, "flag must be true or false, got 1"),
        ({"kind": "c"}, "kind must be one of 'a', 'b', got 'c'"),
        ({"kind": ["a"]}, "kind must be one of"),
        ({"maybe": 6}, "maybe must be between 0 and 5, got 6"),
        ({"maybe": 2.0}, "maybe must be a whole number, got 2.0"),
        ({"items": {}}, "items must be a list"),
        ({"items": [{"size": 10**30}]}, "items[0].size must be between 1 and 9"),
        ({"items": [{}]}, "lacks the field 'items[0].size'"),
        ({"table": {"k": 4}}, "table.k must be an object, got 4"),
        ({"table": {"a\nb\x1b": 4}}, r"table.'a\nb\x1b' must be an object, got 4"),
        ({"table": {"k" * 100: 4}}, "...kkkkkkkkkkkkkkkkkkkkkkkkkkkk' must be an object"),
        ({"a\nb": 1}, r"unknown field 'a\nb'"),
    ],
)
def test_refuses_by_name(change: dict[str, object], message: str) -> None:
    with pytest.raises(StrictJsonError) as error:
        from_json(Outer, GOOD | change)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": 1, "a": 2}', "the field 'a' twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "too large"),
        (b"\xff", "not UTF-8"),
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
    ],
)
def test_refuses_ambiguous_text(text: bytes, message: str) -> None:
    with pytest.raises(StrictJsonError) as error:
        parse_json(text)
    assert message in str(error.value)


def test_infinity_by_overflow_is_refused() -> None:
    with pytest.raises(StrictJsonError):
        from_json(Outer, GOOD | {"ratio": parse_json(b"1e999")})


@pytest.mark.parametrize("field", ["ratio", "maybe"])
@pytest.mark.parametrize("number", [10**400, -(10**400)])
def test_a_number_of_any_length_is_refused_by_its_bounds(field: str, number: int) -> None:
    with pytest.raises(StrictJsonError, match=f"{field} must be between 0 and [15], got "):
        from_json(Outer, GOOD | {field: number})


@given(st.binary(max_size=200))
def test_any_bytes_parse_or_are_refused(text: bytes) -> None:
    with contextlib.suppress(StrictJsonError):
        parse_json(text)


def test_a_text_has_bounds_of_its_own() -> None:
    @dataclass(frozen=True)
    class Titled:
        title: Annotated[str, Between(2, 5000)]

    assert from_json(Titled, {"title": "a" * 5000}).title == "a" * 5000
    with pytest.raises(StrictJsonError, match="title is shorter than 2 characters"):
        from_json(Titled, {"title": "a"})
    with pytest.raises(StrictJsonError, match="title is longer than 5000 characters"):
        from_json(Titled, {"title": "a" * 5001})
