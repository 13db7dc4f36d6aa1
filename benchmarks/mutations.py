"""Do the tests notice? Makes small errors in the code of a room, and counts those that a test of that room catches.

    python -m benchmarks.mutations ROOM... [--sample N] [--seed S] [--longest SECONDS] [--again FILE] [--results FILE]

A mutant is the code with one change: another comparison or operator, a number one higher or lower, a negated condition,
`return None`, or a statement left out. Each runs in a copy of the tree, with the tests that execute the changed line
and those that start processes, the fast ones first, until one fails. Tests of other rooms do not count. Needs Linux.

mutmut 3.8 and cosmic-ray 8.7 were tried. The changes of mutmut do not reach the processes that tests start. cosmic-ray
makes 5,111 mutants of `decoding/` alone, and starts an interpreter for each, with all imports; it draws no sample.
"""

import argparse
import ast
import contextlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {
    "decoding": ("edgelm/decoding", "tests/decoding"),
    "engine": ("edgelm/engine", "tests/engine"),
    "reuse": ("edgelm/reuse", "tests/reuse"),
    "quantize": ("export/edgelm_export/quantize", "tests/export/quantize"),
}
PRELOADED = ("hypothesis", "numpy", "onnxruntime", "safetensors.numpy", "tokenizers", "click", "asyncio")
"""What every mutant needs, imported once: a mutant is a fork of this process, which never imports edgelm itself."""
PRELOADED_BUILD_SIDE = (
    "torch",
    "onnx",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "optimum.exporters.onnx",
)
ELSEWHERE = {"DeviceCache", "_windows_peak_bytes"}
"""Classes and functions for another machine, which no test can enter here."""
LIMIT_BYTES = 8 << 30
LEAST_SECONDS, SLOWER = 60.0, 10
"""A mutant is ended after these seconds and this multiple of its tests' CPU seconds. It may hang, or the machine may be
busy, so it is counted apart, and `--again` runs it again.
"""

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}


@dataclass(frozen=True)
class Mutant:
    """A file of the repository with one change."""

    room: str
    file: str
    line: int
    before: str
    after: str
    number: int
    """Which of the file's changes it is."""
    last_line: int
    """Where its statement, or the head of its statement, ends."""
    at_import: bool
    """Whether the line runs at import, so that any test may notice."""


@dataclass(frozen=True)
class Result:
    """What became of a mutant."""

    room: str
    file: str
    line: int
    before: str
    after: str
    fate: str
    """"killed", "timeout" or "survived"."""


def changes_of(node: ast.AST, parent: ast.AST) -> Iterator[ast.AST]:
    """What may stand in place of `node`."""
    if isinstance(node, ast.Compare):
        for index, operator in enumerate(node.ops):
            changed = deepcopy(node)
            changed.ops[index] = COMPARISONS[type(operator)]()
            yield changed
    elif isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in OPERATORS:
        changed_operation = deepcopy(node)
        changed_operation.op = OPERATORS[type(node.op)]()
        yield changed_operation
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1)
        yield ast.Constant(node.value - 1)
    if isinstance(node, ast.expr) and isinstance(parent, ast.If | ast.IfExp | ast.While) and node is parent.test:
        yield ast.UnaryOp(ast.Not(), node)
    if isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value) != "None":
        yield ast.Return(ast.Constant(None))
    if is_optional(node):
        yield ast.Pass()


def is_optional(node: ast.AST) -> bool:
    """Whether the code may still run without the statement `node`."""
    if isinstance(node, ast.Assign):
        return not isinstance(node.targets[0], ast.Name | ast.Tuple)
    if isinstance(node, ast.Expr):
        return not isinstance(node.value, ast.Constant)
    return isinstance(node, ast.AugAssign | ast.Raise | ast.Break | ast.Continue)


