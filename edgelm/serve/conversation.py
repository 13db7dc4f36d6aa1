"""What chats and responses share: their messages, and log-probabilities in the shape of OpenAI's chats."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, Field, StringConstraints

from edgelm.errors import BundleError
from edgelm.scoring.results import TokenLogprob, TokenLogprobs
from edgelm.serve.call import Call
from edgelm.serve.errors import ApiError
from edgelm.serve.fields import Text
from edgelm.serve.limits import MAX_METADATA, MAX_PARTS, MAX_PROMPT_CHARACTERS
from edgelm.serve.strict import NO_EFFECT, OnlyFalse, StrictBody, in_words, unsupported
from edgelm.text.messages import ChatMessage
from edgelm.text.tools import Tool

Result = TypeVar("Result")

ShortText = Annotated[str, StringConstraints(max_length=1024)]
Metadata = Annotated[
    dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]],
    Field(max_length=MAX_METADATA),
]

TEXT_ONLY = "these models read and write text only"
NO_TOOLS = "this server has no tools of its own"
NO_EFFORT = "these models have one level of effort"
NO_MODERATION = "this server judges no texts"
NOTHING_STORED = "this server stores nothing"
_ALWAYS_REUSED = "every prompt is reused as far as it is the same"

Nothing = Annotated[list[None], Field(max_length=0)] | None
"""Null or an empty list."""
NoAnnotations = Annotated[Nothing, in_words(f"an empty list: {TEXT_ONLY}")]


class ConversationFields(StrictBody):
    """Fields of chats and responses that change nothing here, or that edgelm does not support."""

    parallel_tool_calls: bool | None = Field(
        default=None, description="Whether an answer may call several functions; true by default."
    )
    store: OnlyFalse | None = Field(default=None, description=NO_EFFECT + "nothing is ever stored.")
    prompt_cache_key: ShortText | None = Field(
        default=None, description=NO_EFFECT + "prompts of one API key are reused as far as they are the same."
    )
    prompt_cache_retention: Literal["in_memory"] | None = Field(
        default=None, description=NO_EFFECT + "prompts are kept in memory only."
    )
    safety_identifier: ShortText | None = Field(default=None, description=NO_EFFECT + "nothing is counted by user.")
    service_tier: Literal["auto", "default"] | None = Field(default=None, description=NO_EFFECT + "there is one tier.")
    moderation: None = unsupported(NO_MODERATION)
    prompt_cache_options: None = unsupported(_ALWAYS_REUSED)


class TextPart(StrictBody):
    """A part of a message; each route has kinds of its own."""

    text: Text
    prompt_cache_breakpoint: None = unsupported(_ALWAYS_REUSED)


Part = TypeVar("Part", bound=TextPart)
Content = Annotated[
    Text | Annotated[list[Part], Field(min_length=1, max_length=MAX_PARTS)],
    in_words(f"a text of at most {MAX_PROMPT_CHARACTERS:,} characters, or a list of 1 to {MAX_PARTS} text parts"),
    Field(description="A text, or parts of text, which are joined by line breaks."),
]


class TokenBytes(BaseModel):
    """A token with its log-probability."""

    token: str
    bytes: list[int] | None
    """UTF-8; null where the token is a part of a character."""
    logprob: float


class TokenWithTop(TokenBytes):
    """A token with the likeliest tokens at its place, likeliest first."""

    top_logprobs: list[TokenBytes]


def token_logprobs(tokens: Sequence[TokenLogprobs]) -> list[TokenWithTop]:
    """`tokens` in the shape of OpenAI's chats."""
    return [
        TokenWithTop(
            token=token.text,
            bytes=_bytes(token),
            logprob=token.logprob,
            top_logprobs=[TokenBytes(token=one.text, bytes=_bytes(one), logprob=one.logprob) for one in token.top],
        )
        for token in tokens
    ]


def _bytes(token: TokenLogprob) -> list[int] | None:
    return None if "\N{REPLACEMENT CHARACTER}" in token.text else list(token.text.encode())


def message_of(role: str, content: str | Sequence[TextPart] | None, name: str | None = None) -> ChatMessage:
    """A message for the template: its parts on lines of their own, and "developer" by its older name "system"."""
    text = content if content is None or isinstance(content, str) else "\n".join(part.text for part in content)
    message = ChatMessage(role="system" if role == "developer" else role, content=text)
    if name is not None:
        message["name"] = name
    return message


async def prompt_of(call: Call, messages: Sequence[ChatMessage], field: str, tools: Sequence[Tool] = ()) -> list[int]:
    """The token ids of a conversation that came as `field`. Raises ApiError, and as `Model.chat_prompt`."""
    characters = sum(map(_characters, messages))
    if characters > MAX_PROMPT_CHARACTERS:
        raise ApiError(400, f"{field} has {characters:,} characters, more than {MAX_PROMPT_CHARACTERS:,}", param=field)
    return await with_template(partial(call.model.chat_prompt, messages, tools=tools), field)


async def with_template(function: Callable[[], Result], field: str) -> Result:
    """``function()``, which uses the bundle's template, in a thread. Raises ApiError for `field`, if it is unusable."""
    try:
        return await asyncio.to_thread(function)
    except BundleError as error:  # its template cannot be used, but everything else can
        raise ApiError(400, str(error), param=field, code="unusable_chat_template") from None


def _characters(message: ChatMessage) -> int:
    calls = [call["function"] for call in message.get("tool_calls", ())]
    called = sum(len(call["name"]) + len(str(call["arguments"])) for call in calls)
    return len(str(message.get("content") or "")) + called
