"""Whether the runtime writes conversations as transformers does: only then does a bundle get the chat template."""

import logging
from datetime import datetime
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from edgelm.bundle.chat_template import ChatTemplate
from edgelm.errors import BundleError, PromptError
from edgelm.text.chat import ChatFormat
from edgelm.text.messages import CalledFunction, ChatMessage
from edgelm.text.tokenizer import Tokenizer
from edgelm.text.tools import Tool

_log = logging.getLogger(__name__)

_WEATHER: Tool = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather <now> & here.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Größe"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
_CITY = "Urumqi"
_CALLED: CalledFunction = {"name": "get_weather", "arguments": {"city": _CITY, "why": "Größe"}}
_CALL: ChatMessage = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "call12345", "type": "function", "function": _CALLED}],
}


def _turns(count: int) -> list[ChatMessage]:
    roles = ("user", "assistant")
    return [{"role": roles[turn % 2], "content": f"Turn {turn}."} for turn in range(count)]


CONVERSATIONS: dict[str, tuple[list[ChatMessage], list[Tool]]] = {
    "a question": ([{"role": "user", "content": "What is the capital of France?"}], []),
    "a system message": ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}], []),
    "many turns": (_turns(11), []),
    "many turns behind a system message": ([{"role": "system", "content": "Count."}, *_turns(7)], []),
    "an empty message": ([{"role": "user", "content": ""}], []),
    "blanks and line ends": ([{"role": "user", "content": "  one\n\n\ttwo \r\n"}, *_turns(3)[1:]], []),
    "other scripts": ([{"role": "user", "content": "Grüße 今日は שלום 🎉 e\u0301"}], []),
    "quotes, braces and tags": ([{"role": "user", "content": "{{ 'a' }} {% \"b\" %} <b> & \\n </b>"}], []),
    "tools": ([{"role": "user", "content": "How is the weather?"}], [_WEATHER]),
    "a call and its result": (
        [
            {"role": "user", "content": "How is the weather?"},
            _CALL,
            {"role": "tool", "tool_call_id": "call12345", "name": "get_weather", "content": '{"sky": "grau"}'},
        ],
        [_WEATHER],
    ),
}
"""Messages and tools by a name for people."""


def chat_difference(template: ChatTemplate, tokenizer: Tokenizer) -> str | None:
    """Which of ten conversations the runtime writes otherwise than transformers, in words; None for no such one.

    Where the template refuses a conversation, both must refuse it. Some templates leave calls out without a word. There
    the runtime refuses calls, or writes them into the answer's text, and neither counts as a difference.
    """
    try:
        chat = ChatFormat(template, tokenizer)
    except PromptError as error:
        return str(error)
    for name, (messages, tools) in CONVERSATIONS.items():
        expected = _of_transformers(template, messages, tools)
        if expected is not None and _CALL in messages and _CITY not in expected:
            continue
        try:
            found = chat.text(messages, tools=tools, now=datetime.now())
        except (PromptError, BundleError) as error:
            if expected is None or tools:
                continue
            return f"edgelm cannot write the conversation {name!r}: {error}"
        if expected is None:
            return f"edgelm writes the conversation {name!r}, and transformers fails"
        if found != expected:
            pairs = enumerate(zip(found, expected, strict=False))
            place = next((i for i, (a, b) in pairs if a != b), min(len(found), len(expected)))
            ours, theirs = found[place : place + 20], expected[place : place + 20]
            return f"edgelm writes {ours!r} in the conversation {name!r}, transformers {theirs!r}"
    return None


def _of_transformers(template: ChatTemplate, messages: list[ChatMessage], tools: list[Tool]) -> str | None:
    """What transformers writes; None where it fails."""
    name = "tool_use" if tools and "tool_use" in template.templates else "default"
    # SmolLM3's template takes tools under another name, which its users give to transformers themselves.
    variable = "xml_tools" if "xml_tools" in template.templates[name] else "tools"
    conversation: list[dict[str, Any]] = [dict(message) for message in messages]
    try:
        texts, _ = render_jinja_template(
            conversations=[conversation],
            chat_template=template.templates[name],
            add_generation_prompt=True,
            **{**template.special_tokens, variable: tools or None},
        )
    except Exception as error:  # a template may fail in any way, and transformers passes that on
        _log.debug("transformers cannot write this conversation", exc_info=error)
        return None
    text: str = texts[0]
    return text
