"""Conversations with tools become the ids of transformers' ``apply_chat_template(tools=...)``."""

import copy
import json
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast
from transformers.utils import get_json_schema

from edgelm.text.chat import ChatFormat
from edgelm.text.messages import ChatMessage
from edgelm.text.tools import Tool
from tests.text.chat_templates import assistant, user
from tests.text.tool_templates import (
    CLOCK,
    ONE_CALL,
    TOOL_CONVERSATIONS,
    TOOL_TEMPLATES,
    TOOLS,
    TWO_CALLS,
    WEATHER,
    WITH_SYSTEM,
    tool_template,
    tool_tokenizer,
)

pytestmark = pytest.mark.export

NO_TEXT = {"thinking": "", "hermes": None, "llama": None, "mistral": None, "deepseek": None}
"""What each template takes as the content of an answer that has calls only; SmolLM3's writes no calls."""
TAKES_SYSTEM = ("hermes", "thinking", "llama")


@pytest.fixture(scope="module", params=["gpt2", "qwen", "llama", "gemma"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return tool_tokenizer(request.param)


def expected_ids(tokenizer: Any, template: str, messages: list[ChatMessage], tools: list[Tool]) -> list[int]:
    source = PreTrainedTokenizerFast(
        tokenizer_object=Backend.from_str(tokenizer.json),
        chat_template=TOOL_TEMPLATES[template],
        bos_token="<s>",
        eos_token="</s>",
    )
    own: Any = copy.deepcopy(messages)
    for message in own:
        if message["content"] is None:
            message["content"] = NO_TEXT[template]
    return list(source.apply_chat_template(own, tools=tools, add_generation_prompt=True))


def conversations(template: str) -> dict[str, list[ChatMessage]]:
    more = {} if template in ONE_CALL else {"two": TWO_CALLS}
    return {**TOOL_CONVERSATIONS, **more, **({"system": WITH_SYSTEM} if template in TAKES_SYSTEM else {})}


@pytest.mark.parametrize("template", NO_TEXT)
def test_ids_are_those_of_transformers(tokenizer: Any, template: str) -> None:
    chat = ChatFormat(tool_template(template), tokenizer.tokenizer)
    for name, messages in conversations(template).items():
        for tools in (TOOLS, [CLOCK], [WEATHER]):
            expected = expected_ids(tokenizer, template, messages, tools)
            assert chat.ids(messages, tools=tools) == expected, name


@pytest.mark.parametrize("template", NO_TEXT)
def test_arguments_may_be_texts(tokenizer: Any, template: str) -> None:
    """As OpenAI's API has them; transformers wants dicts."""
    chat = ChatFormat(tool_template(template), tokenizer.tokenizer)
    for messages in conversations(template).values():
        as_texts: Any = copy.deepcopy(messages)
        for message in as_texts:
            for call in message.get("tool_calls", []):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        assert chat.ids(as_texts, tools=TOOLS) == chat.ids(messages, tools=TOOLS)


def area(width: float, depth: "int | None" = None, kinds: "list[str]" = []) -> str:  # noqa: B006
    """
    The area of a room.

    Args:
        width: How wide it is.
        depth: How deep it is.
        kinds: What it is for. (choices: ["bath", "bed"])

    Returns:
        The area in words.
    """
    return ""


def test_functions_as_transformers_describes_them(tokenizer: Any) -> None:
    described: Tool = get_json_schema(area)
    chat = ChatFormat(tool_template("hermes"), tokenizer.tokenizer)
    messages = TOOL_CONVERSATIONS["asked"]
    assert chat.ids(messages, tools=[described]) == expected_ids(tokenizer, "hermes", messages, [described])


def test_the_template_for_tools_is_taken() -> None:
    """As transformers, a template of the name tool_use, where there are tools."""
    tokenizer = tool_tokenizer("qwen")
    templates = {"default": "{{ messages[0].content }}", "tool_use": TOOL_TEMPLATES["hermes"]}
    source = PreTrainedTokenizerFast(tokenizer_object=Backend.from_str(tokenizer.json), chat_template=templates)
    template = tool_template("hermes")
    template.templates.update(templates)
    chat = ChatFormat(template, tokenizer.tokenizer)
    messages: Any = TOOL_CONVERSATIONS["asked"]
    for tools in (TOOLS, None):
        assert chat.ids(messages, tools=tools) == source.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True
        )
    with pytest.raises(Exception, match="knows no tools"):
        chat.ids(TOOL_CONVERSATIONS["answered"])


@pytest.mark.parametrize("template", NO_TEXT)
def test_without_tools_the_ids_are_those_of_transformers(tokenizer: Any, template: str) -> None:
    chat = ChatFormat(tool_template(template), tokenizer.tokenizer)
    source = PreTrainedTokenizerFast(
        tokenizer_object=Backend.from_str(tokenizer.json),
        chat_template=TOOL_TEMPLATES[template],
        bos_token="<s>",
        eos_token="</s>",
    )
    messages: Any = [user("a"), assistant("b"), user("c")]
    assert chat.ids(messages) == source.apply_chat_template(messages, add_generation_prompt=True)
    assert chat.ids(messages, tools=[]) == chat.ids(messages)
