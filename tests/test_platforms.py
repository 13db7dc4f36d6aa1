"""Nothing in the runtime names what Windows or macOS lacks, except behind a test of the system.

The names come from the stubs of the standard library that mypy brings: a stub states in ``if sys.platform`` what each
system has. The runtime's files are then read as Python on that system would run them.
"""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT

STUBS = Path(str(pytest.importorskip("mypy").__file__)).parent / "typeshed" / "stdlib"
_ENDS = (ast.Return, ast.Raise, ast.Continue, ast.Break)


def names_in(module: str, system: str) -> frozenset[str]:
    """The names of a module of the standard library on a system, as `sys.platform` calls it; empty if unknown."""
    return _names_in(module, system) if module.split(".")[0] in sys.stdlib_module_names else frozenset()


@cache
def _names_in(module: str, system: str) -> frozenset[str]:
    place = STUBS.joinpath(*module.split("."))
    stub = next((path for path in (place.with_suffix(".pyi"), place / "__init__.pyi") if path.is_file()), None)
    if stub is None:
        return frozenset()
    names: set[str] = set()
    for node in Reader(system).reached(ast.parse(stub.read_text(encoding="utf-8")).body):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                starred = node.module if isinstance(node, ast.ImportFrom) and alias.name == "*" else None
                names |= {alias.asname or alias.name} if starred is None else names_in(starred, system)
    return frozenset(names)


class Reader:
    """Reads a file as Python on one system would run it."""

    def __init__(self, system: str) -> None:
        self._system = system

    def reached(self, body: list[ast.stmt]) -> Iterator[ast.stmt]:
        """The statements of a block that this system can reach, with those inside its `if`s."""
        for node in body:
            if isinstance(node, ast.If):
                answer = self._answer(node.test)
                yield node
                yield from self.reached(node.body) if answer is not False else ()
                yield from self.reached(node.orelse) if answer is not True else ()
                taken = node.body if answer is True else node.orelse if answer is False else []
                if taken and isinstance(taken[-1], _ENDS):
                    return
                continue
            yield node

    def missing(self, tree: ast.Module) -> set[str]:
        """The names of the standard library that the file uses on this system, and that the system lacks."""
        modules = {
            alias.asname or alias.name: alias.name
            for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        }  # fmt: skip
        return set(self._missing(tree, modules))

    def _missing(self, node: ast.AST, modules: dict[str, str]) -> Iterator[str]:
        if isinstance(node, ast.Try) and _catches_absence(node):
            for part in (*node.handlers, *node.orelse, *node.finalbody):
                yield from self._missing(part, modules)
            return
        if isinstance(node, ast.IfExp):
            answer = self._answer(node.test)
            parts = [node.body] * (answer is not False) + [node.orelse] * (answer is not True)
            for part in parts:
                yield from self._missing(part, modules)
            return
        if isinstance(node, ast.BoolOp) and any(self._answer(value) is False for value in node.values):
            return
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            yield from self._lacks(modules[node.value.id], node.attr)
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield from self._lacks(node.module, alias.name)
        for field, value in ast.iter_fields(node):
            if isinstance(node, ast.If) and field in ("body", "orelse"):
                continue  # `reached` has them
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                children: list[ast.AST] = list(self.reached(value))
            else:
                children = [child for child in (value if isinstance(value, list) else [value]) if _is_node(child)]
            for child in children:
                yield from self._missing(child, modules)

    def _lacks(self, module: str, name: str) -> list[str]:
        elsewhere = names_in(module, "linux") | names_in(module, "darwin") | names_in(module, "win32")
        return [f"{module}.{name}"] if name in elsewhere - names_in(module, self._system) else []

    def _answer(self, test: ast.expr) -> bool | None:
        """What a condition says on this system; None if it does not depend on the system."""
        if isinstance(test, ast.BoolOp):
            answers = [self._answer(value) for value in test.values]
            decides = isinstance(test.op, ast.Or)
            return decides if decides in answers else None if None in answers else not decides
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            answer = self._answer(test.operand)
            return None if answer is None else not answer
        match ast.unparse(test).replace('"', "'").split(" "):
            case ["sys.platform", "==" | "!=" as sign, system]:
                return (system == repr(self._system)) == (sign == "==")
            case ["os.name", "==" | "!=" as sign, name]:
                return (name == repr("nt" if self._system == "win32" else "posix")) == (sign == "==")
            case ["sys.version_info", *_]:
                return bool(eval(ast.unparse(test), {"sys": sys}))
        if isinstance(test, ast.Call) and len(test.args) in (1, 2) and not test.keywords:
            match ast.unparse(test.func), [ast.unparse(argument).strip("'") for argument in test.args]:
                case "sys.platform.startswith", [system]:
                    return self._system.startswith(system)
                case "hasattr", [module, name]:
                    return False if self._lacks(module, name) else None
        return None


def _catches_absence(node: ast.Try) -> bool:
    caught = {ast.unparse(handler.type) for handler in node.handlers if handler.type is not None}
    return any(name in words for words in caught for name in ("AttributeError", "ImportError"))


def _is_node(value: object) -> bool:
    return isinstance(value, ast.AST)


@pytest.mark.parametrize("system", ["win32", "darwin", "linux"])
def test_the_runtime_names_only_what_the_system_has(system: str) -> None:
    reader = Reader(system)
    found = {}
    for path in sorted((ROOT / "edgelm").rglob("*.py")):
        if names := reader.missing(ast.parse(path.read_text(encoding="utf-8"))):
            found[path.relative_to(ROOT).as_posix()] = names
    assert found == {}


@pytest.mark.parametrize(
    ("code", "missing"),
    [
        ("import os\nos.fork()", {"os.fork"}),
        ("import fcntl\nfcntl.flock(1, fcntl.LOCK_EX)", {"fcntl.flock", "fcntl.LOCK_EX"}),
        ("from resource import getrusage", {"resource.getrusage"}),
        ("import signal\ndef f():\n    signal.setitimer(signal.SIGALRM, 1)", {"signal.setitimer", "signal.SIGALRM"}),
        ("import mmap as m\nx = m.MAP_PRIVATE", {"mmap.MAP_PRIVATE"}),
        ("import os, sys\nif sys.platform == 'win32':\n    os.fork()", {"os.fork"}),
        ("import os, sys\nif sys.platform == 'linux':\n    pass\nelse:\n    os.getuid()", {"os.getuid"}),
        ("import os, sys\nif sys.platform != 'win32':\n    os.fork()", set()),
        ("import os, sys\ndef f():\n    if sys.platform == 'win32':\n        return\n    os.fork()", set()),
        ("import os\nif hasattr(os, 'fork') and os.fork():\n    pass", set()),
        ("import os\nx = os.getuid() if os.name == 'posix' else 0", set()),
        ("import os\ntry:\n    os.sysconf('x')\nexcept (AttributeError, OSError):\n    pass", set()),
        ("import os\nwith open(os.devnull) as f:\n    os.register_at_fork()", {"os.register_at_fork"}),
    ],
)  # fmt: skip
def test_the_reader(code: str, missing: set[str]) -> None:
    assert Reader("win32").missing(ast.parse(code)) == missing
    assert Reader("linux").missing(ast.parse(code)) == set()
