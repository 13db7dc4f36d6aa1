"""The thread that computes for a `TextScheduler`: it takes submissions in turn, decodes them, and delivers chunks."""

import atexit
import heapq
import itertools
import logging
import threading
import time
import weakref
from collections import deque
from queue import Empty, SimpleQueue

from edgelm.decoding.request import FinishReason, Request
from edgelm.engine.fork import notice_fork, watch_forks
from edgelm.errors import ClosedError, EdgelmError, ForkError, pass_interrupts_on, shown
from edgelm.generation.fair_queue import FairQueue
from edgelm.generation.results import Chunk
from edgelm.generation.run import TextRun
from edgelm.generation.runs_together import RunsTogether, last_chunk
from edgelm.generation.submission import LoopWaker, ScheduledRun
from edgelm.ids import PREFILL_CHUNK_TOKENS

logger = logging.getLogger(__name__)

RECENT_ENDS = 32
"""The speed of the queue is that of so many of the latest generations."""
_CLOSE_SECONDS = 60
"""How long `close` waits for a step. A signal handler that closes may have interrupted what the step waits for."""
_END_SECONDS = 2.0
"""How long the end of the program waits for a step, before what computes is stopped anyway."""

_threads: "weakref.WeakSet[SchedulerThread]" = weakref.WeakSet()
_program_ends = False


