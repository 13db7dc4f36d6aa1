"""A generation that a scheduler's thread computes, and its two readers: a thread or a task of an event loop."""

import threading
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from queue import SimpleQueue
from typing import TYPE_CHECKING

from edgelm.decoding.generation_config import GenerationConfig
from edgelm.decoding.request import Request
from edgelm.engine.fork import notice_fork, watch_forks
from edgelm.errors import ClosedError, EdgelmError, ForkError, pass_interrupts_on
from edgelm.generation.asynchronous import running_loop
from edgelm.generation.results import Chunk, Completion
from edgelm.generation.run import TextRun

if TYPE_CHECKING:
    import asyncio

    Waiter = tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]


class Mailbox:
    """What submitters and readers leave for the thread that computes, without a lock that it would wait for."""

    def __init__(self) -> None:
        self.arrived: SimpleQueue[ScheduledRun | None] = SimpleQueue()
        """New runs; None only wakes the thread."""
        self.cancelled: deque[ScheduledRun] = deque()
        """Runs that the thread ends before its next step."""
        self.is_abandoned = False
        """Whether the program ends, so that nothing more is delivered."""


class ScheduledRun:
    """A run between the thread that computes it and the one that reads it.

    Attributes:
        run: the run, which only the computing thread touches until its last chunk.
        requests: a request for each of its rows.
        key: who asks.
        deadline: when to end it, on the clock of `time.monotonic`; infinity for never.
        rows_given: how many rows the id-level scheduler was given.
        done: whether the last chunk, or an error, was delivered.
    """

    def __init__(self, run: TextRun, requests: list[Request], key: str, deadline: float, mailbox: Mailbox) -> None:
        self.run, self.requests, self.key, self.deadline = run, requests, key, deadline
        self.rows_given = 0
        self.done = False
        self._mailbox = mailbox
        self._results: SimpleQueue[Chunk | Exception] = SimpleQueue()
        # Of a task that found no result. A deque, because taking what is there and removing it must be one step.
        self._waiters: deque[Waiter] = deque()
        watch_forks(self)

    def cancel(self) -> None:
        """Ask for the end; any thread may, also a signal handler or the garbage collector."""
        if not self.done:
            self._mailbox.cancelled.append(self)

    def deliver(self, result: Chunk | Exception, waker: "LoopWaker") -> None:
        """Hand a result to the reader; if a task waits for it, `waker` is to wake it."""
        self.done = isinstance(result, Exception) or result.stats is not None
        self._results.put(result)
        while self._waiters:
            waker.add(self, *self._waiters.popleft())

    def next_result(self) -> Chunk | Exception:
        """Wait for the next result."""
        result = self._present_result()
        return self._results.get() if result is None else result

    async def next_result_in(self, loop: "asyncio.AbstractEventLoop") -> Chunk | Exception:
        """Wait for the next result without holding up the event loop, which is this task's."""
        while (result := self._present_result()) is None:
            future = loop.create_future()
            self._waiters.append((loop, future))
            if self._results.empty():  # otherwise one came before the thread could see who waits
                await future
        return result

    def _present_result(self) -> Chunk | Exception | None:
        """The next result, or None if it is still to come."""
        notice_fork()
        if not self._results.empty():  # only one thread reads
            return self._results.get_nowait()
        # When Python ends, daemon threads wait in silence; a handler of `atexit` must not wait with them.
        if self._mailbox.is_abandoned and threading.current_thread() is threading.main_thread():
            raise ClosedError("the program ends, so this text gets no more tokens")
        return None

    def after_fork(self) -> None:
        """In a forked child: the thread that computes stayed behind."""
        if not self.done:
            self._results, self.done = SimpleQueue(), True
            self._results.put(ForkError("this text is computed in the parent process: submit it again in the child"))


class Submission:
    """A generation that a `TextScheduler` computes. Read it once: with ``for``, ``async for`` or as a completion.

    Leaving the loop early, or dropping the submission, cancels it.

    Attributes:
        prompt_tokens: length of the prompt, without a prefix.
        seed: seed of the random numbers.
        config: the options, over the defaults of the bundle.
    """

    def __init__(self, scheduled: ScheduledRun, config: GenerationConfig) -> None:
        self.prompt_tokens, self.seed, self.config = scheduled.run.prompt_tokens, scheduled.run.seed, config
        self._scheduled = scheduled
        self._is_read = False

    def cancel(self) -> None:
        """End the text within one token. Its last chunk has the finish reason "cancelled". Any thread may call this."""
        self._scheduled.cancel()

    def __del__(self) -> None:
        self._scheduled.cancel()

    def __iter__(self) -> Iterator[Chunk]:
        """The chunks of all rows as they come; `Chunk.index` is the row, and the last chunk has the stats.

        Raises what ended the text: an exception of a `logits_processor`, or an EdgelmError.
        """
        self._begin_reading()
        return self._chunks()

    def __aiter__(self) -> AsyncGenerator[Chunk, None]:
        """As ``for``, for ``async for``."""
        self._begin_reading()
        return self._chunks_in_loop()

    def completion(self) -> Completion:
        """Wait for the whole text. Raises as ``for``."""
        return self._joined(self)

    async def acompletion(self) -> Completion:
        """As `completion`; cancelling the task cancels the text."""
        async with aclosing(aiter(self)) as chunks:
            return self._joined([chunk async for chunk in chunks])

    def _joined(self, chunks: Iterable[Chunk]) -> Completion:
        return self._scheduled.run.completion(chunks)

    def _begin_reading(self) -> None:
        if self._is_read:
            raise EdgelmError("a submission can be read only once: keep its chunks")
        self._is_read = True

    def _chunks(self) -> Iterator[Chunk]:
        try:
            is_last = False
            while not is_last:
                chunk = _raised(self._scheduled.next_result())
                is_last = chunk.stats is not None
                yield chunk
        finally:
            self.cancel()

    async def _chunks_in_loop(self) -> AsyncGenerator[Chunk, None]:
        loop = running_loop("`async for` over a submission needs", "give its `completion` to trio.to_thread.run_sync")
        try:
            is_last = False
            while not is_last:
                chunk = _raised(await self._scheduled.next_result_in(loop))
                is_last = chunk.stats is not None
                yield chunk
        finally:
            self.cancel()


class LoopWaker:
    """Wakes tasks that wait for results: one call into each event loop, however many of its tasks wait."""

    def __init__(self) -> None:
        self._waiting: dict[asyncio.AbstractEventLoop, dict[asyncio.Future[None], ScheduledRun]] = {}

    def add(self, scheduled: ScheduledRun, loop: "asyncio.AbstractEventLoop", future: "asyncio.Future[None]") -> None:
        """Have the task that waits for `scheduled` woken by the next `wake`."""
        self._waiting.setdefault(loop, {})[future] = scheduled

    def wake(self) -> None:
        """Wake all tasks that were added. What is read in a closed event loop is cancelled."""
        for loop, waiting in self._waiting.items():
            try:
                loop.call_soon_threadsafe(_wake, list(waiting))
            except RuntimeError as error:
                pass_interrupts_on(error)
                for scheduled in waiting.values():
                    scheduled.cancel()
        self._waiting.clear()


def _wake(futures: "list[asyncio.Future[None]]") -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)


def _raised(result: Chunk | Exception) -> Chunk:
    if isinstance(result, Exception):
        raise result
    return result
