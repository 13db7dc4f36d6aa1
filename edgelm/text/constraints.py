"""What a text must be: one of several texts, a match of a regular expression, JSON of a schema, or a grammar's text.

These are values; `edgelm.text.token_matcher` reads them. This module imports no numpy, because ``edgelm run --help``
reads the generation options, which name them.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from edgelm.bundle.strict_json import StrictJsonError, parse_json
from edgelm.errors import ConfigError, pass_interrupts_on, shown
from edgelm.text.call_syntax import CallSyntax

MAX_REGEX_CHARACTERS = 16_384
MAX_SOURCE_CHARACTERS = 65_536
"""Maximum length of a schema as JSON, of a grammar, and of all choices together."""
MAX_CHOICES = 4_096
MAX_JSON_DEPTH = 100
MAX_MULTIPLE = 10_000
"""Limit of the product of all different values of `multipleOf`, without powers of ten: the reader takes time for it."""

_JSON_IN_GRAMMAR = re.compile(r"%json\b\s*")


@dataclass(frozen=True, slots=True)
class Choices:
    """The text is one of these, character by character: mind the blank with which most words begin."""

    texts: Iterable[str]
    """At most MAX_CHOICES texts; a tuple once the object is made."""

    def __post_init__(self) -> None:
        if isinstance(self.texts, str) or not isinstance(self.texts, Iterable):
            raise ConfigError(f"Choices takes a list of texts, got {shown(self.texts)}")
        texts = tuple(dict.fromkeys(self._listed()))
        if not texts or not all(texts):
            raise ConfigError("Choices takes at least one text, and none of them empty")
        for text in texts:
            _check_text("Choices", text, MAX_SOURCE_CHARACTERS)
        count = sum(map(len, texts))
        if count > MAX_SOURCE_CHARACTERS:
            raise ConfigError(f"the choices have {count:,} characters, more than {MAX_SOURCE_CHARACTERS:,}: give fewer")
        object.__setattr__(self, "texts", texts)

    def _listed(self) -> Iterator[str]:
        for count, text in enumerate(self.texts):
            if not isinstance(text, str):
                raise ConfigError(f"Choices takes texts, got {shown(text)}")
            if count == MAX_CHOICES:
                raise ConfigError(f"Choices takes at most {MAX_CHOICES:,} texts: give fewer")
            yield text


@dataclass(frozen=True, slots=True)
class Regex:
    """The whole text matches this expression, in the syntax of Rust's crate `regex`: no look-around, no references."""

    pattern: str
    """A regular expression in Rust's syntax."""

    def __post_init__(self) -> None:
        _check_text("Regex", self.pattern, MAX_REGEX_CHARACTERS)
        if (len(self.pattern) - len(self.pattern.rstrip("\\"))) % 2:
            raise ConfigError("the regular expression ends with a backslash: write two for the character")


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """The text is JSON, without blanks between its parts, that a JSON schema allows."""

    schema: Mapping[str, object] | bool | str
    """A schema as a dict, or as JSON; JSON once the object is made."""

    def __post_init__(self) -> None:
        schema = self.schema
        if not isinstance(schema, (str, Mapping, bool)):
            raise ConfigError(f"JsonSchema takes a schema as a dict or as JSON, got {shown(schema)}")
        try:
            text = schema if isinstance(schema, str) else json.dumps(_plain(schema), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            pass_interrupts_on(error)
            raise ConfigError(f"the JSON schema cannot be written as JSON ({_first_line(error)})") from None
        _check_text("JsonSchema", text, MAX_SOURCE_CHARACTERS)
        check_schema(_parsed(text))
        object.__setattr__(self, "schema", text)


@dataclass(frozen=True, slots=True)
class Grammar:
    """The text is one of a context-free grammar, in llguidance's variant of Lark's syntax; its rule `start` begins."""

    text: str
    """A grammar in llguidance's variant of Lark."""

    def __post_init__(self) -> None:
        _check_text("Grammar", self.text, MAX_SOURCE_CHARACTERS)
        for match in _JSON_IN_GRAMMAR.finditer(self.text):
            line = self.text.count("\n", 0, match.start()) + 1
            try:
                schema, _ = json.JSONDecoder().raw_decode(self.text, match.end())
                check_schema(schema)
            except (ValueError, RecursionError) as error:
                pass_interrupts_on(error)
                raise ConfigError(f"the grammar's %json in line {line} cannot be read: {_first_line(error)}") from None


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The text may call functions, in the model's own syntax and with arguments that their schemas allow.

    `Model.tool_use` makes it. The calls of such a text are in `Choice.tool_calls`, not in its text.
    """

    functions: tuple[tuple[str, JsonSchema], ...]
    """Names, and the schemas of their arguments, which are objects."""
    syntax: CallSyntax
    choice: Literal["auto", "none", "required"]
    """Whether the text is any text or calls, is any text but no call, or is calls only."""
    parallel: bool
    """Whether there may be several calls."""


Constraint = Choices | Regex | JsonSchema | Grammar | ToolUse


def check_schema(schema: object) -> None:
    """Raise ConfigError if a JSON schema would take too long to read, or is no object and neither true nor false.

    Everything else about a schema is for its reader to judge.
    """
    if not isinstance(schema, (dict, bool)):
        raise ConfigError(f"a JSON schema is an object, true or false, got {shown(schema)}")
    multiples = set[int]()
    for path, depth, value in _parts(schema):
        if depth > MAX_JSON_DEPTH:
            raise ConfigError(f"the JSON schema is nested deeper than {MAX_JSON_DEPTH} levels")
        if not isinstance(value, dict):
            continue
        multiple = value.get("multipleOf")
        if isinstance(multiple, (int, float)) and not isinstance(multiple, bool) and multiple > 0:
            multiples.add(_without_tens(multiple))
        product = 1
        for factor in multiples:
            product *= factor
        if product > MAX_MULTIPLE:
            raise ConfigError(
                f"the JSON schema's multipleOf at {path} is too large: without powers of ten, the product of all "
                f"different ones may be {MAX_MULTIPLE:,} at most"
            )


def place_of_key(schema: str, key: str) -> str | None:
    """Where a schema, as JSON, first has a key, such as ``#/properties/tags``; None if it does not have it."""
    return next(
        (path for path, _, value in _parts(json.loads(schema)) if isinstance(value, dict) and key in value), None
    )


def _parts(schema: object) -> Iterator[tuple[str, int, object]]:
    """Every value of parsed JSON with its place and its depth, without recursion."""
    stack = [("#", 0, schema)]
    while stack:
        path, depth, value = stack.pop()
        yield path, depth, value
        if isinstance(value, dict):
            stack += [(f"{path}/{shown(key)[1:-1]}", depth + 1, inner) for key, inner in reversed(value.items())]
        elif isinstance(value, list):
            stack += [(f"{path}/{index}", depth + 1, inner) for index, inner in reversed([*enumerate(value)])]


def _without_tens(multiple: int | float) -> int:
    """The digits of a number, without powers of ten: 25 for 0.25, 3 for 300."""
    number = Fraction(str(multiple))
    digits = number.numerator * (10**400 // number.denominator)
    while digits and digits % 10 == 0:
        digits //= 10
    return digits


def _plain(schema: Mapping[str, object] | bool) -> object:
    return schema if isinstance(schema, bool) else dict(schema)


def _parsed(text: str) -> object:
    try:
        return parse_json(text.encode())
    except StrictJsonError as error:
        raise ConfigError(f"the JSON schema {error}") from None


def _check_text(name: str, text: object, limit: int) -> None:
    if not isinstance(text, str):
        raise ConfigError(f"{name} takes a text, got {shown(text)}")
    if len(text) > limit:
        raise ConfigError(f"{name} takes at most {limit:,} characters, got {len(text):,}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{name} has a lone surrogate, {text[error.start]!r} at {error.start}") from None
    if "\0" in text:
        raise ConfigError(f"{name} has a NUL character at {text.index(chr(0))}, which no text may contain")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
