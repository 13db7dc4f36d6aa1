"""Runs mutated inputs through a target in worker processes, and counts what happens.

A worker that crashes or hangs costs one input, which is a failure: the next worker goes on behind it. Input K of a
target is the same for the same seed, whatever the number of workers.
"""

import multiprocessing
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from ctypes import c_longlong
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from edgelm.engine.memory import peak_rss_bytes
from tests.fuzz.mutations import Mutator

CORPUS = Path(__file__).parent / "corpus"

SLOW_SECONDS = 5.0
"""An input that takes a reader more seconds than this, of CPU time, is a failure."""
HANG_SECONDS = 60.0
"""A worker is ended after this time on one input. It is longer, because on a busy machine the CPU may be elsewhere."""
START_SECONDS = 300.0
"""A worker that has not begun its first input after this time is ended."""
MEMORY_BYTES = 256 * 2**20
"""A reader may take this much memory, and the size of its input."""
MAX_INPUT_BYTES = 2**24
"""Longer inputs are cut; whole files are much shorter."""
GROWN_BYTES = 2**20
"""An input that has grown beyond this is not mutated again."""
ADDRESS_SPACE_BYTES = 8 * 2**30
"""Workers have no more, so that an input that asks for all memory fails by itself."""
MAX_FAILURES = 20
"""A run ends after this many."""

Cell = Any
"""A ``multiprocessing`` array of whole numbers that a worker shares with its parent."""
_CURRENT, _STARTED, _ACCEPTED, _REFUSED, _SLOWEST_NS, _SLOWEST_INPUT, _MEMORY = range(7)


class Target:
    """Something that reads untrusted bytes. Subclasses say what; each worker makes one object."""

    name: str
    mutators: tuple[Mutator, ...]
    refusals: tuple[type[BaseException], ...]
    """Exceptions by which a reader refuses. Any other is a failure."""

    def seeds(self) -> list[bytes]:
        """Whole files, which mutations start from. Those that the reader must accept come first."""
        raise NotImplementedError

    def read(self, data: bytes) -> object:
        """Read `data`."""
        raise NotImplementedError

    def close(self) -> None:
        """Remove temporary files."""

    def corpus(self) -> list[bytes]:
        """The files in ``corpus/NAME``: small inputs that once broke a reader."""
        return [path.read_bytes() for path in sorted((CORPUS / self.name).glob("*"))]

    def input(self, seed: int, index: int, seeds: Sequence[bytes]) -> bytes:
        """Input number `index` of a run with `seed`: first `seeds` as they are, then mutations of them."""
        if index < len(seeds):
            return seeds[index]
        rng = random.Random(f"{self.name} {seed} {index}")
        data = rng.choice(seeds)
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            data = self.mutated(rng, data, seeds, rng.choice(self.mutators))[:MAX_INPUT_BYTES]
            if len(data) > GROWN_BYTES:  # a second mutation that grows so much would take minutes and gigabytes
                break
        return data

    def mutated(self, rng: random.Random, data: bytes, others: Sequence[bytes], mutator: Mutator) -> bytes:
        """Apply a mutator; another way where an input is more than one file."""
        return mutator(rng, data, others)


@dataclass
class Failure:
    """An input that broke something."""

    index: int
    what: str


@dataclass
class Report:
    """What a run found."""

    accepted: int = 0
    refused: int = 0
    failures: list[Failure] = field(default_factory=list)
    slowest_seconds: float = 0.0
    slowest_input: int = 0
    memory_bytes: int = 0
    """The most memory that reading an input took."""
    seconds: float = 0.0

    @property
    def count(self) -> int:
        """Number of inputs."""
        return self.accepted + self.refused + len(self.failures)