class SchedulerThread:
    """A daemon thread that decodes runs together, from the first submission until it is told to end.

    Without work it waits for a submission, and uses no CPU. Its methods may be called by any thread, by signal handlers
    and by the garbage collector, because none of them takes a lock that the thread needs.
    """

    def __init__(self, together: RunsTogether) -> None:
        """Start the thread. Raises EdgelmError if the system refuses one, and ClosedError when the program ends."""
        if _program_ends:
            raise ClosedError("the program ends, so no scheduler can be started")
        self.ended = False
        """Whether the thread takes no more submissions."""
        self.cancelled: deque[ScheduledRun] = deque()
        """Submissions to end, for the thread to find before its next step."""
        self._together = together
        self._inbox: SimpleQueue[ScheduledRun | None] = SimpleQueue()  # None only wakes the thread
        self._waiting: FairQueue[ScheduledRun] = FairQueue()  # runs with rows that the id-level scheduler has not
        self._open: dict[TextRun, ScheduledRun] = {}  # all that came and are not done
        self._deadlines: list[tuple[float, int, weakref.ref[ScheduledRun]]] = []  # a heap
        self._numbers = itertools.count()
        # When the latest generations ended, after the time at which there was something to do again.
        self._times: deque[float] = deque(maxlen=RECENT_ENDS + 1)
        self._waker = LoopWaker()
        self._is_retired = False
        self._cancel_at: float | None = None
        self._thread = threading.Thread(target=self._run, name="edgelm-scheduler", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            pass_interrupts_on(error)
            raise EdgelmError(
                "this process cannot start the scheduler's thread: raise the limit of its processes (ulimit -u, "
                "pids.max)"
            ) from None
        _threads.add(self)
        watch_forks(self)

    @property
    def waiting(self) -> int:
        """Number of submissions that have not begun, or not with all their rows."""
        return self._inbox.qsize() + len(self._waiting)

    @property
    def free_rows(self) -> int:
        """Rows for further texts."""
        return self._together.scheduler.free_rows

    def requests(self, run: TextRun) -> list[Request]:
        """A request for each row of `run`; raises as `Scheduler.request`."""
        return self._together.requests(run)

    def seconds_until(self, ends: int) -> float:
        """How long `ends` generations take to end, at the speed of the latest ones."""
        try:
            first, counted = self._times[0], len(self._times) - 1
        except IndexError:  # the thread clears them
            return 0.0
        return ends * (time.monotonic() - first) / max(1, counted)

    def submit(self, scheduled: ScheduledRun) -> None:
        """Queue a run. If the thread has ended meanwhile, the run gets a ClosedError."""
        self._inbox.put(scheduled)
        if self.ended:
            self._refuse(_closed())

    def retire(self) -> None:
        """End once nothing is left to do, without waiting here."""
        self._is_retired = True
        self._inbox.put(None)

    def close(self, drain_seconds: float) -> None:
        """Cancel everything after `drain_seconds`, end, and wait for that, unless this thread itself calls."""
        self._cancel_at = time.monotonic() + drain_seconds
        self.retire()
        if threading.current_thread() is not self._thread:
            self._thread.join(_CLOSE_SECONDS)
            if self._thread.is_alive():
                logger.warning("the scheduler's thread still computes after %d s; it ends after that", _CLOSE_SECONDS)

    def stop_for_the_end(self) -> None:
        """When the program ends: end after this step, and deliver nothing more."""
        for scheduled in [*self._open.values()]:
            scheduled.abandoned = True
        self._inbox.put(None)

    def wait_for_the_end(self, seconds: float) -> None:
        """Wait until the thread has ended, but only so long."""
        self._thread.join(seconds)

    def after_fork(self) -> None:
        """In a forked child: there is no thread."""
        self.ended = True
        _threads.discard(self)

    def _run(self) -> None:
        failure: BaseException = _closed()
        try:
            self._serve()
        except EdgelmError as error:
            failure = error
        except BaseException as error:
            pass_interrupts_on(error)
            logger.error("the scheduler's thread ended by an error", exc_info=error)
            failure = error
        finally:
            self.ended = True
            if not _program_ends:
                self._refuse(failure)

    def _serve(self) -> None:
        while not _program_ends:
            self._receive()
            if self._is_retired and not self._open and self._inbox.empty():
                return
            self._end_what_is_due()
            self._start_waiting()
            self._step()
            self._waker.wake()

    def _receive(self) -> None:
        """Take what was submitted; wait for it if there is nothing else to do."""
        idle = not self._open
        while True:
            try:
                scheduled = self._inbox.get(block=idle)
            except Empty:
                return
            if idle:
                self._times.clear()
                self._times.append(time.monotonic())
            idle = False
            if scheduled is None or scheduled.done:
                continue
            self._open[scheduled.run] = scheduled
            self._waiting.put(scheduled.key, scheduled)
            if scheduled.deadline is not None:
                entry = scheduled.deadline, next(self._numbers), weakref.ref(scheduled)
                heapq.heappush(self._deadlines, entry)

    def _end_what_is_due(self) -> None:
        while self.cancelled:
            self._end(self.cancelled.popleft(), "cancelled")
        now = time.monotonic()
        while self._deadlines and self._deadlines[0][0] <= now:
            late = heapq.heappop(self._deadlines)[2]()
            if late is not None:
                self._end(late, "time")
        if self._cancel_at is not None and now >= self._cancel_at:
            for scheduled in [*self._open.values()]:
                self._end(scheduled, "cancelled")

    def _end(self, scheduled: ScheduledRun, reason: FinishReason) -> None:
        """End all rows of a run that are not finished."""
        if scheduled.done:
            return
        run = scheduled.run
        rows = [*self._together.remove(run), *range(scheduled.rows_given, len(scheduled.requests))]
        self._waiting.remove(scheduled.key, scheduled)
        for row in rows:
            self._deliver(scheduled, last_chunk(run, row, reason))

    def _start_waiting(self) -> None:
        """Give the id-level scheduler what it can use in the next step; it has no order of its own but this one."""
        scheduler = self._together.scheduler
        while self._waiting and scheduler.free_rows and scheduler.waiting_tokens < PREFILL_CHUNK_TOKENS:
            scheduled = self._waiting.take()
            first = scheduled.rows_given
            scheduled.rows_given = min(len(scheduled.requests), first + scheduler.free_rows)
            for row in range(first, scheduled.rows_given):
                self._together.add(scheduled.run, row, scheduled.requests[row], key=scheduled.key)
            if scheduled.rows_given < len(scheduled.requests):
                self._waiting.put_first(scheduled.key, scheduled)

    def _step(self) -> None:
        try:
            results = self._together.step()
        except (ClosedError, ForkError):
            raise
        except EdgelmError as error:
            # The prompt that is being computed is the likeliest cause. Without one, no text can go on.
            run = self._together.run_of_prompt()
            for scheduled in [*self._open.values()] if run is None else [self._open[run]]:
                if scheduled.rows_given:
                    self._fail(scheduled, error)
            return
        for run, result in results:
            if isinstance(result, Exception):
                self._waiting.remove(self._open[run].key, self._open[run])
            self._deliver(self._open[run], result)

    def _fail(self, scheduled: ScheduledRun, failure: BaseException) -> None:
        self._together.remove(scheduled.run)
        self._waiting.remove(scheduled.key, scheduled)
        self._deliver(scheduled, _for_one_reader(failure))

    def _deliver(self, scheduled: ScheduledRun, result: Chunk | Exception) -> None:
        waiter = scheduled.deliver(result)
        if waiter is not None:
            self._waker.add(waiter)
        if scheduled.done:
            self._open.pop(scheduled.run, None)
            self._times.append(time.monotonic())

    def _refuse(self, failure: BaseException) -> None:
        """Give an error to everything that is open or was submitted and not seen."""
        waker = LoopWaker()  # a submitting thread may be here at the same time as this one
        while True:
            try:
                scheduled = self._inbox.get_nowait()
            except Empty:
                break
            if scheduled is not None:
                self._open[scheduled.run] = scheduled
        while self._open:
            try:
                scheduled = self._open.popitem()[1]
            except KeyError:
                break
            waiter = scheduled.deliver(_for_one_reader(failure))
            if waiter is not None:
                waker.add(waiter)
        waker.wake()


def _closed() -> ClosedError:
    return ClosedError("the scheduler is closed: make a new one")


def _for_one_reader(failure: BaseException) -> Exception:
    """An exception that one reader may raise, while other readers raise others of the same failure."""
    if isinstance(failure, EdgelmError):
        return type(failure)(*failure.args)
    error = EdgelmError(f"a step of the scheduler failed, and all its texts with it: {shown(failure)}")
    error.__cause__ = failure
    return error


def _stop_at_the_end() -> None:
    """End all threads before native calls are stopped, so that none of them is inside one."""
    global _program_ends
    _program_ends = True
    notice_fork()
    threads = [*_threads]
    for thread in threads:
        thread.stop_for_the_end()
    for thread in threads:
        thread.wait_for_the_end(_END_SECONDS)


atexit.register(_stop_at_the_end)
