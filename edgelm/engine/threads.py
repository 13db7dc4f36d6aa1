"""How many threads a graph gets: one for each CPU, or as many as this process may start.

ONNX Runtime waits for ever if the system refuses one of its threads after it has given it another one
(microsoft/onnxruntime issue 15146). So threads are tried before a graph is loaded.
"""

import logging
import mmap
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from edgelm.bundle.small_files import status_of
from edgelm.engine.machine import default_threads
from edgelm.engine.memory import ModelMemory
from edgelm.errors import pass_interrupts_on

logger = logging.getLogger(__name__)

_END_SECONDS = 1.0
"""How long to wait for the system to forget threads that have ended."""


def choose_threads(requested: int | None, memory: ModelMemory) -> int:
    """The number of threads for a graph that will take `memory`; the caller's own thread is one of them.

    It is the requested number, or one for each CPU that this process may use. If the system refuses that many, or if
    their stacks would leave too little memory for the model, it is fewer, and a warning says so.
    """
    wanted = default_threads() if requested is None else requested
    with _room_kept(memory) as kept:
        possible = 1 + (startable_threads(wanted - 1) if kept else 0)
    if possible < wanted:
        logger.warning(
            "the model runs on %d of %d threads, because this process cannot start more: raise the limit of its "
            "processes (ulimit -u, pids.max) or of its memory (ulimit -v, ulimit -d)",
            possible,
            wanted,
        )
    return possible


def startable_threads(count: int) -> int:
    """How many of `count` threads this process can have at the same time, beside those it has; they have ended."""
    end = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(count):
            thread = threading.Thread(target=end.wait, name="edgelm-try", daemon=True)
            try:
                thread.start()
            except (RuntimeError, MemoryError) as error:
                pass_interrupts_on(error)
                break
            started.append(thread)
    finally:
        end.set()
        for thread in started:
            thread.join()
    _wait_until_gone([thread.native_id for thread in started])
    return len(started)


def _wait_until_gone(native_ids: list[int | None]) -> None:
    """Wait until the system no longer counts threads that have ended; Python's `join` may return a moment earlier."""
    if not sys.platform.startswith("linux"):
        return
    deadline = time.monotonic() + _END_SECONDS
    for native_id in native_ids:
        if native_id == threading.get_native_id():  # gevent's threads are not threads of the system
            continue
        while status_of(f"/proc/self/task/{native_id}") is not None and time.monotonic() < deadline:
            time.sleep(0.0001)


@contextmanager
def _room_kept(memory: ModelMemory) -> Iterator[bool]:
    """Inside this context the process has as much more address space as a model will take; False if it cannot.

    So threads that are tried meanwhile leave room for the model. No memory is used.
    """
    if sys.platform == "win32":
        yield True
        return
    # RLIMIT_DATA counts memory that can be written; RLIMIT_AS counts the mapped weights too.
    parts = (memory.forecast_bytes, mmap.PROT_READ | mmap.PROT_WRITE), (memory.weights_bytes, mmap.PROT_READ)
    with ExitStack() as kept:
        try:
            for size, access in parts:
                kept.enter_context(mmap.mmap(-1, max(1, size), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, access))
            fits = True
        except (OSError, ValueError, OverflowError) as error:
            pass_interrupts_on(error)
            fits = False
        yield fits
