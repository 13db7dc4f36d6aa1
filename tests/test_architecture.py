"""Imports go down the list of rooms and never up; nothing imports in a circle."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

RUNTIME_ROOMS = (
    ("cli", "pyinstaller"),
    ("serve", "hub", "batch"),
    "loading",
    "model",
    "latent",
    "generation",
    "pictures",
    "scoring",
    "decoding",
    "reuse",
    ("text", "engine"),  # beside each other: neither imports the other
    "bundle",
    "ids",
    "errors",
)
"""The rooms of edgelm/, from the top down: a room imports itself and the rooms below it."""

EXPORT_ROOMS = ("cli", "pipeline", "fit", "publish", "certify", "source", "graph", "quantize", "model")
TRAIN_ROOMS = ("cli", ("pretrain", "finetune", "distill", "evaluate"), "latent", ("options", "run"), "models", "data")
_BELOW_DATA = ("chats", "back_translation", "augment", "tasks", "speed")
RECIPE_ROOMS = ("cli", "make", "report", "order", "measure", "data", _BELOW_DATA, "recipe")

Rooms = tuple[str | tuple[str, ...], ...]


def imports_of(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, also inside functions and under TYPE_CHECKING."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules_of(package: Path) -> dict[str, Path]:
    """The files of a package by their dotted names."""
    modules = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def upward_imports(package: Path, rooms: Rooms) -> list[str]:
    """Every import that goes up the list of rooms, or sideways, as "module -> module"."""
    name = package.name
    rank = {room: i for i, level in enumerate(rooms) for room in ([level] if isinstance(level, str) else level)}
    wrong = []
    for module, path in modules_of(package).items():
        if module in (name, f"{name}.__main__"):
            continue
        room = module.split(".")[1]
        assert room in rank, f"{module} is in no room"
        for imported in imports_of(path):
            parts = imported.split(".")
            if parts[0] != name or len(parts) < 2 or parts[1] not in rank or parts[1] == room:
                continue
            if rank[parts[1]] <= rank[room]:
                wrong.append(f"{module} -> {imported}")
    return sorted(set(wrong))


@pytest.mark.parametrize(
    "package, rooms",
    [
        ("edgelm", RUNTIME_ROOMS),
        ("export/edgelm_export", EXPORT_ROOMS),
        ("export/edgelm_train", TRAIN_ROOMS),
        ("export/edgelm_recipes", RECIPE_ROOMS),
    ],
)
def test_imports_go_down(package: str, rooms: Rooms) -> None:
    assert upward_imports(ROOT / package, rooms) == []


@pytest.mark.parametrize(
    "package",
    ["edgelm", "export/edgelm_export", "export/edgelm_train", "export/edgelm_recipes"],
)
def test_no_module_imports_in_a_circle(package: str) -> None:
    modules = modules_of(ROOT / package)
    del modules[package.rpartition("/")[2]]  # the door of the package names what lies behind it
    edges = {name: imports_of(path) & modules.keys() - {name} for name, path in modules.items()}
    while leaves := {name for name, targets in edges.items() if not targets & edges.keys()}:
        edges = {name: targets for name, targets in edges.items() if name not in leaves}
    assert edges == {}, f"these modules import each other: {sorted(edges)}"


@pytest.mark.parametrize(
    "package, foreign",
    [
        (
            "edgelm",
            {"edgelm_export", "edgelm_train", "edgelm_recipes", "torch", "transformers", "onnx", "optimum", "peft"},
        ),
        ("export/edgelm_export", {"edgelm_train", "edgelm_recipes"}),
        ("export/edgelm_train", {"edgelm_recipes"}),
        ("models/edgelm_models", {"edgelm", "edgelm_export", "edgelm_train", "edgelm_recipes"}),
    ],
)
def test_packages_below_know_nothing_of_those_above(package: str, foreign: set[str]) -> None:
    for path in (ROOT / package).rglob("*.py"):
        assert not {name.split(".")[0] for name in imports_of(path)} & foreign, path


def test_only_the_engine_imports_onnx_runtime() -> None:
    for path in (ROOT / "edgelm").rglob("*.py"):
        if "engine" not in path.parts:
            names = {part for name in imports_of(path) for part in name.split(".")}
            assert not names & {"onnxruntime", "import_onnxruntime"}, path
            assert 'import_module("onnxruntime")' not in path.read_text(encoding="utf-8"), path


def test_only_the_hub_asks_the_network() -> None:
    network = {"huggingface_hub", "requests", "httpx", "urllib3", "urllib.request", "http.client"}
    for path in (ROOT / "edgelm").rglob("*.py"):
        imported = imports_of(path)
        if "hub" not in path.parts:
            assert not {name for name in imported if name in network or name.split(".")[0] in network}, path
        if path != ROOT / "edgelm" / "cli" / "hub.py" and "hub" not in path.parts:
            assert not {name for name in imported if name.startswith("edgelm.hub")}, path
