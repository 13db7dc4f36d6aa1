"""The thread that computes for a `TextScheduler`: it takes submissions in turn, decodes them, and delivers chunks."""

import atexit
import logging
import math
import threading
import time
import weakref
from collections import deque
from queue import Empty

from edgelm.decoding.request import FinishReason, Request
from edgelm.engine.fork import notice_fork, watch_forks
from edgelm.errors import ClosedError, EdgelmError, ForkError, pass_interrupts_on, shown
from edgelm.generation.fair_queue import FairQueue
from edgelm.generation.results import Chunk
from edgelm.generation.run import TextRun
from edgelm.generation.runs_together import RunsTogether
from edgelm.generation.submission import LoopWaker, Mailbox, ScheduledRun
from edgelm.ids import PREFILL_CHUNK_TOKENS

logger = logging.getLogger(__name__)

RECENT_ENDS = 32
"""The speed of the queue is measured over this number of the latest generations."""
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
        """Start the thread. Raises EdgelmError if the system refuses one."""
        self.ended = False
        """Whether the thread takes no more submissions."""
        self.mailbox = Mailbox()
        self._together: RunsTogether | None = together  # None once the thread has ended, which frees the batch
        self._waiting: FairQueue[ScheduledRun] = FairQueue()  # runs with rows that the id-level scheduler has not
        self._open: dict[TextRun, ScheduledRun] = {}  # all that came and are not done
        self._next_deadline = math.inf  # of those that are open
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
        return self.mailbox.arrived.qsize() + len(self._waiting)

    @property
    def free_rows(self) -> int:
        """Rows for further texts."""
        together = self._together
        return 0 if together is None else together.scheduler.free_rows

    def requests(self, run: TextRun) -> list[Request]:
        """A request for each row of `run`; raises as `Scheduler.request`, and ClosedError if the thread has ended."""
        together = self._together
        if together is None:
            check_program_goes_on()
            raise _closed()
        return together.requests(run)

    def seconds_until(self, ends: int) -> float:
        """How long `ends` generations take to end, at the speed of the latest ones."""
        try:
            first, counted = self._times[0], len(self._times) - 1
        except IndexError:  # the thread clears them
            return 0.0
        return ends * (time.monotonic() - first) / max(1, counted)

    def submit(self, scheduled: ScheduledRun) -> None:
        """Queue a run. If the thread has ended meanwhile, the run gets a ClosedError."""
        self.mailbox.arrived.put(scheduled)
        if self.ended and not _program_ends:
            self._refuse_arrived(_closed())

    def retire(self) -> None:
        """End once nothing is left to do, without waiting here."""
        self._is_retired = True
        self.mailbox.arrived.put(None)

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
        self.mailbox.is_abandoned = True
        self.mailbox.arrived.put(None)

    def wait_for_the_end(self, seconds: float) -> None:
        """Wait until the thread has ended, but only so long."""
        self._thread.join(seconds)

    def after_fork(self) -> None:
        """In a forked child: there is no thread."""
        self.ended = True
        _threads.discard(self)

    def _run(self) -> None:
        together, failure = self._together, _closed()
        assert together is not None
        try:
            self._serve(together)
        except EdgelmError as error:
            failure = error
        except BaseException as error:
            pass_interrupts_on(error)
            logger.error("a step of the scheduler failed, and all its texts with it", exc_info=error)
            failure = EdgelmError(f"a step of the scheduler failed, and all its texts with it: {shown(error)}")
        finally:
            self.ended = True
            self._together = None
            if not _program_ends:
                for scheduled in self._open.values():
                    scheduled.deliver(_for_one_reader(failure), self._waker)
                self._open.clear()
                self._waker.wake()
                self._refuse_arrived(failure)

    def _serve(self, together: RunsTogether) -> None:
        while not _program_ends:
            self._receive()
            if self._is_retired and not self._open and self.mailbox.arrived.empty():
                return
            self._end_what_is_due(together)
            self._start_waiting(together)
            self._step(together)
            self._waker.wake()

    def _receive(self) -> None:
        """Take what was submitted; wait for it if there is nothing else to do."""
        idle = not self._open and not self._is_retired
        while True:
            try:
                scheduled = self.mailbox.arrived.get(block=idle)
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
            self._next_deadline = min(self._next_deadline, scheduled.deadline)

    def _end_what_is_due(self, together: RunsTogether) -> None:
        while self.mailbox.cancelled:
            self._end(together, self.mailbox.cancelled.popleft(), "cancelled")
        now = time.monotonic()
        if now >= self._next_deadline:
            for scheduled in [each for each in self._open.values() if now >= each.deadline]:
                self._end(together, scheduled, "time")
            self._next_deadline = min((each.deadline for each in self._open.values()), default=math.inf)
        if self._cancel_at is not None and now >= self._cancel_at:
            for scheduled in [*self._open.values()]:
                self._end(together, scheduled, "cancelled")

    def _end(self, together: RunsTogether, scheduled: ScheduledRun, reason: FinishReason) -> None:
        """End all rows of a run that are not finished."""
        if scheduled.done:
            return
        rows_left = range(scheduled.rows_given, len(scheduled.requests))
        for result in together.end(scheduled.run, rows_left, reason):
            self._deliver(scheduled, result)

    def _start_waiting(self, together: RunsTogether) -> None:
        """Give the id-level scheduler what it can use in the next step; it has no order of its own but this one."""
        scheduler = together.scheduler
        while self._waiting and scheduler.free_rows and scheduler.waiting_tokens < PREFILL_CHUNK_TOKENS:
            scheduled = self._waiting.take()
            first = scheduled.rows_given
            scheduled.rows_given = min(len(scheduled.requests), first + scheduler.free_rows)
            for row in range(first, scheduled.rows_given):
                together.add(scheduled.run, row, scheduled.requests[row], key=scheduled.key)
            if scheduled.rows_given < len(scheduled.requests):
                self._waiting.put_first(scheduled.key, scheduled)

    def _step(self, together: RunsTogether) -> None:
        try:
            results = together.step()
        except (ClosedError, ForkError):
            raise
        except EdgelmError as error:
            # The prompt that is being computed is the likeliest cause. Without one, no text can go on.
            run = together.run_of_prompt()
            for scheduled in [*self._open.values()] if run is None else [self._open[run]]:
                if scheduled.rows_given:
                    together.remove(scheduled.run)
                    self._deliver(scheduled, _for_one_reader(error))
            return
        for run, result in results:
            self._deliver(self._open[run], result)

    def _deliver(self, scheduled: ScheduledRun, result: Chunk | Exception) -> None:
        scheduled.deliver(result, self._waker)
        if scheduled.done:
            self._waiting.discard(scheduled.key, scheduled)  # other rows of a run that failed
            self._open.pop(scheduled.run, None)
            self._times.append(time.monotonic())

    def _refuse_arrived(self, failure: EdgelmError) -> None:
        """Give an error to runs that arrived too late. The thread does this when it ends, and later each submitter."""
        waker = LoopWaker()
        while True:
            try:
                scheduled = self.mailbox.arrived.get_nowait()
            except Empty:
                break
            if scheduled is not None and not scheduled.done:
                scheduled.deliver(_for_one_reader(failure), waker)
        waker.wake()


def check_program_goes_on() -> None:
    """When the program ends, raise ClosedError in its main thread, and stop daemon threads in silence."""
    if _program_ends:
        if threading.current_thread() is threading.main_thread():
            raise ClosedError("the program ends, so a scheduler takes nothing more")
        threading.Event().wait()


def _closed() -> EdgelmError:
    return ClosedError("the scheduler is closed: make a new one")


def _for_one_reader(failure: EdgelmError) -> EdgelmError:
    """The same error for one of several readers, each of whom raises an object of its own."""
    return type(failure)(*failure.args)


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