def fuzz(target: type[Target], count: int, seed: int = 0, jobs: int = 1, first: int = 0) -> Report:
    """Read the inputs `first` to `first` + `count` of a run with `seed`, in `jobs` processes side by side.

    KeyboardInterrupt ends the run early; what was read so far is reported.
    """
    started = time.perf_counter()
    edges = [first + count * job // jobs for job in range(jobs + 1)]
    workers = [_Worker(target, seed, start, stop) for start, stop in pairwise(edges)]
    report = Report()
    try:
        running = workers
        while running and len(report.failures) < MAX_FAILURES:
            time.sleep(0.05)
            running = [worker for worker in running if worker.watch(report)]
    except KeyboardInterrupt:
        pass  # what was read so far counts
    finally:
        for worker in workers:
            worker.end(report)
    report.failures.sort(key=lambda failure: failure.index)
    report.seconds = time.perf_counter() - started
    return report


class _Worker:
    """A process that reads the inputs `start` to `stop`, begun again behind an input that ends it."""

    def __init__(self, target: type[Target], seed: int, start: int, stop: int) -> None:
        self._target, self._seed, self._stop = target, seed, stop
        self._finished = False
        self._begin(start)

    def _begin(self, start: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._cells: Cell = context.RawArray(c_longlong, 7)
        self._cells[_CURRENT] = start
        self._pipe, far = context.Pipe(duplex=False)
        arguments = (self._target, self._seed, start, self._stop, self._cells, far)
        self._process = context.Process(target=_work, args=arguments, daemon=True)
        self._process.start()
        far.close()
        self._started = time.monotonic_ns()

    def watch(self, report: Report) -> bool:
        """Collect what the process found; returns whether it has more to read."""
        if self._finished:
            return False
        self._collect(report)
        current, running = self._cells[_CURRENT], self._process.is_alive()
        if running:
            began = self._cells[_STARTED]
            seconds = (time.monotonic_ns() - (began or self._started)) / 1e9
            if seconds < (HANG_SECONDS if began else START_SECONDS):
                return True
            self._process.kill()
            what = f"hangs: ended after {seconds:.0f} s"
        else:
            what = f"the process ended with status {self._process.exitcode}"
        self._process.join()
        self._collect(report)
        self._finished = not running and self._process.exitcode == 0
        if not self._finished:
            self._add(report)
            report.failures.append(Failure(current, what))
            self._finished = current + 1 == self._stop
            if not self._finished:
                self._begin(current + 1)
        return not self._finished

    def end(self, report: Report) -> None:
        """End the process, and add its counts to `report`."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._collect(report)
        self._add(report)

    def _collect(self, report: Report) -> None:
        try:
            while self._pipe.poll():
                report.failures.append(Failure(*self._pipe.recv()))
        except EOFError:
            pass

    def _add(self, report: Report) -> None:
        cells = self._cells
        report.accepted += cells[_ACCEPTED]
        report.refused += cells[_REFUSED]
        if cells[_SLOWEST_NS] / 1e9 > report.slowest_seconds:
            report.slowest_seconds, report.slowest_input = cells[_SLOWEST_NS] / 1e9, cells[_SLOWEST_INPUT]
        report.memory_bytes = max(report.memory_bytes, cells[_MEMORY])
        for cell in (_ACCEPTED, _REFUSED):
            cells[cell] = 0


def _work(target: type[Target], seed: int, start: int, stop: int, cells: Cell, pipe: Connection) -> None:
    """The life of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the run
    _limit_address_space()
    reader = target()
    try:
        seeds = reader.seeds()
        for data in seeds:
            _outcome(reader, data)
        corpus = [*seeds, *reader.corpus()]
        for index in range(start, stop):
            cells[_CURRENT], cells[_STARTED] = index, time.monotonic_ns()
            data = reader.input(seed, index, corpus)
            before = _peak_from_now_on()  # to make an input can take more memory than to read it
            began = time.process_time_ns()
            failed = _outcome(reader, data)
            took = time.process_time_ns() - began
            memory = peak_rss_bytes() - before
            if memory > max(cells[_MEMORY], MEMORY_BYTES + len(data)):
                failed = failed or f"took {memory:,} bytes of memory"
            cells[_MEMORY] = max(cells[_MEMORY], memory)
            if took > cells[_SLOWEST_NS]:
                cells[_SLOWEST_NS], cells[_SLOWEST_INPUT] = took, index
            if took > SLOW_SECONDS * 1e9:
                failed = failed or f"took {took / 1e9:.1f} s"
            if failed in ("", None):
                cells[_ACCEPTED if failed is None else _REFUSED] += 1
            else:
                pipe.send((index, failed))
    finally:
        reader.close()


def _peak_from_now_on() -> int:
    """The peak of this process's memory; on Linux, earlier peaks are forgotten first."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return peak_rss_bytes()


def _outcome(reader: Target, data: bytes) -> str | None:
    """Read `data`; returns None if it was accepted, "" if it was refused, and otherwise what went wrong."""
    try:
        reader.read(data)
    except reader.refusals as error:
        message = str(error)
        return "" if message and "\n" not in message else f"{type(error).__name__} of another form than one line"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


def _limit_address_space() -> None:
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))


@contextmanager
def failing_input(target: type[Target], seed: int, index: int) -> Iterator[bytes]:
    """Input number `index` of a run with `seed`, to look at."""
    reader = target()
    try:
        yield reader.input(seed, index, [*reader.seeds(), *reader.corpus()])
    finally:
        reader.close()
