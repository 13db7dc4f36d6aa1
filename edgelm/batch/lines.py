"""Lines of text that come in, and lines of JSON that go out. A bad line costs the other lines nothing."""

import math
import re
from collections.abc import Callable
from typing import IO

from edgelm.errors import PromptError, TokenizerError

MAX_LINE_BYTES = 2**28

# C1 controls, those of the direction of writing, and halves of characters.
CONTROLS = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

LINE_ERRORS = (PromptError, TokenizerError)
"""What may be wrong with one line; every other error is about the whole run."""


class LineError(PromptError):
    """A line cannot be read. The message completes a sentence that begins with the line's name."""


def next_line(stream: IO[bytes], max_bytes: int = MAX_LINE_BYTES) -> bytes | None:
    """The next line of `stream` with its end; None after the last one.

    A longer line is cut: what comes has `max_bytes` + 1 bytes, for `line_text` to refuse, and the rest is skipped.
    """
    line = rest = stream.readline(max_bytes + 1)
    while len(rest) > max_bytes and not rest.endswith(b"\n"):
        rest = stream.readline(max_bytes + 1)
    return line or None


def line_text(line: bytes, max_bytes: int = MAX_LINE_BYTES) -> str:
    """The text of a line, without its end. Raises LineError if it is too long or not UTF-8."""
    if len(line) > max_bytes:
        raise LineError(f"has more than {max_bytes:,} bytes: shorten it")
    try:
        return without_line_end(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise LineError(f"is not UTF-8 text (byte {error.start})") from None


def without_line_end(text: str) -> str:
    """`text` without its last line end, which is no part of a prompt."""
    return text.removesuffix("\n").removesuffix("\r")


def complaint(name: str, error: Exception) -> str:
    """What is wrong with the line that is called `name`."""
    return f"{name} {error}" if isinstance(error, LineError) else f"{name}: {error}"


def json_line(content: object, can_show: Callable[[str], bool] = lambda line: True) -> str:
    """One JSON value on one line; NaN and infinity, which JSON does not have, become null.

    Control characters are escaped, and all that is not ASCII where `can_show` says that the line cannot be written.
    """
    import json  # slow to import, and every command imports this module

    content = _finite(content)
    line = json.dumps(content, ensure_ascii=False, allow_nan=False)
    if not can_show(line):
        return json.dumps(content, allow_nan=False)
    return CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", line)


def _finite(content: object) -> object:
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
