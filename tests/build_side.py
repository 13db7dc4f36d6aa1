"""A pytest plugin for the tests that need the build side: fixtures, and a skip that names what is not installed."""

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest

if TYPE_CHECKING:
    from tests.export.checkpoints import TinyExport

MISSING = [name for name in ("torch", "transformers", "optimum", "onnx", "safetensors") if find_spec(name) is None]
TRAINING_MISSING = [name for name in ("accelerate", "tensorboard", "matplotlib") if find_spec(name) is None]
REQUIRED = os.environ.get("EDGELM_REQUIRE_EXPORT") == "1"
"""On a machine that is there to run these tests, a missing package is a failure."""

TINY_TOKENS = 400
"""Text to draw from tiny checkpoints, instead of 10,000 tokens."""

TESTS = Path(__file__).parent
SHARED = Path(__file__).parents[2] / "shared"

BUILD_SIDE_FOLDERS = ("export", "train", "against_transformers")
"""Folders of tests/ whose files import torch."""

Report = Callable[[str], None]


class _WithoutBuildSide(pytest.Module):
    """A test file that cannot be imported here."""

    def collect(self) -> NoReturn:
        missing = ", ".join([*MISSING, *TRAINING_MISSING])
        reason = f"the build side is not installed ({missing} missing): pip install 'edgelm[cpu,train]'"
        if REQUIRED:
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


class _NotAskedFor(pytest.Module):
    """A test file whose tests would all be deselected."""

    def collect(self) -> list[pytest.Item | pytest.Collector]:
        return []


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Without the build side, or where it is not wanted, none of these files is imported: torch takes seconds."""
    if not _needs_build_side(module_path):
        return None
    if parent.config.option.markexpr == "not export":
        unwanted: pytest.Module = _NotAskedFor.from_parent(parent, path=module_path)
        return unwanted
    if not MISSING and not (TRAINING_MISSING and "train" in module_path.parts):
        return None
    module: pytest.Module = _WithoutBuildSide.from_parent(parent, path=module_path)
    return module


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and torch's spin for each other on a busy machine: 20 times slower."""
    if MISSING or not any(_needs_build_side(item.path) for item in request.session.items):
        yield
        return
    import torch

    before, in_environment = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
    yield
    torch.set_num_threads(before)
    if in_environment is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = in_environment


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of this test draw little text, and leave their speed unmeasured."""
    from tests.export.checkpoints import FOOTPRINT

    monkeypatch.setattr("edgelm_export.certify.certificate.measure_footprint", lambda bundle: FOOTPRINT)
    monkeypatch.setattr("edgelm_export.pipeline.EVALUATION_TOKENS", TINY_TOKENS)
    monkeypatch.setattr("edgelm_export.fit.CALIBRATION_TOKENS", TINY_TOKENS)


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """The project's folder of trained checkpoints and texts, which lies beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there: it holds the trained checkpoints")
    return SHARED


@pytest.fixture(scope="session")
def tiny_export(tmp_path_factory: pytest.TempPathFactory) -> "TinyExport":
    """Makes a random checkpoint and exports it, once per session for each shape and precision."""
    from tests.export.checkpoints import TinyExport

    return TinyExport(tmp_path_factory.mktemp("tiny-exports"), TINY_TOKENS)


@pytest.fixture
def report(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Report:
    """Shows a measured number on the terminal, also of a test that passes, and in the JUnit file."""
    writer = request.config.get_terminal_writer()
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def show(line: str) -> None:
        record_property("measured", line)
        with capture.global_and_fixture_disabled():
            writer.line(f"\n  measured: {line}")

    return show


def _needs_build_side(path: Path) -> bool:
    return any((TESTS / folder) in path.parents for folder in BUILD_SIDE_FOLDERS)
