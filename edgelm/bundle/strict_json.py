"""JSON read into frozen dataclasses. Anything ambiguous is refused, so what is accepted has exactly one meaning.

Refused are duplicate keys, NaN and Infinity, unknown and missing fields, and a bool where an int is meant. Every number
and every length is bounded.
"""

import json
import types
from collections import Counter
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from edgelm.errors import pass_interrupts_on, shown

T = TypeVar("T")

MAX_STRING_CHARACTERS = 4096
MAX_ITEMS = 100_000
MAX_NUMBER = 2**53  # JSON readers in other languages keep integers exact up to here


class StrictJsonError(ValueError):
    """The text is not JSON, or its content does not fit the dataclass."""


@dataclass(frozen=True, slots=True)
class Between:
    """Bounds of a number, or of a text's length in characters, both included: ``Annotated[int, Between(1, 9)]``."""

    low: float
    high: float


_SHORT_TEXT = Between(0, MAX_STRING_CHARACTERS)
Count = Annotated[int, Between(1, 2**31 - 1)]
Bytes = Annotated[int, Between(0, 2**44)]


def parse_json(text: bytes) -> object:
    """Parse UTF-8 JSON strictly.

    Raises StrictJsonError if the text is not UTF-8 or JSON, is nested too deeply, or has a duplicate key, NaN or
    Infinity.
    """
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    except UnicodeDecodeError:
        raise StrictJsonError("is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise StrictJsonError(f"is not valid JSON (line {error.lineno}: {error.msg})") from None
    except RecursionError:
        raise StrictJsonError("is nested too deeply") from None
    except StrictJsonError:
        raise
    except ValueError as error:  # Python's own limit on the digits of an int
        pass_interrupts_on(error)
        raise StrictJsonError("holds a number that is too large") from None


def from_json(cls: type[T], value: object, where: str = "") -> T:
    """Build the dataclass `cls` from parsed JSON, which messages call `where`.

    Only fields whose default is None may be absent. Raises StrictJsonError if a field is missing, unknown, mistyped or
    out of bounds; the message names it.
    """
    return cast(T, _convert(cls, value, where, None))


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise StrictJsonError(f"has the field {twice[:60]!r} twice")
    return result


def _no_constants(name: str) -> object:
    raise StrictJsonError(f"holds {name}, which is not a number")


def _convert(kind: Any, value: object, where: str, bounds: Between | None) -> object:
    if get_origin(kind) is Annotated:
        inner, meta = get_args(kind)
        return _convert(inner, value, where, meta)
    if get_origin(kind) in (Union, types.UnionType):  # only `X | None` is used
        inner = next(arg for arg in get_args(kind) if arg is not type(None))
        return None if value is None else _convert(inner, value, where, bounds)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise StrictJsonError(f"{where} must be one of {', '.join(map(repr, get_args(kind)))}, got {shown(value)}")
        return value
    if get_origin(kind) is tuple:
        inner = get_args(kind)[0]
        return tuple(_convert(inner, item, f"{where}[{i}]", None) for i, item in enumerate(_list(value, where)))
    if get_origin(kind) is dict:
        inner, items = get_args(kind)[1], _object(value, where).items()
        return {_string(key, where): _convert(inner, item, f"{where}.{_plain(key)}", None) for key, item in items}
    if kind is object:  # JSON of any form, for a reader of its own; the size of its file bounds it
        return value
    if is_dataclass(kind):
        return _dataclass(cast(type, kind), value, where)
    if kind is str:
        return _string(value, where) if bounds is None else _string(value, where, bounds)
    if kind is bool:
        if not isinstance(value, bool):
            raise StrictJsonError(f"{where} must be true or false, got {shown(value)}")
        return value
    return _number(kind, value, where, bounds)


def _dataclass(cls: type, value: object, where: str) -> object:
    given = _object(value, where)
    kinds, optional = _fields_of(cls)
    prefix = f"{where}." if where else ""
    for name in given:
        if name not in kinds:
            raise StrictJsonError(f"has the unknown field {shown(prefix + name)}")
    for name in kinds:
        if name not in given and name not in optional:
            raise StrictJsonError(f"lacks the field {prefix + name!r}")
    return cls(**{name: _convert(kind, given.get(name), prefix + name, None) for name, kind in kinds.items()})


@cache  # a manifest has many objects of few classes
def _fields_of(cls: type) -> tuple[dict[str, Any], frozenset[str]]:
    """The kinds of a dataclass's fields by name, and the fields that may be absent, which means null."""
    hints = get_type_hints(cls, include_extras=True)
    kinds = {field.name: hints[field.name] for field in fields(cls)}
    return kinds, frozenset(field.name for field in fields(cls) if field.default is None)


def _plain(key: str) -> str:
    """A key in a message: as it is, or quoted where it is long or has characters that a terminal does not show."""
    return key if key.isprintable() and len(key) <= 60 else shown(key)


def _object(value: object, where: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise StrictJsonError(f"{where or 'the whole'} must be an object, got {shown(value)}")
    if len(value) > MAX_ITEMS:
        raise StrictJsonError(f"{where} has {len(value)} fields, more than {MAX_ITEMS}")
    return value


def _list(value: object, where: str) -> list[object]:
    if not isinstance(value, list):
        raise StrictJsonError(f"{where} must be a list, got {shown(value)}")
    if len(value) > MAX_ITEMS:
        raise StrictJsonError(f"{where} has {len(value)} items, more than {MAX_ITEMS}")
    return value


def _string(value: object, where: str, bounds: Between = _SHORT_TEXT) -> str:
    if not isinstance(value, str):
        raise StrictJsonError(f"{where} must be a text, got {shown(value)}")
    if len(value) < bounds.low:
        raise StrictJsonError(f"{where} is shorter than {bounds.low:g} characters")
    if len(value) > bounds.high:
        raise StrictJsonError(f"{where} is longer than {bounds.high} characters")
    return value


def _number(kind: type, value: object, where: str, bounds: Between | None) -> int | float:
    whole = kind is int
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise StrictJsonError(f"{where} must be a {'whole ' if whole else ''}number, got {shown(value)}")
    number = value
    limits = bounds or Between(-MAX_NUMBER, MAX_NUMBER)
    # Comparing is exact for an int of any size; making it a float is not.
    if not (limits.low <= number <= limits.high):
        raise StrictJsonError(f"{where} must be between {limits.low} and {limits.high}, got {shown(value)}")
    return number if whole else float(number)
