"""Conversations with a model that has no chat template, in a plain form that the caller chooses."""

from collections.abc import Sequence
from datetime import datetime
from typing import Literal

from edgelm.bundle.chat_template import ChatTemplate
from edgelm.text.call_syntax import TemplateTools
from edgelm.text.chat import ChatFormat, Tools
from edgelm.text.messages import ChatMessage, Message
from edgelm.text.tokenizer import Tokenizer
from edgelm.text.tools import Tool

PlainForm = Literal["lines", "labels"]
"""How a conversation is written. "lines": every message is a line. "labels": "User:" and "Assistant:" stand before it.

A model that was trained on chats of lines (models/dialogue-6m-int8) continues lines; one that was trained on all kinds
of text knows labels.
"""

_LABELS = {"system": "", "user": "User: ", "assistant": "Assistant: "}
_STOP_STRINGS: dict[PlainForm, tuple[str, ...]] = {"lines": ("\n",), "labels": ("\nUser:",)}


class PlainChatFormat(ChatFormat):
    """A plain form and a tokenizer, with the methods of `ChatFormat`. No text has a special token but the beginning."""

    def __init__(self, form: PlainForm, tokenizer: Tokenizer) -> None:
        super().__init__(ChatTemplate({"default": ""}, {}), tokenizer)
        self._form: PlainForm = form
        self._begin = tokenizer.encode_prompt("")
        self.stop_strings = _STOP_STRINGS[form]
        """Where an answer ends, because the model would begin the next message."""

    def ids(
        self, messages: Sequence[ChatMessage], *, tools: Sequence[Tool] | None = None, now: datetime | None = None
    ) -> list[int]:
        """The token ids of the conversation, as `ChatFormat.ids`; they begin like those of any text (BOS)."""
        return self._begin + super().ids(messages, tools=tools, now=now)

    def _render(self, messages: list[Message], now: datetime | None, declared: Tools, use: TemplateTools | None) -> str:
        texts = [(message["role"], _text(message)) for message in messages]
        if self._form == "lines":
            lines = [" ".join(text.split("\n")) for _, text in texts]
            return "".join(f"{line}\n" for line in lines if line)
        return "".join(f"{_LABELS.get(role, '')}{text}\n" for role, text in texts) + "Assistant:"


def _text(message: Message) -> str:
    content = message["content"]
    return (content if isinstance(content, str) else "\n".join(part["text"] for part in content)).strip()
