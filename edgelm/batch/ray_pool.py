"""Rows on a Ray cluster: an actor for each group of cores, each with a model of its own. Nothing else knows Ray.

A row is one call of an actor. When an actor dies, its rows are computed by the others, and a new actor takes its place.
"""

import logging
import os
import pickle
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgelm.batch.answers import Answer, RowAnswerer
from edgelm.batch.pool import TICK_SECONDS, rows_at_a_time
from edgelm.batch.rows import Job
from edgelm.errors import ConfigError, EdgelmError, install_hint, pass_interrupts_on, shown

if TYPE_CHECKING:
    from edgelm.model import Model

LOCAL = "local"
"""The address of a cluster that is started on this machine, and ends with the run."""
MOST_LOSSES = 4
"""How many workers may die with the same row, or one after another while they load, before the run ends."""


class BatchWorker:
    """What an actor does. The methods run in its process."""

    def open(self, model: bytes, job: Job) -> None:
        """Load the model that `model` is a pickle of. Raises the errors of `edgelm.load`."""
        self._answerer = RowAnswerer(pickle.loads(model), job)

    def answer(self, number: int, line: bytes) -> Answer:
        """As `RowAnswerer.answer`; as many calls at a time as the actor was given threads for."""
        return self._answerer.answer(number, line)


@dataclass(eq=False, slots=True)
class _Worker:
    """An actor, as this process knows it."""

    actor: Any
    rows: int = 0
    """How many rows it was given that did not come back."""
    is_ready: bool = False
    """Whether it has loaded the model."""
    is_dead: bool = False


@dataclass(frozen=True, slots=True)
class _Call:
    """A call that is under way."""

    worker: _Worker
    row: tuple[int, bytes] | None
    """None for `BatchWorker.open`."""


class RayPool:
    """Actors of a Ray cluster; see `edgelm.batch.pool.Pool`."""

    def __init__(self, address: str, model: "Model", job: Job, *, workers: int | None, threads: int) -> None:
        """Connect to the cluster, and start the workers; `finished` then waits until they have loaded the model.

        Args:
            address: of the cluster, as `ray.init` takes it, or LOCAL.
            model: is pickled as the arguments of `edgelm.load`; the bundle must be found by the same path everywhere.
            job: what the workers do.
            workers: number of actors; None for as many as the cluster has room for.
            threads: number of CPUs that an actor occupies.

        Raises:
            ConfigError: the cluster has too few CPUs for the workers.
            EdgelmError: Ray is not installed, or there is no cluster.
        """
        self._packed, self._job, self._rows_each = pickle.dumps(model), job, rows_at_a_time(job)
        self._workers: list[_Worker] = []  # those that live
        self._calls: dict[Any, _Call] = {}
        self._lost: deque[tuple[int, bytes]] = deque()  # rows of dead workers
        self._losses: Counter[int] = Counter()  # how many workers died with a row
        self._dead_while_loading = 0  # one after another
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._ray = _connected(address, (workers or max(1, cpus // threads)) * threads)
        try:
            room = int(self._ray.cluster_resources().get("CPU", 0)) // threads
            if room < (workers or 1):
                raise ConfigError(
                    f"the cluster has CPUs for {room} workers of {threads} threads each: lower --workers or --threads"
                )
            self._actor = self._ray.remote(num_cpus=threads, max_concurrency=self._rows_each)(BatchWorker)
            for _ in range(workers or room):
                self._start_worker()
        except BaseException:
            self.close()
            raise
        self.capacity = len(self._workers) * self._rows_each

    @property
    def free(self) -> int:
        """As `Pool.free`."""
        return sum(self._rows_each - worker.rows for worker in self._workers if worker.is_ready) - len(self._lost)

    @property
    def open_rows(self) -> int:
        """As `Pool.open_rows`."""
        return sum(call.row is not None for call in self._calls.values()) + len(self._lost)

    def submit(self, number: int, line: bytes) -> None:
        """As `Pool.submit`; the worker with the fewest rows gets it."""
        worker = min((worker for worker in self._workers if worker.is_ready), key=lambda worker: worker.rows)
        self._calls[worker.actor.answer.remote(number, line)] = _Call(worker, (number, line))
        worker.rows += 1

    def finished(self) -> list[Answer]:
        """As `Pool.finished`. Raises EdgelmError if workers die again and again, and what a worker raises."""
        calls = list(self._calls)
        ready, _ = self._ray.wait(calls, num_returns=1, timeout=TICK_SECONDS)
        if ready:  # perhaps others are, too
            ready, _ = self._ray.wait(calls, num_returns=len(calls), timeout=0)
        answers = [answer for reference in ready if (answer := self._result(reference)) is not None]
        while self._lost and any(worker.is_ready for worker in self._workers):
            self.submit(*self._lost.popleft())
        return answers

    def close(self) -> None:
        """As `Pool.close`; a LOCAL cluster ends."""
        self._ray.shutdown()

    def _start_worker(self) -> None:
        worker = _Worker(self._actor.remote())
        self._workers.append(worker)
        self._calls[worker.actor.open.remote(self._packed, self._job)] = _Call(worker, None)

    def _result(self, reference: Any) -> Answer | None:
        """The answer of a call that has ended; None where it gave none."""
        call, errors = self._calls.pop(reference), self._ray.exceptions
        try:
            answer: Answer | None = self._ray.get(reference)
        except errors.RayTaskError as error:  # the method raised it
            cause = error.cause
            if isinstance(cause, EdgelmError):
                raise cause from None
            raise EdgelmError(f"a worker failed: {shown(cause)}") from None
        except errors.RayError as error:
            pass_interrupts_on(error)
            self._died(call)
            return None
        call.worker.rows -= call.row is not None
        if call.row is None:
            call.worker.is_ready, self._dead_while_loading = True, 0
        return answer

    def _died(self, call: _Call) -> None:
        """Note that a worker died during a call, each of which notices; have its row computed, and replace it once."""
        again = "see Ray's logs, and give the same command again to go on"
        if call.row is None:
            self._dead_while_loading += 1
            if self._dead_while_loading == MOST_LOSSES:
                raise EdgelmError(f"{MOST_LOSSES} workers died one after another while they loaded the model: {again}")
        else:
            number = call.row[0]
            self._losses[number] += 1
            if self._losses[number] == MOST_LOSSES:
                raise EdgelmError(f"{MOST_LOSSES} workers died while they computed line {number}: {again}")
            self._lost.append(call.row)
        if not call.worker.is_dead:
            call.worker.is_dead = True
            self._workers.remove(call.worker)
            self._start_worker()


def _connected(address: str, local_cpus: int) -> Any:
    """The module `ray`, connected to the cluster at `address`; a LOCAL one gets `local_cpus` CPUs to divide."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # edgelm asks no network that its command does not name
    try:
        import ray
    except ModuleNotFoundError:
        raise EdgelmError(f"--ray needs Ray; {install_hint('cpu,ray')}") from None
    own = {"num_cpus": local_cpus, "include_dashboard": False} if address == LOCAL else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (OSError, ValueError, RuntimeError) as error:  # ConnectionError is an OSError
        pass_interrupts_on(error)
        raise EdgelmError(
            f"there is no Ray cluster at {address!r} ({shown(str(error))}): start one with `ray start --head`, or give "
            "--ray local"
        ) from None
    return ray
