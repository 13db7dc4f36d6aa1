"""Ctrl-C while modules and models are loading.

A KeyboardInterrupt that rises inside an import is lost, or becomes another error: extension modules turn it into an
ImportError, and packages catch what they try. Nothing is half-written at that time, so the process just ends.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

EXIT_INTERRUPTED = 130  # as a shell reports a process that SIGINT ended


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


def _end(number: int, frame: FrameType | None) -> None:
    if sys.stderr is not None:
        with suppress(OSError):
            os.write(2, b"\n")
    os._exit(EXIT_INTERRUPTED)
