"""JSON read into frozen dataclasses. Anything ambiguous is refused, so what is accepted has exactly one meaning.

Refused are duplicate keys, NaN and Infinity, unknown and missing fields, and a bool where an int is meant. Every number
and every length is bounded.
"""

import json
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, partial
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
_ANY_NUMBER = Between(-MAX_NUMBER, MAX_NUMBER)
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
    return cast(T, _reader(cast(Any, cls))(value, where))


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise StrictJsonError(f"has the field {twice[:60]!r} twice")
    return result


def _no_constants(name: str) -> object:
    raise StrictJsonError(f"holds {name}, which is not a number")


@cache  # a manifest has many values of few kinds
def _reader(kind: Any, bounds: Between | None = None) -> Callable[[object, str], object]:
    """What makes a value of `kind` out of parsed JSON, which messages call by the second argument."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _reader(*arguments)
    if origin in (Union, types.UnionType):  # only `X | None` is used
        given = _reader(next(argument for argument in arguments if argument is not type(None)), bounds)
        return lambda value, where: None if value is None else given(value, where)
    if origin is Literal:
        return partial(_one_of, arguments)
    if origin is tuple:
        item = _reader(arguments[0])
        return lambda value, where: tuple([item(it, f"{where}[{i}]") for i, it in enumerate(_list(value, where))])
    if origin is dict:
        return partial(_table, _reader(arguments[1]))
    if kind is object:  # JSON of any form, for a reader of its own; the size of its file bounds it
        return lambda value, where: value
    if is_dataclass(kind):
        return partial(_dataclass, cast(type, kind))
    if kind is str:
        return partial(_string, bounds=bounds or _SHORT_TEXT)
    if kind is bool:
        return _flag
    return partial(_number, kind, bounds or _ANY_NUMBER)


def _one_of(choices: tuple[object, ...], value: object, where: str) -> object:
    if value not in choices:
        raise StrictJsonError(f"{where} must be one of {', '.join(map(repr, choices))}, got {shown(value)}")
    return value


def _table(read: Callable[[object, str], object], value: object, where: str) -> dict[str, object]:
    return {_string(key, where): read(item, f"{where}.{_plain(key)}") for key, item in _object(value, where).items()}


def _flag(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise StrictJsonError(f"{where} must be true or false, got {shown(value)}")
    return value


def _dataclass(cls: type, value: object, where: str) -> object:
    given = _object(value, where)
    readers, needed = _fields_of(cls)
    prefix = f"{where}." if where else ""
    for name in given:
        if name not in readers:
            raise StrictJsonError(f"has the unknown field {shown(prefix + name)}")
    for name in needed:
        if name not in given:
            raise StrictJsonError(f"lacks the field {prefix + name!r}")
    return cls(**{name: read(given.get(name), prefix + name) for name, read in readers.items()})


@cache
def _fields_of(cls: type) -> tuple[dict[str, Callable[[object, str], object]], tuple[str, ...]]:
    """What reads each field of a dataclass, by its name, and the fields that must be there; absent means null."""
    hints = get_type_hints(cls, include_extras=True)
    readers = {field.name: _reader(hints[field.name]) for field in fields(cls)}
    return readers, tuple(field.name for field in fields(cls) if field.default is not None)


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


def _number(kind: type, bounds: Between, value: object, where: str) -> int | float:
    whole = kind is int
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise StrictJsonError(f"{where} must be a {'whole ' if whole else ''}number, got {shown(value)}")
    # Comparing is exact for an int of any size; making it a float is not.
    if not (bounds.low <= value <= bounds.high):
        raise StrictJsonError(f"{where} must be between {bounds.low} and {bounds.high}, got {shown(value)}")
    return value if whole else float(value)
