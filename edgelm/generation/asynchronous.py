"""Generation for asyncio: each token is computed in a worker thread, so the event loop never waits for a token."""

from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from edgelm.decoding.generation_config import Cancel
from edgelm.engine.fork import notice_fork, watch_forks
from edgelm.errors import EdgelmError, pass_interrupts_on
from edgelm.generation.results import Chunk

if TYPE_CHECKING:
    import asyncio

Result = TypeVar("Result")

WORKER_THREADS = 4
"""Each token is a job of its own, so more open streams than threads take turns. A long prompt holds one thread."""


class EitherCancel:
    """A cancel signal that is set by `set`, or together with the caller's signal."""

    def __init__(self, callers: Cancel | None) -> None:
        self._callers = callers
        self._set = False

    def set(self) -> None:
        self._set = True

    def is_set(self) -> bool:
        """Whether either signal is set."""
        return self._set or (self._callers is not None and self._callers.is_set())


class Workers:
    """A model's worker threads, started when first needed. A forked child starts threads of its own."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        watch_forks(self)

    def pool(self) -> ThreadPoolExecutor:
        """The worker threads; they end once nobody refers to the pool."""
        notice_fork()
        pool = self._pool = self._pool or ThreadPoolExecutor(WORKER_THREADS, "edgelm")
        return pool

    def release(self) -> None:
        """Let the threads end once open streams have ended."""
        self._pool = None

    def after_fork(self) -> None:
        """In a forked child: the threads stayed behind."""
        self._pool = None


async def call_in_thread(pool: ThreadPoolExecutor, context: Context, function: Callable[[], Result]) -> Result:
    """Compute ``function()`` in `pool`, where the context variables of `context` are seen."""
    return await _loop_of_call().run_in_executor(pool, context.run, function)


async def stream_in_thread(
    begin: Callable[[], Iterator[Chunk]], cancel: EitherCancel, pool: ThreadPoolExecutor, context: Context
) -> AsyncGenerator[Chunk, None]:
    """Yield the chunks of ``begin()``, each computed in `pool` when it is requested, in `context`.

    Cancelling the waiting task, or closing this iterator, sets `cancel` and waits for the token that is being computed.
    After that the session is free.
    """
    import asyncio  # takes 30 ms, and only asynchronous callers need it

    loop = _loop_of_call()
    chunks = await loop.run_in_executor(pool, context.run, begin)
    turn: asyncio.Future[Chunk | None] | None = None
    try:
        while True:
            turn = loop.run_in_executor(pool, partial(context.run, _next_chunk, chunks))
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


def _next_chunk(chunks: Iterator[Chunk]) -> Chunk | None:
    return next(chunks, None)


def running_loop(needing: str, instead: str) -> "asyncio.AbstractEventLoop":
    """The event loop of this task. Without one, an EdgelmError says what needs it, and what to do `instead`.

    `needing` begins the message: "agenerate and astream need".
    """
    import asyncio

    try:
        return asyncio.get_running_loop()
    except RuntimeError as error:
        pass_interrupts_on(error)
        raise EdgelmError(f"{needing} a running asyncio event loop, and there is none: in trio, {instead}") from None


def _loop_of_call() -> "asyncio.AbstractEventLoop":
    return running_loop("agenerate and astream need", "give `generate` to trio.to_thread.run_sync")


def _close_after(chunks: Iterator[Chunk], turn: "asyncio.Future[Chunk | None]") -> None:
    turn.exception()  # asyncio complains about exceptions that nobody reads
    _close(chunks)


def _close(chunks: Iterator[Chunk]) -> None:
    """Close the generator, which gives its session back."""
    getattr(chunks, "close", lambda: None)()
