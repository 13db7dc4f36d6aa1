"""A program at a terminal, for tests that type."""

import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

WAIT_SECONDS = 30.0
"""Long enough for a busy machine."""


@dataclass
class Terminal:
    """A process whose standard input, output and error are a pseudoterminal."""

    process: "subprocess.Popen[bytes]"
    descriptor: int
    shown: str = ""
    """What was written after what was waited for."""

    def type(self, text: str) -> None:
        """Type `text`; "\\r" is Enter, "\\x03" Ctrl-C, "\\x04" Ctrl-D."""
        os.write(self.descriptor, text.encode())

    def wait_for(self, text: str) -> str:
        """Wait until `text` is shown after what earlier calls waited for; returns what was shown up to its end."""
        return self.wait_for_match(re.escape(text))

    def wait_for_match(self, text: str) -> str:
        """As `wait_for`, for a regular expression."""
        end = time.monotonic() + WAIT_SECONDS
        while (found := re.search(text, self.shown)) is None:
            assert time.monotonic() < end, f"{text!r} never came: {self.shown!r}"
            if select.select([self.descriptor], [], [], 1.0)[0]:
                try:
                    self.shown += os.read(self.descriptor, 1 << 16).decode(errors="replace")
                except OSError:  # the process has ended
                    raise AssertionError(f"{text!r} never came: {self.shown!r}") from None
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def resize(self, rows: int, columns: int) -> None:
        """Give the terminal another size, and tell the process."""
        import fcntl
        import struct
        import termios

        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def status(self) -> int:
        """The exit status, once the process has ended."""
        end = time.monotonic() + WAIT_SECONDS
        while self.process.poll() is None and time.monotonic() < end:  # its last words have to be read, or it waits
            if select.select([self.descriptor], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self.descriptor, 1 << 16).decode(errors="replace")
                except OSError:
                    break
        return self.process.wait(WAIT_SECONDS)


@contextmanager
def at_terminal(*arguments: str, env: dict[str, str] | None = None, program: Sequence[str] = ()) -> Iterator[Terminal]:
    """``edgelm ARGUMENTS``, or `program`, at a terminal of 24 lines and 100 columns, which has its signals."""
    import pty

    ours, theirs = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("EDGELM_")}
    # A pseudoterminal answers no question about where its cursor is.
    environment |= {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", **(env or {})}
    command = [*(program or (sys.executable, "-m", "edgelm")), *arguments]
    code = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command],
        stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    terminal = Terminal(process, ours)
    terminal.resize(24, 100)
    try:
        yield terminal
    finally:
        process.kill()
        process.wait()
        os.close(ours)
