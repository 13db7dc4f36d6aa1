"""How a model writes calls of tools, read off what its chat template writes.

No list of models is needed: the template writes an answer with a call in it, once as a text without a call, once with
one call and once with two. What stands around the names and the arguments is the syntax.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgelm.errors import PromptError

ID_PLACE = "\0"
"""Stands in a syntax where the model writes the id of a call; no text may contain this character."""
ID_PATTERN = "[a-zA-Z0-9]{9}"
"""An id, as Mistral's templates want it."""

Render = Callable[[Sequence[Mapping[str, Any]], Mapping[str, Any]], str]
"""Writes messages without the beginning of an answer; the second argument are further variables of the template."""

# What templates call the tools; the second is SmolLM3's.
_VARIABLES = ("tools", "xml_tools")
# As `json.dumps` takes them: between items, and between a key and its value.
_SEPARATORS = ((", ", ": "), (",", ":"))

_NAMES = ("edgelm_first_function", "edgelm_second_function")
_IDS = ("edge1mId1", "edge1mId2")
_ARGUMENTS: tuple[dict[str, Any], ...] = ({"edgelm_city": "first", "count": 11}, {"edgelm_city": "second", "count": 22})
_TEXT, _RESULT = "\U0010fffd", "edgelm result"
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Looks something up.",
            "parameters": {
                "type": "object",
                "properties": {
                    "edgelm_city": {"type": "string", "description": "Where."},
                    "count": {"type": "integer", "description": "How many."},
                },
                "required": ["edgelm_city", "count"],
            },
        },
    }
    for name in _NAMES
]
_USER = {"role": "user", "content": "edgelm asks"}
_EXAMPLE = re.compile(
    r'(?P<opening><[^<>\s/]+>\s*)\{"name": <[^<>]*>, "(?P<key>arguments|parameters)": <[^<>]*>'
    r"(?P<close>\}\s*</[^<>\s]+>)"
)
"""An example in the instructions that a template writes, such as ``<tool_call>{"name": <...>, "arguments": <...>}``."""


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """How calls are written: `begin` NAME `middle` ARGUMENTS `close`, then `between` NAME ... or `end`."""

    marker: str
    """The beginning of `begin`, by which calls are told from text; empty where a whole answer is text or a call."""
    begin: str
    middle: str
    close: str
    """With it a call is complete."""
    between: str | None
    """From the close of a call to the name of another one; None where an answer has one call at most."""
    end: str
    """What follows the last call."""
    item_separator: str
    """Between two fields of the arguments, which are JSON."""
    key_separator: str
    """Between the name and the value of a field."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Everything that is written around names and arguments."""
        return self.begin, self.middle, self.close, self.between or "", self.end

    def written(self, name: str, arguments: dict[str, Any], *, first: bool) -> str:
        """A call as text, the first or a further one of an answer; without an id, as no template needs one here."""
        text = json.dumps(arguments, ensure_ascii=False, separators=(self.item_separator, self.key_separator))
        return ((self.begin if first else self.between) or "") + name + self.middle + text + self.close


@dataclass(frozen=True, slots=True)
class TemplateTools:
    """What a chat template does with tools."""

    variable: str
    """The name under which the template takes them."""
    syntax: CallSyntax | None
    """None where it cannot be told how the model writes calls."""
    writes_calls: bool
    """Whether the template writes the calls of earlier answers; otherwise they belong into the answer's text."""
    no_text: str | None
    """The content of an answer that has calls only."""
    takes_results: bool
    """Whether it writes messages of the role "tool"."""
    tokens: frozenset[str]
    """Tokens of the vocabulary that the template writes around calls and results, and not in other conversations."""


def template_tools(render: Render, added_tokens: Iterable[str]) -> TemplateTools | None:
    """What the template behind `render` does with tools; None if it does not write them.

    Args:
        render: writes messages; raises PromptError where the template refuses or fails.
        added_tokens: texts that are tokens of their own.
    """
    tokens = sorted((token for token in added_tokens if token), key=len, reverse=True)
    for variable in _VARIABLES:
        instructions = _rendered(render, [_USER], variable)
        if instructions is not None and all(name in instructions for name in _NAMES):
            return _measured(render, variable, instructions, tokens)
    return None


