"""What chats and responses share: their messages, and log-probabilities in the shape of OpenAI's chats."""

import asyncio
from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, Field, StringConstraints

from edgelm.errors import BundleError
from edgelm.scoring.results import TokenLogprob, TokenLogprobs
from edgelm.serve.call import Call
from edgelm.serve.errors import ApiError
from edgelm.serve.limits import MAX_METADATA, MAX_PROMPT_CHARACTERS
from edgelm.serve.strict import in_words
from edgelm.text.chat import ChatMessage

ShortText = Annotated[str, StringConstraints(max_length=1024)]
Metadata = Annotated[
    dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]],
    Field(max_length=MAX_METADATA),
]

TEXT_ONLY = "these models read and write text only"
NO_TOOLS = "this server calls no tools"
NO_EFFORT = "these models have one level of effort"
NO_MODERATION = "this server judges no texts"
NOTHING_STORED = "this server stores nothing"

Nothing = Annotated[list[None], Field(max_length=0)] | None
"""Null or an empty list."""
NoAnnotations = Annotated[Nothing, in_words(f"an empty list: {TEXT_ONLY}")]


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


def message_of(role: str, texts: Sequence[str], name: str | None = None) -> ChatMessage:
    """A message for the template: its texts on lines of their own, and "developer" by its older name "system"."""
    message = ChatMessage(role="system" if role == "developer" else role, content="\n".join(texts))
    if name is not None:
        message["name"] = name
    return message


async def prompt_of(call: Call, messages: Sequence[ChatMessage], field: str) -> list[int]:
    """The token ids of a conversation that came as `field`. Raises ApiError, and as `Model.chat_prompt`."""
    characters = sum(len(str(message["content"])) for message in messages)
    if characters > MAX_PROMPT_CHARACTERS:
        raise ApiError(400, f"{field} has {characters:,} characters, more than {MAX_PROMPT_CHARACTERS:,}", param=field)
    try:
        return await asyncio.to_thread(call.model.chat_prompt, messages)
    except BundleError as error:  # its template cannot be used, but everything else can
        raise ApiError(400, str(error), param=field, code="unusable_chat_template") from None
