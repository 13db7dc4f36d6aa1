"""Standard output and standard error: their encodings, closed descriptors, and what a command writes to them.

Output that goes to a file or a pipe is UTF-8, and each of its line ends is one byte, whatever the locale, code page or
line end of the system is. A terminal keeps its own encoding and shows "?" for characters that it lacks.
PYTHONIOENCODING overrides both encodings.
"""

import io
import os
import re
import sys
from contextlib import suppress
from typing import TextIO

from edgelm.batch.lines import CONTROLS

_ALL_CONTROLS = re.compile(f"[\0-\x1f]|{CONTROLS.pattern}")
_CONTROLS_IN_TEXT = re.compile(f"[\0-\x08\x0b-\x1f]|{CONTROLS.pattern}")  # line ends and tabs are text


def escaped(text: str) -> str:
    """`text` for a terminal: characters that would steer it, or turn the text around, as in a Python string.

    Everything that a bundle or a file name says passes here. The texts that a model writes do not, because they are
    what a command was asked for; the answers of a conversation pass `escaped_text`.
    """
    return _ALL_CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)


def escaped_text(text: str) -> str:
    """As `escaped`, but line ends and tabs stay: a model's answer, which may repeat what a stranger put into it."""
    return _CONTROLS_IN_TEXT.sub(lambda match: ascii(match[0])[1:-1], text)


def prepare_streams() -> None:
    """Set the encodings, and let no file that is opened later take the place of a closed stream."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # a file opened next would get this number, and messages of libraries would end up in it
            with suppress(OSError):
                os.open(os.devnull, os.O_RDWR)
    chosen = "" if sys.flags.ignore_environment else os.environ.get("PYTHONIOENCODING", "")
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            at_terminal = _is_terminal(stream)
            encoding = stream.encoding if chosen or at_terminal else "utf-8"
            stream.reconfigure(encoding=encoding, errors=chosen.partition(":")[2] or errors)
            if not at_terminal:  # Windows would write "\r\n", and "\r\r\n" where a text has "\r\n" itself
                stream.reconfigure(newline="\n")


def print_line(text: str) -> None:
    """`text` and a line end on standard output, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """`text`, escaped, and a line end on standard error. Nothing happens where that is closed or full."""
    if sys.stderr is not None:
        try:
            sys.stderr.write(f"{escaped(text)}\n")
            sys.stderr.flush()
        except (OSError, ValueError):
            _discard(sys.stderr)


def discard_stdout() -> None:
    """Point standard output to the null device, so that the interpreter's last flush does not fail again."""
    if sys.stdout is not None:
        _discard(sys.stdout)


def _discard(stream: TextIO) -> None:
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def shows_in_stdout(text: str) -> bool:
    """Whether standard output can write every character of `text`."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_terminal(stream: io.TextIOWrapper) -> bool:
    try:
        return stream.isatty()
    except (OSError, ValueError):
        return False
