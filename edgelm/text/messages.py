"""The messages of a conversation: what they may hold, checked and copied as plain values."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NotRequired, TypedDict

from edgelm.errors import PromptError, shown
from edgelm.text.tokenizer import check_text
from edgelm.text.tools import MAX_TOOLS, check_function_name, checked_arguments

MAX_MESSAGES = 4_096
MAX_CHAT_CHARACTERS = 2**20
"""The longest conversation, in characters of all its messages."""

_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
_CALL_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")


class TextPart(TypedDict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class CalledFunction(TypedDict):
    """What a call calls."""

    name: str
    arguments: str | Mapping[str, Any]
    """A JSON object, as a text or as a dict."""


class MessageCall(TypedDict):
    """A call of a tool that the assistant made."""

    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: CalledFunction


class ChatMessage(TypedDict):
    """One message of a conversation."""

    role: str
    """Who speaks, a word that the template knows: "system", "user", "assistant", "tool"."""
    content: NotRequired[str | Sequence[TextPart] | None]
    """What is said. Parts reach the template as a list; not every template takes one. None, or nothing, only beside
    `tool_calls`."""
    name: NotRequired[str]
    """The speaker's name, for templates that write it."""
    tool_calls: NotRequired[Sequence[MessageCall]]
    """Calls that the assistant made, where the template has tools."""
    tool_call_id: NotRequired[str]
    """The call that a message of the role "tool" answers."""


Message = dict[str, Any]
"""A checked message: texts, and lists and dicts of plain values. The arguments of calls are dicts."""


