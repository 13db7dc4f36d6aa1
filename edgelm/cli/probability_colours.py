"""``edgelm run --show-probs``: new text in the colours of its tokens' probabilities, on a terminal."""

import math
import os
import sys
from bisect import bisect_right
from typing import TYPE_CHECKING, TextIO

from edgelm.cli.streams import escaped_text, note

if TYPE_CHECKING:
    from edgelm.generation.results import Chunk
    from edgelm.scoring.results import TokenLogprobs

BOUNDS = (0.01, 0.1, 0.5, 0.9)
COLOURS = (("red", 160), ("orange", 166), ("ochre", 136), ("cyan", 37), ("blue", 33))
"""One more than BOUNDS, numbers of the 256 colours. They are legible on black and on white, and none is green."""
MEANINGS = ("below 1 %", "1 to 10 %", "10 to 50 %", "50 to 90 %", "90 % or more")


def reason_without_colours() -> str | None:
    """Why standard output gets no colours, or None: it is no terminal, or the user wants none (no-color.org)."""
    if os.environ.get("NO_COLOR"):
        return "NO_COLOR is set"
    if not _is_terminal(sys.stdout):
        return "standard output is no terminal"
    if os.environ.get("TERM") == "dumb":
        return "this terminal has none (TERM=dumb)"
    return None


def begin_colours() -> None:
    """Make the terminal ready, and say on standard error what the colours mean: in colours, if it is a terminal."""
    if sys.platform == "win32":
        from colorama import just_fix_windows_console  # click needs it there

        just_fix_windows_console()
    parts = [f"{name} {meaning}" for (name, _), meaning in zip(COLOURS, MEANINGS, strict=True)]
    if sys.stderr is None or not _is_terminal(sys.stderr):
        note(f"edgelm: probabilities: {', '.join(parts)}")
        return
    painted = ", ".join(_painted(part, colour) for part, (_, colour) in zip(parts, COLOURS, strict=True))
    sys.stderr.write(f"edgelm: probabilities: {painted}\n")
    sys.stderr.flush()


class ProbabilityPainter:
    """Colours the text of one row. Text whose tokens are not known yet waits for them."""

    def __init__(self) -> None:
        self._waiting = ""

    def painted(self, chunk: "Chunk") -> str:
        """The text of the next chunk, which has log-probabilities, in colours.

        Several tokens that make one character, or whose own texts do not join to the chunk's, are one piece, with the
        product of their probabilities.
        """
        self._waiting += chunk.text
        tokens = chunk.logprobs or ()
        result = ""
        if tokens and self._waiting.startswith("".join(token.text for token in tokens)):
            for token in tokens:
                result += self._next(len(token.text), (token,))
        elif tokens:
            result = self._next(len(self._waiting), tokens)
        if chunk.finish_reason is not None:  # what was before a stop string, inside its token
            result += escaped_text(self._waiting)
            self._waiting = ""
        return result

    def _next(self, length: int, tokens: "tuple[TokenLogprobs, ...]") -> str:
        text, self._waiting = self._waiting[:length], self._waiting[length:]
        probability = math.exp(sum(token.logprob for token in tokens))
        return _painted(escaped_text(text), COLOURS[bisect_right(BOUNDS, probability)][1])


def _painted(text: str, colour: int) -> str:
    """`text` in a colour; a line end stays outside, because some terminals fill the next line with the colour."""
    lines = (f"\x1b[38;5;{colour}m{line}\x1b[39m" if line else "" for line in text.split("\n"))
    return "\n".join(lines)


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except (OSError, ValueError):
        return False