def is_skipped(node: ast.AST, parent: ast.AST) -> bool:
    """Whether `node` is outside the subject: annotations, decorators, messages, assertions, and other systems' code."""
    if isinstance(node, ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
        return True
    if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in ELSEWHERE:
        return True
    if isinstance(node, ast.If | ast.IfExp) and "win32" in ast.unparse(node.test):
        return True
    if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("logger."):
        return True
    if isinstance(node, ast.expr) and node is getattr(parent, "annotation", None):
        return True
    if isinstance(parent, ast.FunctionDef) and (node is parent.returns or node in parent.decorator_list):
        return True
    return isinstance(parent, ast.ClassDef) and node in parent.decorator_list


@dataclass(frozen=True)
class Place:
    """A node of a syntax tree, where its parent has it, and the statement around it."""

    parent: ast.AST
    field: str
    index: int | None
    node: ast.AST
    statement: ast.stmt
    in_function: bool

    def put(self, node: ast.AST) -> None:
        """Put `node` into this place."""
        if self.index is None:
            setattr(self.parent, self.field, node)
        else:
            getattr(self.parent, self.field)[self.index] = node


def places_in(parent: ast.AST, statement: ast.stmt | None = None, in_function: bool = False) -> Iterator[Place]:
    """All nodes below `parent` that are not skipped."""
    for field, value in ast.iter_fields(parent):
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or is_skipped(child, parent):
                continue
            around = child if isinstance(child, ast.stmt) else statement
            if around is not None:
                yield Place(parent, field, index, child, around, in_function)
            yield from places_in(child, around, in_function or isinstance(child, ast.FunctionDef | ast.Lambda))


def mutants_of(room: str) -> list[Mutant]:
    """Every mutant of a room's files, in order."""
    mutants = []
    for path in sorted((ROOT / ROOMS[room][0]).glob("*.py")):
        file, number = str(path.relative_to(ROOT)), 0
        for place in places_in(ast.parse(path.read_text(encoding="utf-8"))):
            statement = place.statement
            body = getattr(statement, "body", None)
            last_line = max(statement.lineno, body[0].lineno - 1) if body else statement.end_lineno or statement.lineno
            for changed in changes_of(place.node, place.parent):
                before, after = ast.unparse(place.node), ast.unparse(ast.fix_missing_locations(changed))
                number += 1
                at_import = not place.in_function
                mutants.append(Mutant(room, file, statement.lineno, before, after, number, last_line, at_import))
    return mutants


def changed_source(mutant: Mutant) -> str:
    """The whole file of a mutant."""
    tree, number = ast.parse((ROOT / mutant.file).read_text(encoding="utf-8")), 0
    for place in list(places_in(tree)):
        for changed in changes_of(place.node, place.parent):
            number += 1
            if number == mutant.number:
                place.put(changed)
                return ast.unparse(ast.fix_missing_locations(tree))
    raise AssertionError(f"{mutant.file} has changed")


def cpu_seconds() -> float:
    """What this process and its children have computed, which other processes do not make longer."""
    return sum(os.times()[:4])


class Watch:
    """A pytest plugin that notes for every test its CPU seconds, the room's lines that it executes, and whether it
    starts processes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = f"{folder}{os.sep}"
        self.seconds: dict[str, float] = {}
        self.lines: dict[str, list[str]] = {}
        """By test, by file for the fixtures, which its tests share, and "" for what runs at import."""
        self.processes: list[str] = []
        self._test: str | None = None
        self._seen: set[str] = set()

    def begin(self) -> None:
        """Note what runs from now on, in the process that is about to import the room."""
        sys.addaudithook(self._audit)
        self._watch("")

    def answer(self) -> str:
        """All notes as JSON, which the waiting process reads."""
        return json.dumps([self.seconds, self.lines, self.processes])

    def _audit(self, event: str, args: object) -> None:
        started = event in ("subprocess.Popen", "os.fork", "os.posix_spawn")
        if self._test is not None and started and self._test not in self.processes:
            self.processes.append(self._test)

    def _trace(self, frame: FrameType, event: str, arg: object) -> Callable[..., Any] | None:
        if not frame.f_code.co_filename.startswith(self._folder):
            return None
        self._seen.add(f"{frame.f_code.co_filename.removeprefix(self._folder)}:{frame.f_lineno}")
        return self._trace

    def _watch(self, key: str) -> None:
        """Note what runs from now on under `key`."""
        self._seen = set()
        self.lines.setdefault(key, [])
        threading.settrace(self._trace)
        sys.settrace(self._trace)

    def _note(self, key: str) -> None:
        sys.settrace(None)
        threading.settrace(None)
        self.lines[key] = sorted({*self.lines[key], *self._seen})

    def pytest_collection_finish(self) -> None:
        self._note("")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._test, started = item.nodeid, cpu_seconds()
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] = cpu_seconds() - started
            self._test = None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        key = item.nodeid.partition("::")[0]
        self._watch(key)
        try:
            return (yield)
        finally:
            self._note(key)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        self._watch(item.nodeid)
        try:
            return (yield)
        finally:
            self._note(item.nodeid)


class Only:
    """A pytest plugin that runs the given tests alone, the fast ones first; files stay together for their fixtures."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        def order(item: pytest.Item) -> tuple[bool, bool, str, float]:
            seconds = self._seconds[item.nodeid]
            return seconds > 1, seconds > 0.1, item.nodeid.partition("::")[0], seconds

        items[:] = sorted((item for item in items if item.nodeid in self._seconds), key=order)


class Copy:
    """A copy of the tree, in which one process at a time runs tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ignored = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", "data.*", "*.egg-info")
        shutil.copytree(ROOT, folder, ignore=ignored, symlinks=True)

    def start(self, tests: list[str], plugin: "Watch | Only") -> int:
        """Run tests in a child process; returns its id. It exits with pytest's status."""
        child = os.fork()
        if child:
            return child
        status = 70
        try:
            os.setsid()
            os.chdir(self.folder)
            for stream in (1, 2):
                os.dup2(os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_BYTES, LIMIT_BYTES))
            paths = [str(self.folder), str(self.folder / "export"), str(self.folder / "models")]
            sys.path[:0] = paths
            os.environ["PYTHONPATH"] = os.pathsep.join(paths)
            # The first run leaves bytecode for the mutants, but a mutant's own must not outlive it.
            sys.dont_write_bytecode = isinstance(plugin, Only)
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1" if isinstance(plugin, Only) else ""
            if isinstance(plugin, Watch):
                plugin.begin()
            for name in [name for name in sys.modules if name.partition(".")[0] in ("benchmarks", "tests")]:
                del sys.modules[name]
            options = ["-x", "-q", "-o", "addopts=", "-p", "no:cacheprovider", f"--basetemp={self.folder / 'tmp'}"]
            status = int(pytest.main([*options, *tests], plugins=[plugin]))
            if isinstance(plugin, Watch):
                (self.folder / "answer.json").write_text(plugin.answer(), encoding="utf-8")
        finally:
            os._exit(status)

    def put(self, file: str, source: str) -> None:
        """Write a file, and remove its bytecode, which Python would take for that of the new source."""
        path = self.folder / file
        path.write_text(source, encoding="utf-8")
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            compiled.unlink()


