"""Rows go to workers and come back as answers, in the order of the input or as they come."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Protocol

from edgelm.batch.answers import Answer, RowAnswerer
from edgelm.batch.rows import Job

if TYPE_CHECKING:
    from edgelm.model import Model

HELD_ROWS = 64
"""How many answers for each row that a worker takes may wait for an earlier one, in the order of the input."""
TICK_SECONDS = 0.5
"""How long `Pool.finished` waits at most, so that progress is shown and signals are noticed."""


class Pool(Protocol):
    """Workers that compute rows."""

    @property
    def capacity(self) -> int:
        """How many rows the workers take at a time, once all of them work."""

    @property
    def free(self) -> int:
        """How many further rows the workers take now."""

    @property
    def open_rows(self) -> int:
        """How many rows were given to `submit` and did not come back."""

    def submit(self, number: int, line: bytes) -> None:
        """Give line `number` to a worker; allowed while `free` is above 0."""

    def finished(self) -> list[Answer]:
        """The answers that have come; waits for one, but not for long. Raises what ends the run."""

    def close(self) -> None:
        """Stop the workers, whatever they compute."""


class ThreadPool:
    """The threads of this process, with one model, whose texts decode side by side."""

    def __init__(self, model: "Model", job: Job) -> None:
        """`model` stays the caller's. Raises ConfigError as `RowAnswerer`."""
        self._answerer = RowAnswerer(model, job)
        self.capacity = rows_at_a_time(job)
        self._threads = ThreadPoolExecutor(self.capacity, "edgelm-batch")
        self._come: SimpleQueue[Future[Answer]] = SimpleQueue()
        self.open_rows = 0

    @property
    def free(self) -> int:
        """As `Pool.free`."""
        return self.capacity - self.open_rows

    def submit(self, number: int, line: bytes) -> None:
        """As `Pool.submit`."""
        self._threads.submit(self._answerer.answer, number, line).add_done_callback(self._come.put)
        self.open_rows += 1

    def finished(self) -> list[Answer]:
        """As `Pool.finished`."""
        answers: list[Answer] = []
        try:
            answers.append(self._come.get(timeout=TICK_SECONDS).result())
            self.open_rows -= 1
            while True:
                answers.append(self._come.get_nowait().result())
                self.open_rows -= 1
        except Empty:
            return answers

    def close(self) -> None:
        """As `Pool.close`; waits for the scores that are being computed, and a token of every text."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._answerer.close()
        self._threads.shutdown()


def rows_at_a_time(job: Job) -> int:
    """How many rows a worker takes: those that it decodes, and as many that wait for their place."""
    return 2 * job.max_rows


def answers(
    pool: Pool, rows: Iterator[tuple[int, bytes]], *, ordered: bool, tell: Callable[[], None] = lambda: None
) -> Iterator[Answer]:
    """The answers of `pool` to `rows`, each with its number; with `ordered` in the order of the rows.

    A long text holds later answers up only where they are `ordered`: after HELD_ROWS of them for each row that the
    workers take, no further row begins. `tell` is called twice a second or more often. Raises what ends the run.
    """
    asked: deque[int] = deque()  # numbers of rows whose answers are to come, in the order of the input
    held: dict[int, Answer] = {}
    most_held = HELD_ROWS * pool.capacity
    exhausted = False
    while True:
        while not exhausted and pool.free > 0 and len(held) < most_held:
            row = next(rows, None)
            if row is None:
                exhausted = True
                break
            pool.submit(*row)
            if ordered:
                asked.append(row[0])
        if exhausted and not pool.open_rows:
            return
        for answer in pool.finished():
            if not ordered:
                yield answer
                continue
            held[answer.number] = answer
            while asked and asked[0] in held:
                yield held.pop(asked.popleft())
        tell()
