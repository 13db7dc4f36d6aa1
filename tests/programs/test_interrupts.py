"""An exception that a signal handler raises passes unchanged, at any moment, and nothing is left locked or lost."""

import ast
import random
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

import pytest

import edgelm
from benchmarks.interrupts import Interrupter, uses
from edgelm.bundle.small_files import is_folder
from edgelm.decoding.scheduler import Scheduler
from edgelm.errors import TokenizerError, pass_interrupts_on
from edgelm.text.rust import rust_errors
from tests.conftest import ROOT, TINY_BUNDLE

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="signals of POSIX")

PROMPT = "Once upon a time"
BROAD = {"OSError", "ValueError", "RuntimeError", "TimeoutError", "Exception", "BaseException"}


def test_interrupts_at_random_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m benchmarks.interrupts` does the same 10,000 times, and prints the memory."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # put back afterwards
    interrupter = Interrupter(str(TINY_BUNDLE), random.Random(), tmp_path)
    for _ in range(200):
        interrupter.interrupt()
    interrupter.close()
    assert interrupter.arrived > 50


class Searches:
    """A finder that finds nothing, and writes down what it was asked for."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def find_spec(self, name: str, *_path: object) -> None:
        self.names.append(name)


def test_no_use_searches_for_a_module_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's search for a module drops a handler's TimeoutError, as it does with every OSError."""
    searches = Searches()
    with edgelm.load(TINY_BUNDLE, threads=1) as model:
        for use in uses(str(TINY_BUNDLE), tmp_path).values():
            use(model)  # imports on first use
        monkeypatch.setattr(sys, "meta_path", [searches, *sys.meta_path])
        for use in uses(str(TINY_BUNDLE), tmp_path).values():
            use(model)
    assert searches.names == []


def raised_by_handler(exception: BaseException, *, deeper: bool = False) -> None:
    """Raise `exception` from a signal handler."""

    def fail() -> None:
        raise exception

    def handler(*arguments: object) -> None:
        if deeper:
            fail()
        raise exception

    previous = signal.signal(signal.SIGUSR1, handler)
    try:
        signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, previous)


@pytest.mark.parametrize("deeper", [False, True])
def test_what_a_handler_raised_is_told_from_what_code_raised(deeper: bool) -> None:
    interrupt = TimeoutError("soft limit")
    try:
        raised_by_handler(interrupt, deeper=deeper)
    except OSError as error:
        with pytest.raises(TimeoutError) as passed:
            pass_interrupts_on(error)
        assert passed.value is interrupt
    try:
        Path("/no/such/file").read_text(encoding="utf-8")
    except OSError as error:
        pass_interrupts_on(error)


@pytest.mark.parametrize("exception", [KeyboardInterrupt(), SystemExit(3), ValueError("x"), GeneratorExit()])
def test_a_tokenizer_error_is_never_made_of_a_handlers_exception(exception: BaseException) -> None:
    with pytest.raises(type(exception)) as passed, rust_errors(TokenizerError, "it fails", "change it"):
        raised_by_handler(exception)
    assert passed.value is exception


def test_a_panic_is_a_tokenizer_error_and_another_libraries_base_exception_is_not() -> None:
    class PanicException(BaseException):
        """Rust's has this name, and cannot be imported."""

    class Cancelled(BaseException):
        """As trio's and gevent's."""

    with pytest.raises(TokenizerError, match="index out of range"), rust_errors(TokenizerError, "it fails", "change"):
        raise PanicException("index out of range")
    with pytest.raises(Cancelled), rust_errors(TokenizerError, "it fails", "change it"):
        raise Cancelled


def test_every_broad_except_lets_interrupts_pass() -> None:
    """Commands and `ort_probe` are left out: they are programs, and have no handlers of a caller."""
    wrong = []
    for path in sorted((ROOT / "edgelm").rglob("*.py")):
        if "cli" in path.relative_to(ROOT / "edgelm").parts or path.name == "ort_probe.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ExceptHandler):
                continue
            caught = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} if node.type else {"BaseException"}
            first, last = ast.unparse(node.body[0]), ast.unparse(node.body[-1])
            if caught & BROAD and last != "raise" and not first.startswith("pass_interrupts_on("):
                wrong.append(f"{path.name}:{node.lineno}")
    assert wrong == []


def test_files_are_asked_for_in_a_way_that_lets_interrupts_pass() -> None:
    """`Path.exists`, `is_dir` and `is_file` answer False for some exceptions of a handler: `small_files.status_of`."""
    wrong = []
    for path in sorted((ROOT / "edgelm").rglob("*.py")):
        if {"cli", "serve"} & set(path.relative_to(ROOT / "edgelm").parts):  # programs
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ("exists", "is_dir", "is_file"):
                wrong.append(f"{path.name}:{node.lineno}")
    assert wrong == []


@pytest.mark.parametrize("interrupt", [ValueError("late"), FileNotFoundError(2, "late")], ids=repr)
def test_an_interrupt_in_the_middle_of_asking_for_a_file(
    interrupt: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: object) -> None:
        raised_by_handler(interrupt)

    assert not is_folder(tmp_path / "none") and is_folder(tmp_path) and not is_folder("\0")
    monkeypatch.setattr("os.stat", interrupted)
    with pytest.raises(type(interrupt)) as passed:
        is_folder(tmp_path)
    assert passed.value is interrupt


def test_close_from_a_handler_while_another_thread_generates() -> None:
    """Neither waits for a lock that the other holds."""
    model = edgelm.load(TINY_BUNDLE, threads=1)
    ends: list[str] = []

    def work() -> None:
        try:
            while True:
                model.generate(PROMPT, max_new_tokens=8)
        except edgelm.ClosedError:
            ends.append("closed")

    def handler(_signal: int, _frame: FrameType | None) -> None:
        model.close()

    thread = threading.Thread(target=work, daemon=True)
    previous = signal.signal(signal.SIGALRM, handler)
    try:
        thread.start()
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(edgelm.ClosedError):
            while True:
                model.generate(PROMPT, max_new_tokens=8)
    finally:
        signal.signal(signal.SIGALRM, previous)
    thread.join(30)
    assert ends == ["closed"]


def test_a_scheduler_that_was_interrupted_says_so() -> None:
    """Its texts may lack a token, so it must not go on."""
    interrupt = TimeoutError("soft limit")

    def interrupted(_ids: object, logits: object) -> object:
        raised_by_handler(interrupt)
        return logits

    with edgelm.load(TINY_BUNDLE, threads=1) as model:
        scheduler = Scheduler(model.session.sibling())
        config = edgelm.GenerationConfig(max_new_tokens=4, logits_processor=(interrupted,))  # type: ignore[arg-type]
        scheduler.submit(model.tokenizer.encode(PROMPT), config, 0)
        with pytest.raises(TimeoutError) as passed:
            scheduler.step()
        assert passed.value is interrupt
        with pytest.raises(edgelm.ClosedError, match="interrupted in the middle of a step: make a new one"):
            scheduler.step()
