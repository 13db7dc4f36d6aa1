"""Raise an exception from a signal handler at random moments of load, generation, batches, scoring and close.

    python -m benchmarks.interrupts [BUNDLE] [--interrupts N]

Each exception must arrive as it was raised, and afterwards the model must generate the same text and close at once from
another thread. Prints how the resident memory grew. Needs POSIX signals.
"""

import argparse
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import edgelm
from edgelm.engine.memory import resident_bytes

PROMPT = "Once upon a time"
PATIENCE_SECONDS = 30


class OwnException(Exception):
    """As Celery's soft time limit."""


class OwnBaseException(BaseException):
    """As gevent's timeout."""


CLASSES = (OwnException, OwnBaseException, TimeoutError, KeyboardInterrupt, ValueError, RuntimeError, SystemExit)


class Raiser:
    """A signal handler that raises an exception.

    Attributes:
        exception: what it raises.
        where: the calls that it interrupted, once it has raised.
    """

    def __init__(self, exception: BaseException) -> None:
        self.exception, self.where = exception, ""

    def __call__(self, _signal: int, frame: FrameType | None) -> None:
        self.where = "".join(traceback.format_stack(frame, 12))
        raise self.exception


@contextmanager
def raised_after(seconds: float, handler: Raiser) -> Iterator[None]:
    """Have the signal come in about `seconds`, if this block still runs then."""
    previous = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@contextmanager
def raised_at(step: int, handler: Raiser) -> Iterator[None]:
    """Have the signal come at the call or return of number `step`, where Python looks for signals."""
    steps = 0

    def profile(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal steps
        if event in ("call", "c_return"):
            steps += 1
            if steps == step:
                sys.setprofile(None)
                signal.raise_signal(signal.SIGALRM)

    previous = signal.signal(signal.SIGALRM, handler)
    try:
        sys.setprofile(profile)
        yield
    finally:
        sys.setprofile(None)
        signal.signal(signal.SIGALRM, previous)


def uses(bundle: str | None, folder: Path) -> dict[str, Callable[[edgelm.Model], object]]:
    """What a program may be doing when a signal comes, by name; each takes a loaded model."""

    def load(_: edgelm.Model) -> None:
        with edgelm.load(bundle, threads=1) as other:
            other.generate(PROMPT, max_new_tokens=2)

    def stream(model: edgelm.Model) -> None:
        for _ in model.stream(PROMPT, max_new_tokens=6):
            pass

    return {
        "load": load,
        "stream": stream,
        "long prompt": lambda model: model.generate(PROMPT * 4, max_new_tokens=1),
        "tokenize": lambda model: model.tokenizer.decode(model.tokenizer.encode(PROMPT * 50)),
        "sample": lambda model: model.generate(
            PROMPT, max_new_tokens=8, do_sample=True, top_p=0.9, stop_strings=["zz"]
        ),
        "beams": lambda model: model.generate(PROMPT, max_new_tokens=4, num_beams=3),
        "batch": lambda model: model.generate_batch([PROMPT, "a", "the"], max_new_tokens=5),
        "choose": lambda model: model.choose(PROMPT, ["a", "the"]),
        "perplexity": lambda model: model.perplexity(PROMPT),
        "state": lambda model: model.load_state(saved(model, folder / "state")),
    }


def saved(model: edgelm.Model, path: Path) -> Path:
    model.save_state(path, PROMPT)
    return path


class Interrupter:
    """Interrupts one model again and again, and counts.

    Attributes:
        arrived: how many exceptions arrived.
    """

    def __init__(self, bundle: str | None, chance: random.Random, folder: Path) -> None:
        self._bundle, self._chance = bundle, chance
        self._uses = uses(bundle, folder)
        self.arrived = 0
        self._in_finalizers: list[str] = []  # Python itself drops exceptions there
        sys.unraisablehook = lambda lost: self._in_finalizers.append(str(lost.exc_value))
        self._load()
        self._seconds, self._steps = dict[str, float](), dict[str, int]()
        for name, use in self._uses.items():
            use(self._model)
            started = time.perf_counter()
            use(self._model)
            self._seconds[name] = time.perf_counter() - started
            self._steps[name] = count_steps(lambda use=use: use(self._model))  # type: ignore[misc]

    def interrupt(self) -> None:
        """Interrupt one use at a random moment, and check what is left."""
        name = self._chance.choice(list(self._uses))
        handler = Raiser(self._chance.choice(CLASSES)("from a signal"))
        if self._chance.random() < 0.5:
            moment = raised_after(max(1e-5, self._chance.random() * self._seconds[name]), handler)
        else:
            moment = raised_at(self._chance.randint(1, self._steps[name]), handler)
        before = len(self._in_finalizers)
        arrived = False
        try:
            with moment:
                self._uses[name](self._model)
        except BaseException as error:
            if error is not handler.exception:
                raise AssertionError(f"{handler.exception!r} became {error!r} in {name!r}:\n{handler.where}") from error
            arrived = True
            error.__traceback__ = None
        self.arrived += arrived
        if handler.where and not arrived and len(self._in_finalizers) == before:
            raise AssertionError(f"{handler.exception!r} was swallowed in {name!r}:\n{handler.where}")
        if self._text() != self._expected:
            raise AssertionError(f"another text after an interrupted {name!r}")
        if self._chance.random() < 0.05:
            self.close()
            self._load()

    def close(self) -> None:
        """Close the model from another thread."""
        closing = threading.Thread(target=self._model.close, daemon=True)
        closing.start()
        closing.join(PATIENCE_SECONDS)
        if closing.is_alive():
            raise AssertionError("close() waits for a call that was interrupted")

    def _load(self) -> None:
        self._model = edgelm.load(self._bundle, threads=1)
        self._expected = self._text()

    def _text(self) -> str:
        return str(self._model.generate(PROMPT, max_new_tokens=5))


def count_steps(use: Callable[[], object]) -> int:
    """How many calls and returns `use` has."""
    steps = 0

    def profile(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal steps
        steps += event in ("call", "c_return")

    sys.setprofile(profile)
    try:
        use()
    finally:
        sys.setprofile(None)
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description="Raise exceptions from signal handlers at random moments.")
    parser.add_argument("bundle", nargs="?", metavar="BUNDLE", help="default: the embedded model")
    parser.add_argument("--interrupts", type=int, default=10_000, metavar="N", help="default %(default)s")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        interrupter = Interrupter(options.bundle, random.Random(0), Path(folder))
        started, tenth = time.perf_counter(), max(1, options.interrupts // 10)
        for number in range(1, options.interrupts + 1):
            interrupter.interrupt()
            if number % tenth == 0:
                seconds = time.perf_counter() - started
                memory_mb = resident_bytes() / 1e6
                print(f"{number} moments, {interrupter.arrived} exceptions, {memory_mb:.1f} MB, {seconds:.0f} s")
        interrupter.close()


if __name__ == "__main__":
    main()
