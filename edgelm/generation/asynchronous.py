"""Generation for asyncio: each token is computed in a thread, so that the event loop never waits for one."""

import os
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from edgelm.decoding.generation_config import Cancel
from edgelm.generation.results import Chunk

if TYPE_CHECKING:
    import asyncio

Result = TypeVar("Result")

WORKER_THREADS = 4
"""Every token is a job of its own, so more open streams than threads take turns; one long prompt holds one thread."""


class EitherCancel:
    """Set by `set`, or where another signal is."""

    def __init__(self, other: Cancel | None) -> None:
        self._other = other
        self._set = False

    def set(self) -> None:
        self._set = True

    def is_set(self) -> bool:
        """Whether either is."""
        return self._set or (self._other is not None and self._other.is_set())


class Workers:
    """A model's worker threads, started when first needed; a forked child gets threads of its own."""

    def __init__(self) -> None:
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    def pool(self) -> ThreadPoolExecutor:
        """The threads of this process; they end when nobody holds the pool any more."""
        found = self._pool
        if found is None or found[0] != os.getpid():
            found = self._pool = (os.getpid(), ThreadPoolExecutor(WORKER_THREADS, "edgelm"))
        return found[1]

    def release(self) -> None:
        """Let the threads end once open streams are done."""
        self._pool = None


async def call_in_thread(pool: ThreadPoolExecutor, function: Callable[[], Result]) -> Result:
    """``function()``, computed in `pool`."""
    import asyncio  # 30 ms of imports that nobody else needs

    return await asyncio.get_running_loop().run_in_executor(pool, function)


async def stream_in_thread(
    begin: Callable[[], Iterator[Chunk]], cancel: EitherCancel, pool: ThreadPoolExecutor
) -> AsyncGenerator[Chunk, None]:
    """The chunks of ``begin()``, computed in `pool` as they are asked for.

    Cancelling the task that waits, or closing this iterator, sets `cancel` and waits for the token that is being
    computed; the session is free then.
    """
    import asyncio

    loop = asyncio.get_running_loop()
    opening = loop.run_in_executor(pool, begin)
    chunks = await opening
    turn: asyncio.Future[Chunk | None] | None = None
    try:
        while True:
            turn = loop.run_in_executor(pool, next, chunks, None)
            chunk = await asyncio.shield(turn)
            if chunk is None:
                return
            yield chunk
    finally:
        cancel.set()
        if turn is None or turn.done():
            _close(chunks)
        else:
            turn.add_done_callback(partial(_close_after, chunks))
            await asyncio.wait([turn])


def _close_after(chunks: Iterator[Chunk], turn: "asyncio.Future[Chunk | None]") -> None:
    turn.exception()  # looked at, or asyncio complains that nobody did
    _close(chunks)


def _close(chunks: Iterator[Chunk]) -> None:
    """Give the generator's session back."""
    close = getattr(chunks, "close", None)
    if close is not None:
        close()
