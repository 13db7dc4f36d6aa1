"""A conversation: its turns, the part of them that fits into the model's context, and its file."""

import json
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Self

from edgelm.bundle.small_files import SmallFileError, read_small_file, status_of
from edgelm.bundle.strict_json import Between, StrictJsonError, from_json, parse_json
from edgelm.bundle.whole_file import write_whole_file
from edgelm.errors import ContextError, EdgelmError
from edgelm.text.messages import MAX_CHAT_CHARACTERS, MAX_MESSAGES, ChatMessage

MAX_FILE_BYTES = 8 * 2**20
KEPT_SHARE = 0.75
"""The share of a full context that stays when turns are dropped. The rest is computed again after that, so enough turns
go to leave room for several new ones."""

Encode = Callable[[list[ChatMessage]], list[int]]
"""Token ids of messages, up to where the answer begins."""

_Text = Annotated[str, Between(0, MAX_CHAT_CHARACTERS)]


class ConversationFileError(EdgelmError):
    """A conversation cannot be saved, or a file is no saved conversation."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What the user said, and the answer."""

    user: _Text
    assistant: _Text


@dataclass(frozen=True, slots=True)
class _File:
    """The content of a conversation's file."""

    edgelm_conversation: Annotated[int, Between(1, 1)]
    """The version of the format."""
    system: _Text | None
    turns: tuple[Turn, ...]


class Conversation:
    """Turns, oldest first.

    Attributes:
        system: the system message, which is never dropped; None for none.
        turns: all turns.
        dropped: how many of the oldest turns the model no longer sees. They never come back into the context, because
            the keys and values behind them would be computed anew each time.
    """

    def __init__(self, system: str | None = None, turns: tuple[Turn, ...] = ()) -> None:
        self.system = system
        self.turns = list(turns)
        self.dropped = 0

    def prompt(self, user: str, encode: Encode, *, context_tokens: int, answer_tokens: int) -> list[int]:
        """Token ids of the conversation with `user` as its newest message, and room for an answer where possible.

        Where the context of `context_tokens` has no room for `answer_tokens` more (or half of it), the oldest turns are
        dropped until `KEPT_SHARE` of the rest is taken.

        Raises ContextError if the message would not fit without any earlier turn, and as `encode`. Nothing is dropped
        then.
        """
        room = context_tokens - min(answer_tokens, context_tokens // 2)
        begin = self._first_within_limits(user)
        ids = encode(self._messages(user, begin))
        if len(ids) > room:
            goal = int(room * KEPT_SHARE)
            counts = range(begin, len(self.turns))
            begin += bisect_left(counts, True, key=lambda count: len(encode(self._messages(user, count))) <= goal)
            ids = encode(self._messages(user, begin))
        if len(ids) >= context_tokens:
            raise ContextError(
                f"the message takes {len(ids):,} tokens, with the system message, but the context has "
                f"{context_tokens:,}: shorten it"
            )
        self.dropped = begin
        return ids

    def add(self, turn: Turn) -> None:
        """Put a turn at the end."""
        self.turns.append(turn)

    def take_back(self) -> Turn | None:
        """Remove the last turn and return it; None if the model sees no turn any more."""
        return self.turns.pop() if len(self.turns) > self.dropped else None

    def save(self, path: Path) -> None:
        """Write the conversation to the file `path`, whole or not at all; only another conversation is replaced.

        Raises ConversationFileError if it cannot be written, is too long to be read again, or replaces another file.
        """
        content = _File(1, self.system, tuple(self.turns))
        data = f"{json.dumps(asdict(content), ensure_ascii=False, indent=1)}\n".encode()
        if len(data) > MAX_FILE_BYTES:
            raise ConversationFileError(
                f"the conversation would be a file of {len(data):,} bytes, more than the {MAX_FILE_BYTES:,} that are "
                "read again: begin a new one with /reset"
            )
        if status_of(path) is not None:
            try:
                self.read(path)
            except ConversationFileError:
                raise ConversationFileError(
                    f"{str(path)!r} is another file, not a conversation: give a new name"
                ) from None
        try:
            write_whole_file(path, data)
        except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
            raise ConversationFileError(
                f"cannot write {str(path)!r}: {getattr(error, 'strerror', None) or error}"
            ) from None

    @classmethod
    def read(cls, path: Path) -> Self:
        """The conversation in the file `path`. Raises ConversationFileError if it holds none, or cannot be read."""
        try:
            content = from_json(_File, parse_json(read_small_file(path, MAX_FILE_BYTES)))
        except (SmallFileError, StrictJsonError) as error:
            raise ConversationFileError(f"{str(path)!r} is no saved conversation: it {error}") from None
        except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
            raise ConversationFileError(
                f"cannot read {str(path)!r}: {getattr(error, 'strerror', None) or error}"
            ) from None
        for text in (content.system or "", *(text for turn in content.turns for text in (turn.user, turn.assistant))):
            if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
                raise ConversationFileError(
                    f"{str(path)!r} is no saved conversation: it has half of a character (a surrogate)"
                )
        return cls(content.system, content.turns)

    def _messages(self, user: str, begin: int) -> list[ChatMessage]:
        """The system message, the turns from `begin` on, and `user`."""
        messages = [] if self.system is None else [ChatMessage(role="system", content=self.system)]
        for turn in self.turns[begin:]:
            messages += [
                ChatMessage(role="user", content=turn.user),
                ChatMessage(role="assistant", content=turn.assistant),
            ]
        return [*messages, ChatMessage(role="user", content=user)]

    def _first_within_limits(self, user: str) -> int:
        """The first turn that may be encoded: a chat format refuses conversations beyond its limits."""
        characters = MAX_CHAT_CHARACTERS - len(user) - len(self.system or "")
        begin = len(self.turns)
        least = max(self.dropped, len(self.turns) - (MAX_MESSAGES - 2) // 2)
        while begin > least:
            turn = self.turns[begin - 1]
            characters -= len(turn.user) + len(turn.assistant)
            if characters < 0:
                break
            begin -= 1
        return begin
