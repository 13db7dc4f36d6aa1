"""What Schemathesis (`SCHEMATHESIS_HOOKS`) does to bodies that it makes, so that more of them reach a model.

No JSON Schema can say how large a vocabulary is, and JSON Schema takes 5.0 for a whole number, which edgelm refuses as
OpenAI does: so token ids go into the vocabulary, and whole numbers lose their point. The bundle's chat template knows
no tools: they are left out where they are right. What is wrong in another way stays wrong.
"""

import re
from typing import Any

import schemathesis

VOCABULARY = 300
"""Of the tiny bundle."""
TOKENS = ("prompt", "input", "tokens", "continuation", "options", "calibrate")
"""Fields that may hold token ids."""


@schemathesis.hook  # type: ignore[untyped-decorator]
def map_body(context: Any, body: Any) -> Any:
    """A body of a request, changed as the file says."""
    if not isinstance(body, dict):
        return body
    body = {name: _without_point(value) for name, value in body.items()}
    body = _without_tools(body)
    return {name: _in_vocabulary(value) if name in TOKENS else value for name, value in body.items()}


def _without_tools(body: dict[str, Any]) -> dict[str, Any]:
    """The body without tools that are right."""
    messages, tools = body.get("messages"), body.get("tools")
    if isinstance(messages, list):
        body = body | {"messages": [_said(message) for message in messages]}
    if isinstance(tools, list) and all(map(_is_tool, tools)):
        body = {name: value for name, value in body.items() if name != "tools"}
    if body.get("tool_choice") == "required":
        body = body | {"tool_choice": "auto"}
    return body


def _is_tool(tool: Any) -> bool:
    function = tool.get("function", {}) if isinstance(tool, dict) else {}
    return (
        isinstance(function, dict)
        and set(tool) == {"type", "function"}
        and tool["type"] == "function"
        and set(function) <= {"name", "description"}
        and re.fullmatch("[a-zA-Z0-9_-]{1,64}", str(function.get("name", ""))) is not None
        and isinstance(function["name"], str)
        and isinstance(function.get("description", ""), str)
    )


def _said(message: Any) -> Any:
    """A message whose role is not that of a tool, and with a text, which may be missing beside calls only."""
    if not isinstance(message, dict):
        return message
    changed = {"role": "user"} if message.get("role") == "tool" else {}
    return message | changed | ({"content": "a"} if message.get("content") is None else {})


def _without_point(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_point(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _in_vocabulary(value: Any) -> Any:
    if isinstance(value, list):
        return [_in_vocabulary(item) for item in value]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        return value
    return value % VOCABULARY
