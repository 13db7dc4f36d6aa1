"""A stream of token ids becomes a stream of text: whole characters only, and never a part of a stop string."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Decoder(Protocol):
    """The part of `edgelm.text.stream_decoder.StreamDecoder` that this module needs."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


@dataclass(frozen=True, slots=True)
class TextPiece:
    """Text that is certain now, and the ids of the tokens whose text it completes."""

    text: str
    token_ids: tuple[int, ...]


class TextStream:
    """Finds stop strings, which may begin and end anywhere inside tokens, in the text of a stream decoder."""

    def __init__(self, decoder: Decoder, stop_strings: Sequence[str] = ()) -> None:
        """Begin a text.

        Args:
            decoder: turns ids into text; it must be at the beginning of a text.
            stop_strings: each of them ends the text and is not part of it.
        """
        self.stopped = False
        """True once a stop string was found; the stream takes no tokens after it."""
        self._decoder = decoder
        self._stop_strings = stop_strings
        self._held = ""  # text that may be the beginning of a stop string
        # Positions in the whole text, in characters.
        self._decoded_end = 0  # end of the decoded text, held text included
        self._emitted_end = 0  # end of the text handed out
        self._released_end = 0  # end of the last token handed out
        self._waiting: list[tuple[int, int]] = []  # tokens not handed out yet, each with the end of its text
        self._whole = 0  # number of waiting tokens up to the last one that ends with a character

    def push(self, token_id: int) -> TextPiece:
        """Add a token and return the piece it makes certain, which may be empty."""
        text = self._decoder.push(token_id)
        self._decoded_end += len(text)
        self._waiting.append((token_id, self._decoded_end))
        return self._advance(text, bool(text))

    def finish(self) -> TextPiece:
        """Return the rest of the text, an unfinished character as U+FFFD; call it once, and not after a stop."""
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
        stops = [start for start in map(self._held.find, self._stop_strings) if start >= 0]
        if stops:
            self.stopped = True
            certain = min(stops)
        else:
            certain = len(self._held) - (self._possible_stop() if self._stop_strings else 0)
        emitted, self._held = self._held[:certain], self._held[certain:]
        self._emitted_end += certain
        ready = 0
        while ready < self._whole and self._waiting[ready][1] <= self._emitted_end:
            ready += 1
        # A token without text of its own belongs to the character that follows it.
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
        """Return the length of the longest ending of the held text that is the beginning of a stop string."""
        longest = min(len(self._held), max(map(len, self._stop_strings)) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop_strings):
                return length
        return 0