def finished(child: int) -> int | None:
    """The wait status of a child, None while it runs."""
    done, status = os.waitpid(child, os.WNOHANG)
    return status if done else None


def watched(room: str, copy: Copy) -> Watch:
    """Run all of a room's tests once, and note what they execute; fails if one of them fails."""
    code, tests = ROOMS[room]
    watch = Watch(copy.folder / code)

    child = copy.start([tests], watch)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"a test of {tests} fails without a change: see {copy.folder / 'output.txt'}")
    facts = json.loads((copy.folder / "answer.json").read_text(encoding="utf-8"))
    watch.seconds, watch.lines, watch.processes = facts
    return watch


def tests_for(mutant: Mutant, watch: Watch) -> dict[str, float]:
    """The tests that may notice a mutant, with their seconds."""
    name = Path(mutant.file).name
    places = {f"{name}:{line}" for line in range(mutant.line, mutant.last_line + 1)}
    runs = {key for key, lines in watch.lines.items() if not places.isdisjoint(lines)}
    if mutant.at_import or "" in runs:
        return watch.seconds
    runs |= {*watch.processes}
    return {test: s for test, s in watch.seconds.items() if test in runs or test.partition("::")[0] in runs}


def fates(mutants: list[Mutant], watch: Watch, copies: list[Copy]) -> Iterator[tuple[Mutant, str]]:
    """Run every mutant, as many at a time as there are copies."""
    waiting, free = list(reversed(mutants)), list(copies)
    running: dict[int, tuple[Mutant, Copy, float]] = {}
    while waiting or running:
        while waiting and free:
            mutant = waiting.pop()
            tests = tests_for(mutant, watch)
            if not tests:
                yield mutant, "survived"
                continue
            copy = free.pop()
            copy.put(mutant.file, changed_source(mutant))
            child = copy.start(sorted({test.partition("::")[0] for test in tests}), Only(tests))
            running[child] = mutant, copy, time.monotonic() + LEAST_SECONDS + SLOWER * sum(tests.values())
        time.sleep(0.02)
        for child, (mutant, copy, deadline) in list(running.items()):
            status = finished(child)
            late = status is None and time.monotonic() > deadline
            if late:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
            if status is None and not late:
                continue
            del running[child]
            copy.put(mutant.file, (ROOT / mutant.file).read_text(encoding="utf-8"))
            free.append(copy)
            yield mutant, "timeout" if late else "killed" if status else "survived"


