"""How far a long command is, on standard error: one line that changes on a terminal, a few lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from edgelm.cli.streams import note

TERMINAL_FIRST_SECONDS, TERMINAL_NEXT_SECONDS = 1.0, 0.1
FILE_FIRST_SECONDS, FILE_NEXT_SECONDS = 5.0, 30.0
"""Seconds before the first line, and between lines. FILE_ is for standard error that is no terminal."""

LONG_PROMPT_CHARACTERS = 2_000

Show = Callable[[str], None]


@contextmanager
def progress(what: str, clock: Callable[[], float] = time.monotonic) -> Iterator[Show]:
    """Gives a function to call with how far the command is, such as "12 %"; the line "what: 12 %" goes when it ends.

    Commands that are done within a second show nothing.
    """
    at_terminal = sys.stderr is not None and sys.stderr.isatty()
    pause = TERMINAL_NEXT_SECONDS if at_terminal else FILE_NEXT_SECONDS
    due = clock() + (TERMINAL_FIRST_SECONDS if at_terminal else FILE_FIRST_SECONDS)
    width = 0

    def show(how_far: str) -> None:
        nonlocal due, width
        now = clock()
        if now < due:
            return
        due = now + pause
        line = f"{what}: {how_far}"
        if at_terminal:
            _rewrite(line, width)
            width = len(line)
        else:
            note(f"edgelm: {line}")

    try:
        yield show
    finally:
        if width:
            _rewrite("", width)


@contextmanager
def prompt_progress(prompt: str) -> Iterator[Callable[[int, int], None] | None]:
    """Gives the option `prompt_progress` for a long `prompt`, None for a short one; the line goes with its last token.

    A short prompt is computed in one piece, which is a little faster.
    """
    if len(prompt) < LONG_PROMPT_CHARACTERS:
        yield None
        return
    with ExitStack() as shown:
        show = shown.enter_context(progress("reading the prompt"))

        def tell(done: int, total: int) -> None:
            show(f"{done:,} of {total:,} tokens")
            if done == total:
                shown.close()

        yield tell


def percent(show: Show) -> Callable[[float], None]:
    """`show`, for a share from 0 to 1."""
    return lambda share: show(f"{share:.0%}")


def _rewrite(line: str, width: int) -> None:
    """Write `line` over a line of `width` characters."""
    sys.stderr.write(f"\r{line:<{width}}" if line else f"\r{'':<{width}}\r")
    sys.stderr.flush()
