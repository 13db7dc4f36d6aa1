"""Protobuf messages read strictly: what is accepted, every other reader understands the same way.

A message may have only the fields that its schema names. Refused are unknown fields, other wire types, groups, a second
value of a single field (other readers merge the two, or keep the last), numbers in more bytes than needed, numbers of
more than 64 bits, and whatever reaches beyond the end. Nothing is copied, and nothing recurses: a nested message is a
`Span` until somebody reads it.
"""

import struct
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeAlias

Span: TypeAlias = tuple[int, int]
"""Where a nested message, a text or bytes begin and end in the file."""

MAX_TEXT_BYTES = 256
MAX_VALUES = 65_536
"""The most values that one field of one message may have."""


class ProtobufError(ValueError):
    """The bytes are no message of the expected kind."""


class Field(NamedTuple):
    """A field of a message. A "span" is a text, bytes or a nested message."""

    name: str
    kind: Literal["number", "decimal", "span"]
    repeated: bool = False


_WIRE_TYPES = {"number": 0, "span": 2, "decimal": 5}


class Schema:
    """A kind of message: its name in error messages, and its fields by number."""

    def __init__(self, name: str, fields: dict[int, Field]) -> None:
        self.name = name
        self.by_tag = {number << 3 | _WIRE_TYPES[field.kind]: field for number, field in fields.items()}
        """The fields by the number that stands before each value: the field's number and how the value is encoded."""


class Message:
    """The fields of the message at `span` of `data`, all checked against `schema`.

    Making one raises ProtobufError, and so does every method.
    """

    __slots__ = ("_data", "_schema", "_values")

    def __init__(self, data: bytes, span: Span, schema: Schema) -> None:
        self._data, self._schema = data, schema
        values: dict[str, list[Any]] = {}
        at, stop = span
        by_tag = schema.by_tag
        while at < stop:  # most of the time goes here, so the numbers of one byte, which nearly all are, make no calls
            tag = data[at]
            at += 1
            if tag >= 128:
                tag, at = _varint(data, at - 1, stop)
            if tag not in by_tag:
                raise ProtobufError(f"{schema.name} has field {tag >> 3} of wire type {tag & 7}, which no bundle has")
            name, kind, repeated = by_tag[tag]
            if kind == "decimal":
                start, at = at, at + 4
            elif at < stop and data[at] < 128:
                number, at = data[at], at + 1
            else:
                number, at = _varint(data, at, stop)
            value: Any = None
            if kind == "span":
                start, at = at, at + number
                value = start, at
            if at > stop:
                raise ProtobufError(f"{schema.name} ends in the middle of {name!r}")
            if kind == "number":
                value = number if number < 2**63 else number - 2**64
            elif kind == "decimal":
                value = struct.unpack_from("<f", data, start)[0]
            if name not in values:
                values[name] = [value]
            elif repeated and len(values[name]) < MAX_VALUES:
                values[name].append(value)
            else:
                raise ProtobufError(f"{schema.name} has more than {len(values[name])} of {name!r}")
        self._values = values

    def has(self, name: str) -> bool:
        """Whether the message has the field `name`."""
        return name in self._values

    def number(self, name: str) -> int:
        """A whole number, from -2^63 to 2^63 - 1."""
        value: int = self._only(name)
        return value

    def numbers(self, name: str) -> tuple[int, ...]:
        """All numbers of a repeated field."""
        return tuple(self._values.get(name, ()))

    def decimal(self, name: str) -> float:
        """A 32-bit float."""
        value: float = self._only(name)
        return value

    def text(self, name: str) -> str:
        """A text: printable ASCII without blanks, of at most MAX_TEXT_BYTES; "" if the field is absent."""
        return self._text(self._values[name][0], name) if name in self._values else ""

    def texts(self, name: str) -> tuple[str, ...]:
        """All texts of a repeated field."""
        return tuple([self._text(span, name) for span in self._values.get(name, ())])

    def span(self, name: str) -> Span:
        """Where a nested message, or bytes, are."""
        span: Span = self._only(name)
        return span

    def spans(self, name: str, limit: int) -> list[Span]:
        """Where the nested messages of a repeated field are, `limit` at most."""
        spans: list[Span] = self._values.get(name, [])
        if len(spans) > limit:
            raise ProtobufError(f"{self._schema.name} has {len(spans):,} of {name!r}, more than {limit:,}")
        return spans

    def _only(self, name: str) -> Any:
        if name not in self._values:
            raise ProtobufError(f"{self._schema.name} lacks {name!r}")
        return self._values[name][0]

    def _text(self, span: Span, name: str) -> str:
        start, stop = span
        if stop - start > MAX_TEXT_BYTES:
            raise ProtobufError(f"{self._schema.name} has a {name!r} of more than {MAX_TEXT_BYTES} bytes")
        text = _printable(self._data[start:stop])
        if text is None:
            raise ProtobufError(f"{self._schema.name} has a {name!r} that is not printable ASCII without blanks")
        return text


def replaced(data: bytes, span: Span, number: int, make: Callable[[Span], bytes]) -> bytes:
    """The message at `span` of `data` with ``make(value)`` for each value, a span, of its field `number`.

    All other fields stay as they are. The message must have been read before, because nothing is checked.
    """
    parts = []
    at, stop = span
    while at < stop:
        start = at
        tag, at = _varint(data, at, stop)
        if tag & 7 == _WIRE_TYPES["decimal"]:
            at += 4
        else:
            length, at = _varint(data, at, stop)
        value = at, at
        if tag & 7 == _WIRE_TYPES["span"]:
            value = at, at + length
            at += length
        parts.append(field_bytes(number, make(value)) if tag == _span_tag(number) else data[start:at])
    return b"".join(parts)


def field_bytes(number: int, content: bytes) -> bytes:
    """The field `number` with `content`: a text, bytes or a nested message."""
    return varint_bytes(_span_tag(number)) + varint_bytes(len(content)) + content


def _span_tag(number: int) -> int:
    return number << 3 | _WIRE_TYPES["span"]


def varint_bytes(value: int) -> bytes:
    """A number that is not negative, in as few bytes as it needs."""
    groups = [value >> shift & 127 for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([*(group | 128 for group in groups[:-1]), groups[-1]])


@lru_cache(4096)  # most names stand several times in a file
def _printable(raw: bytes) -> str | None:
    text = raw.decode("latin-1")
    return text if text.isascii() and text.isprintable() and " " not in text else None


def _varint(data: bytes, at: int, stop: int) -> tuple[int, int]:
    """The unsigned number at `at`, and where it ends."""
    value = shift = 0
    while at < stop and shift < 70:
        byte = data[at]
        value |= (byte & 127) << shift
        shift, at = shift + 7, at + 1
        if byte < 128:
            if (byte == 0 and shift > 7) or value >= 2**64:
                break
            return value, at
    raise ProtobufError("a number in the file is cut off, too large, or written in more bytes than it needs")