def checked_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """A copy of `messages` of plain values.

    Raises PromptError if they are not a conversation of `MAX_MESSAGES` messages and `MAX_CHAT_CHARACTERS` characters at
    most, or have a field that is not supported.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise PromptError(f"messages must be a list of messages, got {type(messages).__name__}")
    if not messages:
        raise PromptError("messages is empty: give at least one message")
    if len(messages) > MAX_MESSAGES:
        raise PromptError(f"there are {len(messages):,} messages, more than {MAX_MESSAGES:,}: leave the oldest out")
    checked = [_checked(message, f"messages[{index}]") for index, message in enumerate(messages)]
    characters = sum(map(characters_of, checked))
    if characters > MAX_CHAT_CHARACTERS:
        raise PromptError(
            f"the messages have {characters:,} characters, more than {MAX_CHAT_CHARACTERS:,}: leave the oldest out"
        )
    return checked


def characters_of(message: Message) -> int:
    """How long a checked message is, with calls as JSON; its role does not count."""
    content, calls = message.get("content"), message.get("tool_calls")
    texts = [content] if isinstance(content, str) else [part["text"] for part in content or ()]
    texts += [message.get("name", ""), message.get("tool_call_id", "")]
    return sum(map(len, texts)) + (len(json.dumps(calls, ensure_ascii=False)) if calls else 0)


def uses_tools(message: Message) -> bool:
    """Whether a message is a call of tools or its result."""
    return message["role"] == "tool" or "tool_calls" in message


def said(values: object) -> Iterator[str]:
    """All texts in plain values but the names of fields; of messages also their roles."""
    if isinstance(values, str):
        yield values
    elif isinstance(values, (list, dict)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from said(value)


def field_names(values: object) -> Iterator[str]:
    """The names of all fields in plain values."""
    if isinstance(values, dict):
        yield from values
    if isinstance(values, (list, dict)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from field_names(value)


def translated(values: Any, translate: Callable[[str], str]) -> Any:
    """Plain values with all texts in them translated, but not the names of fields."""
    if isinstance(values, str):
        return translate(values)
    if isinstance(values, list):
        return [translated(value, translate) for value in values]
    if isinstance(values, dict):
        kind = values.get("type")
        changed = {name: translated(value, translate) for name, value in values.items()}
        return changed | {"type": kind} if kind in ("text", "function") else changed  # words of the program
    return values


def translated_messages(messages: Sequence[Message], translate: Callable[[str], str]) -> list[Message]:
    """Checked messages with what is said in them translated."""
    return [translated(message, translate) | {"role": message["role"]} for message in messages]


def _checked(message: object, place: str) -> Message:
    if not isinstance(message, Mapping):
        raise PromptError(f'{place} must be a dict with "role" and "content", got {type(message).__name__}')
    for name in message:
        if name not in ChatMessage.__annotations__:
            raise PromptError(f'{place} has {shown(name)}, which is not supported: a message has "role" and "content"')
    role = message.get("role")
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise PromptError(f'the role of {place} must be a word such as "user", got {shown(role)}')
    checked: Message = {"role": str(role)}
    calls = message.get("tool_calls")
    if calls is not None:
        checked["tool_calls"] = _checked_calls(role, calls, place)
    checked["content"] = _checked_content(message.get("content"), place, may_miss=bool(calls))
    for name in ("name", "tool_call_id"):
        value = message.get(name)
        if value is not None:
            if not isinstance(value, str):
                raise PromptError(f"the {name} of {place} must be a text, got {shown(value)}")
            checked[name] = _text(value, f"the {name} of {place}")
    if "tool_call_id" in checked:
        _check_call_id(checked["tool_call_id"], role == "tool", place)
    return {name: checked[name] for name in [*message, "content"] if name in checked}  # in the caller's order


def _check_call_id(value: str, answers: bool, place: str) -> None:
    if not answers:
        raise PromptError(f'{place} has a tool_call_id, which is for messages of the role "tool"')
    _checked_id(value, f"the tool_call_id of {place}")


def _checked_content(content: object, place: str, *, may_miss: bool) -> object:
    if content is None and may_miss:
        return None
    if isinstance(content, str):
        return _text(content, f"the content of {place}")
    if isinstance(content, Sequence) and not isinstance(content, bytes):
        return [_part(part, f"{place}.content[{index}]") for index, part in enumerate(content)]
    raise PromptError(f"the content of {place} must be a text or a list of text parts, got {shown(content)}")


def _checked_calls(role: str, calls: object, place: str) -> list[dict[str, Any]]:
    if role != "assistant":
        raise PromptError(f"{place} has tool_calls, but only the assistant calls tools")
    if not isinstance(calls, Sequence) or isinstance(calls, (str, bytes)) or not calls:
        raise PromptError(f"the tool_calls of {place} must be a list of one call at least, got {shown(calls)}")
    if len(calls) > MAX_TOOLS:
        raise PromptError(f"{place} has {len(calls):,} tool_calls, more than {MAX_TOOLS}")
    return [_checked_call(call, f"{place}.tool_calls[{index}]") for index, call in enumerate(calls)]


def _checked_call(call: object, place: str) -> dict[str, Any]:
    if not isinstance(call, Mapping) or not set(call) <= {"id", "type", "function"}:
        raise PromptError(f'{place} must be {{"id": ..., "type": "function", "function": ...}}, got {shown(call)}')
    function = call.get("function")
    if not isinstance(function, Mapping) or set(function) != {"name", "arguments"}:
        raise PromptError(f'the function of {place} must be a dict with "name" and "arguments", got {shown(function)}')
    if call.get("type", "function") != "function":
        raise PromptError(f'the type of {place} must be "function", got {shown(call["type"])}')
    check_function_name(function["name"], place)
    checked: dict[str, Any] = {
        "type": "function",
        "function": {
            name: str(value) if name == "name" else checked_arguments(value, place) for name, value in function.items()
        },
    }
    if "id" in call:
        checked["id"] = _checked_id(call["id"], f"the id of {place}")
    return {name: checked[name] for name in call}


def _checked_id(value: object, place: str) -> str:
    if not isinstance(value, str) or not _CALL_ID.fullmatch(value):
        raise PromptError(f"{place} must be 1 to 64 letters, digits, _ and -, got {shown(value)}")
    return str(value)


def _part(part: object, place: str) -> TextPart:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, Mapping) else part
        raise PromptError(f'{place} must be {{"type": "text", "text": ...}}, got {shown(kind)}: only text is supported')
    text = part.get("text")
    if not isinstance(text, str) or len(part) > 2:
        raise PromptError(f'{place} must have a "text" and nothing else besides its type, got {shown(dict(part))}')
    return TextPart(type="text", text=_text(text, place))


def _text(text: str, place: str) -> str:
    check_text(text, place)
    return str(text)
