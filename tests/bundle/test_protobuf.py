"""Protobuf that readers could understand differently is refused."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.bundle.protobuf import Field, Message, ProtobufError, Schema
from tests.fuzz.mutations import message, varint

SCHEMA = Schema(
    "a thing",
    {
        1: Field("count", "number"),
        2: Field("sizes", "number", repeated=True),
        3: Field("ratio", "decimal"),
        4: Field("name", "span"),
        16: Field("parts", "span", repeated=True),
    },
)


def read(data: bytes) -> Message:
    return Message(data, (0, len(data)), SCHEMA)


def test_reads_every_kind() -> None:
    data = message((1, 300), (2, 5), (2, -1), (4, "wte.weight"), (16, b"ab"), (16, b"")) + b"\x1d\x00\x00\xc0\x3f"
    found = read(data)
    assert (found.number("count"), found.numbers("sizes"), found.decimal("ratio")) == (300, (5, -1), 1.5)
    assert found.text("name") == "wte.weight"
    assert [data[start:stop] for start, stop in found.spans("parts", 2)] == [b"ab", b""]
    assert found.has("count") and not read(b"").has("count")
    assert read(b"").text("name") == "" and read(b"").numbers("sizes") == ()


def test_reads_a_part_of_the_file_only() -> None:
    inner = message((1, 7))
    data = b"before" + inner + b"\xff"
    assert Message(data, (6, 6 + len(inner)), SCHEMA).number("count") == 7


@pytest.mark.parametrize("value", [0, 1, 127, 128, 2**32, 2**63 - 1, -1, -(2**63)])
def test_numbers_of_64_bits(value: int) -> None:
    assert read(message((1, value))).number("count") == value


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (message((5, 1)), "field 5 of wire type 0"),
        (b"\x00", "field 0 of wire type 0"),
        (b"\x0b\x0c", "field 1 of wire type 3"),  # a group
        (b"\x0a\x01\x00", "field 1 of wire type 2"),  # packed
        (b"\x09" + bytes(8), "field 1 of wire type 1"),
        (message((1, 1), (1, 1)), "more than 1 of 'count'"),
        (message((4, "a"), (4, "a")), "more than 1 of 'name'"),
        (b"\x22\x05abcd", "ends in the middle of 'name'"),
        (b"\x22" + varint(2**64 - 1) + b"a", "ends in the middle of 'name'"),
        (b"\x22", "a number in the file is cut off"),
        (b"\x1d\x00\x00\x00", "ends in the middle of 'ratio'"),
        (b"\x08", "a number in the file is cut off"),
        (b"\x08\x80", "a number in the file is cut off"),
        (b"\x08\x80\x00", "written in more bytes than it needs"),
        (b"\x88\x00\x01", "written in more bytes than it needs"),
        (b"\x08" + b"\xff" * 9 + b"\x02", "too large"),
        (b"\x08" + b"\xff" * 10 + b"\x01", "too large"),
    ],
)
def test_refuses(data: bytes, words: str) -> None:
    with pytest.raises(ProtobufError, match=words):
        read(data)


@pytest.mark.parametrize("name", ["a b", "a\n", "\x1b[31m", "ü", "a" * 257, "\x7f"])
def test_texts_are_short_and_print(name: str) -> None:
    with pytest.raises(ProtobufError, match="a thing has a 'name'"):
        read(message((4, name))).text("name")


def test_what_is_absent_or_too_many() -> None:
    with pytest.raises(ProtobufError, match="a thing lacks 'count'"):
        read(b"").number("count")
    with pytest.raises(ProtobufError, match="has 2 of 'parts', more than 1"):
        read(message((16, b""), (16, b""))).spans("parts", 1)
    with pytest.raises(ProtobufError, match="more than 65536 of 'sizes'"):
        read(message((2, 0)) * 65_537)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(ProtobufError):
        read(data)
