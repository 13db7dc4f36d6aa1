"""How chats become examples: each answer is one, and its prompt is all before it, as the runtime will write it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelm.errors import TrainingError
from edgelm.text.chat import ChatFormat
from edgelm.text.messages import ChatMessage
from edgelm.text.plain_chat import PlainChatFormat, PlainForm
from edgelm_recipes.recipe import Row, Turns

if TYPE_CHECKING:
    from edgelm_export.source.checkpoint import Checkpoint

PLAIN: PlainForm = "labels"
"""The plain form (docs/chat.md) in which bases without a chat template learn."""
OF_TEMPLATE = "chat template"


@dataclass(frozen=True)
class ChatForm:
    """How a chat is written for a base: by its chat template, or in a plain form."""

    name: str
    prompt: Callable[[Sequence[ChatMessage]], str]
    """All before an answer, and its beginning."""
    before: str
    """Between that beginning and the answer's first word."""
    after: str
    """Behind the answer, before the token that ends it."""

    @classmethod
    def of(cls, checkpoint: "Checkpoint") -> "ChatForm":
        """The form of the checkpoint's chat template; the plain form where it has none.

        Raises:
            TrainingError: training would encode what the template writes in other tokens than the runtime.
        """
        tokenizer = checkpoint.tokenizer
        if checkpoint.chat_template is None:
            return cls(PLAIN, PlainChatFormat(PLAIN, tokenizer).text, " ", "\n")
        chat = ChatFormat(checkpoint.chat_template, tokenizer)
        messages: list[ChatMessage] = [{"role": "user", "content": "Hi"}]
        if tokenizer.encode_prompt(chat.text(messages)) != chat.ids(messages):
            raise TrainingError(
                f"the chat template of {checkpoint.name!r} writes the token that begins a text, which training adds "
                "itself; give a base without a chat template"
            )
        return cls(OF_TEMPLATE, chat.text, "", "")

    def written(self, chat: Turns) -> list[Row]:
        """A row for each answer of a chat: "prompt" and "completion", the answer alone, and the message before it."""
        messages: list[ChatMessage] = [
            {"role": "assistant" if number % 2 else "user", "content": turn} for number, turn in enumerate(chat)
        ]
        return [
            {
                "prompt": self.prompt(messages[:number]),
                "completion": f"{self.before}{chat[number]}{self.after}",
                "answer": f"{self.before}{chat[number]}",
                "message": chat[number - 1],
            }
            for number in range(1, len(chat), 2)
        ]
