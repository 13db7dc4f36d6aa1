"""Ctrl-C while modules and models are loading, and while a conversation goes on.

A KeyboardInterrupt that rises inside an import is lost, or becomes another error: extension modules turn it into an
ImportError, and packages catch what they try. Where nothing is half-written, the process just ends. Where something
is, the interrupt is remembered, and raised again. In a conversation it ends an answer, and not the program.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

EXIT_INTERRUPTED = 130  # as a shell reports a process that SIGINT ended
EXIT_TERMINATED = 143


@contextmanager
def ends_at_once() -> Iterator[None]:
    """Inside this context Ctrl-C ends the process with a newline and status 130. Ignored signals stay ignored."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def sets(event: threading.Event) -> Iterator[None]:
    """Inside this context Ctrl-C sets `event` and does nothing else. Ignored signals stay ignored."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: event.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def unwinds() -> Iterator[Callable[[], None]]:
    """Inside this context Ctrl-C and SIGTERM raise KeyboardInterrupt and SystemExit, so that half-built files go.

    What is raised inside a library may be swallowed there, or become another error. So the context gives a function
    that raises it again, to be called before each stage of the work; and an error that leaves the context after a
    signal is taken for its result. Ignored signals stay ignored.
    """
    received: list[int] = []

    def raise_again() -> None:
        if received:
            raise KeyboardInterrupt if received[0] == signal.SIGINT else SystemExit(EXIT_TERMINATED)

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise_again()

    in_main_thread = threading.current_thread() is threading.main_thread()
    defaults: dict[signal.Signals, Callable[[int, FrameType | None], object] | signal.Handlers] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
    }
    caught = [number for number, default in defaults.items() if in_main_thread and signal.getsignal(number) == default]
    for number in caught:
        signal.signal(number, remember)
    try:
        yield raise_again
    except Exception:
        raise_again()
        raise
    finally:
        for number in caught:
            signal.signal(number, defaults[number])


def _end(number: int, frame: FrameType | None) -> None:
    if sys.stderr is not None:
        with suppress(OSError):
            os.write(2, b"\n")
    os._exit(EXIT_INTERRUPTED)
