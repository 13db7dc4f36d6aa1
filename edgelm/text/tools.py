"""Functions that a conversation declares for its model, and the calls that a model writes of them."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

from edgelm.bundle.strict_json import StrictJsonError, parse_json
from edgelm.errors import ConfigError, PromptError, shown
from edgelm.text.tokenizer import check_text

MAX_TOOLS = 128
"""Tools of a conversation, as in OpenAI's API."""
MAX_TOOL_CHARACTERS = 65_536
"""The longest declaration of all tools together, as JSON; also the longest arguments of one call."""
MAX_JSON_DEPTH = 24
"""How deeply the values in a declaration and in arguments may be nested."""

FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_FUNCTION_FIELDS = ("name", "description", "parameters", "strict", "return")
"""The last one is in what transformers' `get_json_schema` makes of a Python function."""
_NAME_WORDS = "1 to 64 of the characters a-z, A-Z, 0-9, _ and -"


class FunctionDeclaration(TypedDict):
    """A function that the model may call. Its fields reach the template as they are, and in their order."""

    name: str
    description: NotRequired[str]
    parameters: NotRequired[Mapping[str, Any]]
    """A JSON schema of an object; without it the function takes no arguments."""
    strict: NotRequired[bool | None]
    """No effect: the schema is always obeyed."""


class Tool(TypedDict):
    """A tool in OpenAI's shape."""

    type: Literal["function"]
    function: FunctionDeclaration


class NamedFunction(TypedDict):
    """The name of a function."""

    name: str


class NamedTool(TypedDict):
    """A tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["auto", "none", "required"] | NamedTool
"""Whether tools are called: where the model wants to, never, at least once, or once the one that is named."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A complete call that a model wrote; its arguments are what the function's schema allows."""

    id: str
    """Nine letters and digits, by which a message of the role "tool" says which call it answers."""
    name: str
    """The name of the function."""
    arguments: str
    """A JSON object, as the model wrote it."""

    @property
    def parsed_arguments(self) -> dict[str, Any]:
        """The arguments as a new dict."""
        arguments: dict[str, Any] = json.loads(self.arguments)
        return arguments


def checked_tools(tools: Sequence[Tool] | None) -> list[dict[str, Any]]:
    """A copy of `tools` of plain values, in the order that was given; empty for None.

    Raises PromptError if they are not tools in OpenAI's shape, are too many or too long, or share a name.
    """
    if tools is None:
        return []
    if not isinstance(tools, Sequence) or isinstance(tools, (str, bytes)):
        raise PromptError(f"tools must be a list of tools, got {shown(tools)}")
    if len(tools) > MAX_TOOLS:
        raise PromptError(f"there are {len(tools):,} tools, more than {MAX_TOOLS}: give those that may be needed here")
    checked = [_checked_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
    names = [tool["function"]["name"] for tool in checked]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise PromptError(f"tools[{index}] has the name {name!r} of another tool: names must differ")
    characters = len(json.dumps(checked, ensure_ascii=False))
    if characters > MAX_TOOL_CHARACTERS:
        raise PromptError(
            f"the tools have {characters:,} characters as JSON, more than {MAX_TOOL_CHARACTERS:,}: give fewer, or "
            "shorten them"
        )
    return checked


def _checked_tool(tool: object, place: str) -> dict[str, Any]:
    if not isinstance(tool, Mapping) or tool.get("type") != "function" or set(tool) != {"type", "function"}:
        raise PromptError(f'{place} must be {{"type": "function", "function": {{...}}}}, got {shown(tool)}')
    function = tool["function"]
    if not isinstance(function, Mapping):
        raise PromptError(f"the function of {place} must be a dict with a name, got {shown(function)}")
    for field in function:
        if field not in _FUNCTION_FIELDS:
            raise PromptError(
                f"the function of {place} has {shown(field)}, which is not supported: it has a name, a description "
                "and parameters"
            )
    name, description = function.get("name"), function.get("description")
    check_function_name(name, f"the function of {place}")
    if description is not None and not isinstance(description, str):
        raise PromptError(f"the description of {place} must be a text, got {shown(description)}")
    for field in ("parameters", "return"):
        if not isinstance(function.get(field, {}), Mapping | None):
            raise PromptError(f"the {field} of {place} must be a JSON schema as a dict, got {shown(function[field])}")
    plain = plain_json(tool, place)
    assert isinstance(plain, dict)
    return plain


def check_function_name(name: object, place: str) -> None:
    """Raise PromptError, which calls the declaration or the call `place`, unless `name` is one of a function."""
    if not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name):
        raise PromptError(f"the name of {place} must be {_NAME_WORDS}, got {shown(name)}")


def checked_arguments(arguments: object, place: str) -> dict[str, Any]:
    """The arguments of a call, a JSON object as a text or a dict, as a dict of plain values; an empty text means none.

    Raises PromptError if they are something else.
    """
    if isinstance(arguments, str):
        if len(arguments) > MAX_TOOL_CHARACTERS:
            raise PromptError(
                f"the arguments of {place} have {len(arguments):,} characters, more than {MAX_TOOL_CHARACTERS:,}"
            )
        check_text(arguments, f"the arguments of {place}")
        try:
            arguments = parse_json(arguments.encode()) if arguments.strip() else {}
        except StrictJsonError as error:
            raise PromptError(f"the arguments of {place} are no JSON object: the text {error}") from None
    if not isinstance(arguments, Mapping):
        raise PromptError(f"the arguments of {place} must be a JSON object, got {shown(arguments)}")
    plain = plain_json(arguments, f"the arguments of {place}")
    assert isinstance(plain, dict)
    return plain


def plain_json(value: object, place: str) -> object:
    """A copy of `value`, which messages call `place`, of dicts, lists, texts, numbers, truth values and None alone.

    Raises PromptError if there is something else in it, or if it is nested too deeply or has too many values.
    """
    left = MAX_TOOL_CHARACTERS

    def copied(value: object, depth: int) -> object:
        nonlocal left
        left -= 1
        if left < 0:
            raise PromptError(f"{place} has more than {MAX_TOOL_CHARACTERS:,} values")
        if depth > MAX_JSON_DEPTH:
            raise PromptError(f"{place} is nested deeper than {MAX_JSON_DEPTH} levels")
        if isinstance(value, str):
            check_text(value, f"a text in {place}")
            return str(value)
        if value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
            return value
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str):
                    raise PromptError(f"{place} has the field {shown(key)}: names of fields must be texts")
                check_text(key, f"a field's name in {place}")
            return {str(key): copied(item, depth + 1) for key, item in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
            return [copied(item, depth + 1) for item in value]
        raise PromptError(f"{place} has {shown(value)}, which is no value of JSON")

    return copied(value, 0)


def chosen_function(choice: ToolChoice) -> str | None:
    """The name of the function that `choice` names; None for one of the words. Raises ConfigError if it is neither."""
    if isinstance(choice, str) and choice in ("auto", "none", "required"):
        return None
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) and set(function) == {"name"} else None
    if not isinstance(name, str) or not isinstance(choice, Mapping) or len(choice) != 2:
        raise ConfigError(
            'tool_choice must be "auto", "none", "required" or {"type": "function", "function": {"name": ...}}, '
            f"got {shown(choice)}"
        )
    return name
