"""From a stream of tokens to a stream of text: whole characters only, and never a part of a stop string."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Decoder(Protocol):
    """What this module needs of `edgelm.text.tokenizer.StreamDecoder`."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


@dataclass(frozen=True, slots=True)
class TextPiece:
    """Text that is certain now, and the tokens it completes."""

    text: str
    token_ids: tuple[int, ...]


class TextStream:
    """Joins a stream decoder with stop strings that may begin and end anywhere inside tokens."""

    def __init__(self, decoder: Decoder, stop_strings: Sequence[str] = ()) -> None:
        self.stopped = False
        """True once a stop string was found; what follows is not wanted."""
        self._decoder = decoder
        self._stop_strings = stop_strings
        self._held = ""  # text that may be the beginning of a stop string
        self._decoded_end = 0  # characters decoded so far, held ones included
        self._emitted_end = 0
        self._released_end = 0  # where the text of the last token handed out ended
        self._waiting: list[tuple[int, int]] = []  # tokens not handed out yet, with the end of their text
        self._whole = 0  # how many of them end where a character ends

    def push(self, token_id: int) -> TextPiece:
        """Add a token; the piece may be empty."""
        text = self._decoder.push(token_id)
        self._decoded_end += len(text)
        self._waiting.append((token_id, self._decoded_end))
        return self._advance(text, bool(text))

    def finish(self) -> TextPiece:
        """The rest of the text, an unfinished character as U+FFFD; call it once, not after a stop."""
        text = self._decoder.flush()
        self._decoded_end += len(text)
        piece = self._advance(text, True)
        if self.stopped:
            return piece
        rest = tuple(token for token, _ in self._waiting)
        self._waiting.clear()
        return TextPiece(piece.text + self._held, piece.token_ids + rest)

    def _advance(self, text: str, at_character_end: bool) -> TextPiece:
        if at_character_end:
            self._whole = len(self._waiting)
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stop_strings) if at >= 0]
        if found:
            self.stopped = True
            sure = min(found)
        else:
            sure = len(self._held) - self._possible_stop()
        emitted, self._held = self._held[:sure], self._held[sure:]
        self._emitted_end += sure
        ready = 0
        while ready < self._whole and self._waiting[ready][1] <= self._emitted_end:
            ready += 1
        # Tokens without text of their own are part of the character that follows them.
        ends = [self._released_end, *(end for _, end in self._waiting[:ready])]
        while ready and ends[ready] == ends[ready - 1]:
            ready -= 1
        tokens = tuple(token for token, _ in self._waiting[:ready])
        if ready:
            self._released_end = self._waiting[ready - 1][1]
        del self._waiting[:ready]
        self._whole -= ready
        return TextPiece(emitted, tokens)

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = min(len(self._held), max(map(len, self._stop_strings), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop_strings):
                return length
        return 0