def _measured(render: Render, variable: str, instructions: str, tokens: Sequence[str]) -> TemplateTools:
    answered = [_USER, {"role": "assistant", "content": _TEXT}]
    plain, without_tools = _rendered(render, answered, variable), _rendered(render, answered, None)
    syntax, no_text, called = None, None, None
    for no_text in (None, ""):
        called = _rendered(render, [_USER, _answer(1, no_text)], variable)
        twice = _rendered(render, [_USER, _answer(2, no_text)], variable)
        if plain is not None and _TEXT in plain and called is not None:
            syntax = _read_off(plain, called, twice, tokens)
        if syntax is not None:
            break
    writes_calls = syntax is not None
    if syntax is None:
        no_text, called, syntax = "", None, _shown_example(instructions)
    before = [_USER, _answer(1, no_text)] if writes_calls else answered
    results = _rendered(render, [*before, {"role": "tool", "tool_call_id": _IDS[0], "content": _RESULT}], variable)
    takes_results = results is not None and _RESULT in results
    around = "".join(syntax.parts if syntax else ()) + (results or "")
    own = (token for token in tokens if token in around and token not in (without_tools or ""))
    return TemplateTools(variable, syntax, writes_calls, no_text, takes_results, frozenset(own))


def _rendered(render: Render, messages: Sequence[dict[str, Any]], variable: str | None) -> str | None:
    """What the template writes, with the tools under the name `variable` or without them; None where it fails."""
    try:
        return render(messages, {} if variable is None else {variable: _TOOLS})
    except PromptError:
        return None


def _answer(count: int, content: str | None) -> dict[str, Any]:
    calls = [
        {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}
        for id_, name, arguments in zip(_IDS[:count], _NAMES, _ARGUMENTS, strict=False)
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def _read_off(plain: str, called: str, twice: str | None, tokens: Sequence[str]) -> CallSyntax | None:
    """The syntax, of the same answer as a text, with one call and with two; None if it is not of this form."""
    start = _common_start(plain, called)
    one = _answer_part(plain, called, start, tokens)
    for item_separator, key_separator in _SEPARATORS:
        arguments = [json.dumps(value, separators=(item_separator, key_separator)) for value in _ARGUMENTS]
        begin, found, rest = one.partition(_NAMES[0])
        middle, found_too, tail = rest.partition(arguments[0])
        if not found or not found_too or _NAMES[0] in rest or ID_PLACE in begin or "None" in begin:
            continue
        close, between, end = tail, None, ""
        if twice is not None and twice.startswith(called[:start]):
            two = _answer_part(plain, twice, start, tokens)
            head = begin + _NAMES[0] + middle + arguments[0]
            gap, found, rest = two.removeprefix(head).partition(_NAMES[1])
            if two.startswith(head) and found and gap and rest == middle + arguments[1] + tail:
                close = tail[: _whole_tokens(tail, _common_start(gap, tail), tokens)]
                between, end = gap[len(close) :], tail[len(close) :]
        marker = _marker(begin, tokens)
        return CallSyntax(marker, begin, middle, close, between, end, item_separator, key_separator)
    return None


def _answer_part(plain: str, called: str, start: int, tokens: Sequence[str]) -> str:
    """What `called` has in the place of the text in `plain`, from `start` on, with ids as `ID_PLACE`."""
    after_text = plain[plain.rindex(_TEXT) + len(_TEXT) :]
    stop = len(called) - _common_start(after_text[::-1], called[start:][::-1])
    stop = _whole_tokens(called, stop, tokens)
    part = called[start:stop]
    for id_ in _IDS:
        part = part.replace(id_, ID_PLACE)
    return part


def _shown_example(instructions: str) -> CallSyntax | None:
    """The syntax of an example in the instructions; None without one."""
    found = _EXAMPLE.search(instructions)
    if found is None:
        return None
    begin, middle = found["opening"] + '{"name": "', f'", "{found["key"]}": '
    return CallSyntax(found["opening"].rstrip(), begin, middle, found["close"], "\n" + begin, "", ", ", ": ")


def _marker(begin: str, tokens: Sequence[str]) -> str:
    """By what calls are told from text: a token, or what stands before the JSON."""
    token = next((token for token in tokens if begin.startswith(token)), None)
    if token is not None:
        return token
    json_begins = re.search(r'\s*\[?\s*\{\s*"', begin)
    marker = begin if json_begins is None else begin[: json_begins.start()]
    return marker if marker.strip() else ""


def _common_start(one: str, other: str) -> int:
    """How many characters both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _whole_tokens(text: str, length: int, tokens: Sequence[str]) -> int:
    """`length`, or less where ``text[:length]`` would end inside one of `tokens`."""
    for token in tokens:
        for start in range(max(0, length - len(token) + 1), length):
            if text.startswith(token, start):
                return _whole_tokens(text, start, tokens)
    return length