def results_in(file: Path) -> list[Result]:
    """The results that an earlier run wrote."""
    return [Result(**result) for result in json.loads(file.read_text(encoding="utf-8"))]


def chosen_mutants(room: str, sample: int, seed: int, again: Path | None) -> list[Mutant]:
    """A random sample of a room's mutants, or those that no test caught in the run whose results are `again`."""
    mutants = mutants_of(room)
    print(f"{room}: {len(mutants)} mutants", end="", flush=True)
    if again is not None:
        left = {(r.file, r.line, r.before, r.after) for r in results_in(again) if r.fate != "killed"}
        return [mutant for mutant in mutants if (mutant.file, mutant.line, mutant.before, mutant.after) in left]
    return random.Random(seed).sample(mutants, min(sample, len(mutants)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Make small errors in a room's code, and count those its tests catch.")
    parser.add_argument("rooms", nargs="+", choices=sorted(ROOMS), metavar="ROOM", help=", ".join(ROOMS))
    parser.add_argument("--sample", type=int, default=100, metavar="N", help="mutants of a room; default %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the sample; default %(default)s")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="at the same time; default %(default)s")
    parser.add_argument("--longest", type=float, metavar="SECONDS", help="leave out tests that compute for longer")
    parser.add_argument("--again", type=Path, metavar="FILE", help="run only what was not killed in these results")
    parser.add_argument("--results", type=Path, metavar="FILE", help="write every mutant's fate as JSON")
    options = parser.parse_args()
    os.environ |= {"ORT_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    for name in (*PRELOADED, *(PRELOADED_BUILD_SIDE if "quantize" in options.rooms else ())):
        importlib.import_module(name)
    earlier = [] if options.again is None else results_in(options.again)
    results = [result for result in earlier if result.room in options.rooms and result.fate == "killed"]
    with tempfile.TemporaryDirectory(prefix="edgelm-mutants-") as folder:
        copies = [Copy(Path(folder) / str(number)) for number in range(options.jobs)]
        for room in options.rooms:
            mutants = chosen_mutants(room, options.sample, options.seed, options.again)
            print(f", {len(mutants)} of them run", flush=True)
            counts = Counter(result.fate for result in results if result.room == room)
            watch = watched(room, copies[0])
            if options.longest is not None:
                watch.seconds = {test: s for test, s in watch.seconds.items() if s <= options.longest}
            for mutant, fate in fates(mutants, watch, copies):
                counts[fate] += 1
                results.append(Result(room, mutant.file, mutant.line, mutant.before, mutant.after, fate))
                if options.results is not None:
                    text = json.dumps([asdict(result) for result in results], indent=1)
                    options.results.write_text(text, encoding="utf-8")
                if fate == "survived":
                    before, after = mutant.before.splitlines()[0], mutant.after.splitlines()[0]
                    print(f"  survived: {mutant.file}:{mutant.line}: {before}  ->  {after}", flush=True)
            killed, late, survived = counts["killed"], counts["timeout"], counts["survived"]
            print(f"{room}: {killed} killed, {survived} survived, {late} ended by the time limit")


if __name__ == "__main__":
    main()
