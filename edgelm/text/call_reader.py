"""Splits a text that obeys a `ToolUse`, as it comes, into free text and complete calls."""

import re
import secrets
import string
from collections import deque

from edgelm.text.call_syntax import ID_PATTERN, ID_PLACE
from edgelm.text.constraints import ToolUse
from edgelm.text.stop_strings import TextPiece
from edgelm.text.tools import ToolCall

_ALPHANUMERIC = string.ascii_letters + string.digits
_ID_CHARACTERS = 9


class CallReader:
    """Reads one text. What is begun and never completed, because the text is cut off, comes as text at the end."""

    def __init__(self, use: ToolUse) -> None:
        syntax = use.syntax
        self.made_calls = False
        """Whether a complete call was read."""
        self._use = use
        self._held = ""  # text that was not handed out
        self._held_start = 0  # where it begins in the whole text, in characters
        self._end = 0
        self._gaps: list[int] = []  # places of tokens without text
        self._waiting: deque[tuple[int, int]] = deque()  # tokens not handed out, each with the end of its text
        self._in_calls = use.choice == "required"
        begin = syntax.begin if self._in_calls else syntax.begin_in_text
        self._heads = [(name, re.compile(_pattern(begin + name + syntax.middle))) for name, _ in use.functions]
        self._further_heads = [
            (name, re.compile(_pattern((syntax.between or "") + name + syntax.middle))) for name, _ in use.functions
        ]
        self._close = re.compile(_pattern(syntax.close))
        self._scan = _ObjectScan()
        self._head: re.Match[str] | None = None
        self._name = ""

    def gap(self) -> None:
        """Note that a token without text stands here: what is around it spells no marker."""
        self._gaps.append(self._end)

    def push(self, piece: TextPiece) -> tuple[TextPiece, tuple[ToolCall, ...]]:
        """Take the next piece; returns the free text and the calls that are certain now.

        The ids are those of the tokens whose text they complete.
        """
        self._held += piece.text
        self._end += len(piece.text)
        self._waiting.extend((token, self._end) for token in piece.token_ids)
        text = "" if self._in_calls else self._free_text()
        calls = self._calls() if self._in_calls else []
        return TextPiece(text, self._ready()), tuple(calls)

    def finish(self, piece: TextPiece) -> tuple[TextPiece, tuple[ToolCall, ...]]:
        """Take the last piece: nothing is held back any more."""
        last, calls = self.push(piece)
        rest = "" if self.made_calls and self._use.syntax.end.startswith(self._held) else self._held
        self._held = ""
        tokens = tuple(token for token, _ in self._waiting)
        self._waiting.clear()
        return TextPiece(last.text + rest, last.token_ids + tokens), calls

    def _free_text(self) -> str:
        """Hand out text in which no call can have begun."""
        if self._use.choice == "none":
            return self._release(len(self._held))
        syntax = self._use.syntax
        if not syntax.marker:  # a call is the whole answer
            if self._held_start:
                return self._release(len(self._held))
            if self._is_whole(0, syntax.begin):
                self._in_calls = True
                return ""
            return "" if syntax.begin.startswith(self._held) else self._release(len(self._held))
        found = self._held.find(syntax.marker)
        while found >= 0 and not self._is_whole(found, syntax.marker):
            found = self._held.find(syntax.marker, found + 1)
        if found >= 0:
            self._in_calls = True
            return self._release(found)
        longest = min(len(self._held), len(syntax.marker) - 1)
        begun = next((n for n in range(longest, 0, -1) if syntax.marker.startswith(self._held[-n:])), 0)
        return self._release(len(self._held) - begun)

    def _is_whole(self, start: int, text: str) -> bool:
        """Whether `text` is held at `start`, without a gap inside."""
        place = self._held_start + start
        return self._held.startswith(text, start) and not any(place < gap < place + len(text) for gap in self._gaps)

    def _calls(self) -> list[ToolCall]:
        """Hand out the calls that are complete."""
        calls = list[ToolCall]()
        while True:
            if self._head is None:
                heads = self._further_heads if self.made_calls else self._heads
                found = ((name, pattern.match(self._held)) for name, pattern in heads)
                self._name, self._head = next(((name, head) for name, head in found if head), ("", None))
                if self._head is None:
                    return calls
                self._scan = _ObjectScan(self._head.end())
            stop = self._scan.end_in(self._held)
            close = None if stop is None else self._close.match(self._held, stop)
            if close is None:
                return calls
            id_ = next((id_ for id_ in (*self._head.groups(), *close.groups()) if id_), None)
            calls.append(ToolCall(id_ or new_call_id(), self._name, self._held[self._head.end() : stop]))
            self._release(close.end())
            self.made_calls, self._head = True, None

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        self._held_start += length
        return text

    def _ready(self) -> tuple[int, ...]:
        """The tokens whose text was handed out."""
        ready = []
        while self._waiting and self._waiting[0][1] <= self._held_start:
            ready.append(self._waiting.popleft()[0])
        return tuple(ready)


class _ObjectScan:
    """Finds the end of a JSON object in a text that grows, from `start` on, and looks at each character once."""

    def __init__(self, start: int = 0) -> None:
        self._place, self._depth, self._in_string = start, 0, False
        self._stop: int | None = None

    def end_in(self, text: str) -> int | None:
        """Where the object ends; None if it does not yet."""
        while self._stop is None and self._place < len(text):
            character = text[self._place]
            self._place += 1
            if self._in_string:
                if character == "\\":
                    self._place += 1  # whatever is escaped
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    self._stop = self._place
        return self._stop


def new_call_id() -> str:
    """An id for a call in whose syntax the model writes none."""
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(_ID_CHARACTERS))


def _pattern(text: str) -> str:
    return f"({ID_PATTERN})".join(map(re.escape, text.split(ID_PLACE)))
