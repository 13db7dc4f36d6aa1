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

_NAMES = ("edgelm_first_function", "edgelm_second_function", "edgelm_third_function")
_IDS = ("edge1mId1", "edge1mId2", "edge1mId3")
_ARGUMENTS: tuple[dict[str, Any], ...] = tuple(
    {"edgelm_city": place, "count": count} for place, count in (("first", 11), ("second", 22), ("third", 33))
)
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
_RESULT_MESSAGE = {"role": "tool", "tool_call_id": _IDS[0], "content": _RESULT}
_EXAMPLE = re.compile(
    r'(?P<opening><[^<>\s/]+>\s*)\{"name": <[^<>]*>, "(?P<key>arguments|parameters)": <[^<>]*>'
    r"(?P<close>\}\s*</[^<>\s]+>)"
)
"""An example in the instructions that a template writes, such as ``<tool_call>{"name": <...>, "arguments": <...>}``."""


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """How calls are written: `begin` NAME `middle` ARGUMENTS `close`, then `between` NAME ... or `end`."""

    marker: str
    """By which calls are told from text: a token, or a text. Empty where a whole answer is text or a call."""
    begin: str
    """It begins with `marker`, perhaps behind blanks."""
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

    @property
    def begin_in_text(self) -> str:
        """How calls begin where text may stand before them: with the marker."""
        return self.begin.lstrip() if self.marker else self.begin

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
    written = [_written(render, variable, no_text) for no_text in (None, "")]
    # The first form that the template takes, and with which it takes results too, if there is one.
    best = max((one for one in written if one is not None), key=lambda one: one.takes_results, default=None)
    syntax = None
    if best is None:
        results, syntax = _rendered(render, [*answered, _RESULT_MESSAGE], variable), _shown_example(instructions)
        best = _Written("", "", results or "")
        writes_calls = False
    else:
        writes_calls = True
        if plain is not None and _TEXT in plain:
            several = _rendered(render, [_USER, _answer(len(_NAMES), best.no_text)], variable)
            syntax = _read_off(plain, best.called, several, tokens)
    around = "".join(syntax.parts if syntax else ()) + best.results
    own = (token for token in tokens if token in around and token not in (without_tools or ""))
    return TemplateTools(variable, syntax, writes_calls, best.no_text, best.takes_results, frozenset(own))


@dataclass(frozen=True, slots=True)
class _Written:
    """What a template wrote of an answer with a call and without a text, which is said with `no_text`."""

    no_text: str | None
    called: str
    results: str
    """The same with the result of the call; empty where the template fails."""

    @property
    def takes_results(self) -> bool:
        return _RESULT in self.results


def _written(render: Render, variable: str, no_text: str | None) -> _Written | None:
    """None where the template fails, or does not write the call."""
    called = _rendered(render, [_USER, _answer(1, no_text)], variable)
    asked = _rendered(render, [_USER], variable) or ""
    answer = "" if called is None else called[_common_start(asked, called) :]
    if called is None or _NAMES[0] not in answer or "None" in answer:
        return None
    results = _rendered(render, [_USER, _answer(1, no_text), _RESULT_MESSAGE], variable)
    return _Written(no_text, called, results or "")


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


def _read_off(plain: str, called: str, several: str | None, tokens: Sequence[str]) -> CallSyntax | None:
    """The syntax, of the same answer as a text, with one call and with several; None if it is not of this form."""
    start = _whole_tokens(called, _common_start(plain, called), tokens)
    one = _answer_part(plain, called, start, tokens)
    for item_separator, key_separator in _SEPARATORS:
        arguments = [json.dumps(value, separators=(item_separator, key_separator)) for value in _ARGUMENTS]
        begin, _, rest = one.partition(_NAMES[0])
        middle, found, tail = rest.partition(arguments[0])
        if not found or _NAMES[0] in rest or ID_PLACE in begin:
            continue
        tail = _up_to_end_of_turn(tail, plain[plain.rindex(_TEXT) :], tokens)
        close, between, end = tail, None, ""
        if several is not None and several.startswith(called[:start]):
            part = _answer_part(plain, several, start, tokens)
            gap = part.removeprefix(begin + _NAMES[0] + middle + arguments[0]).partition(_NAMES[1])[0]
            calls = [name + middle + values for name, values in zip(_NAMES, arguments, strict=True)]
            if gap and part.startswith(begin + gap.join(calls) + tail):
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


def _up_to_end_of_turn(tail: str, after_text: str, tokens: Sequence[str]) -> str:
    """`tail` up to the first token with which the turn of a text ends."""
    ends = [tail.index(token) for token in tokens if token in tail and token in after_text]
    return tail[: min(ends)] if ends else tail


def _shown_example(instructions: str) -> CallSyntax | None:
    """The syntax of an example in the instructions; None without one."""
    found = _EXAMPLE.search(instructions)
    if found is None:
        return None
    begin, middle = found["opening"] + '{"name": "', f'", "{found["key"]}": '
    return CallSyntax(found["opening"].rstrip(), begin, middle, found["close"], "\n" + begin, "", ", ", ": ")


def _marker(begin: str, tokens: Sequence[str]) -> str:
    """By what calls are told from text: a token, or the text before a token and before the JSON."""
    begin = begin.lstrip()
    token = next((token for token in tokens if begin.startswith(token)), None)
    if token is not None:
        return token
    json_begins = re.search(r'\s*\[?\s*\{\s*"', begin)
    stops = [len(begin) if json_begins is None else json_begins.start()]
    stops += [begin.index(token) for token in tokens if token in begin]
    return begin[: min(stops)]


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
