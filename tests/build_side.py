"""A pytest plugin for the tests that need the build side: fixtures, and a skip that names the missing packages."""

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
"""Whether a missing package fails the tests instead of skipping them."""

TINY_TOKENS = 400
"""Length of the text drawn from a tiny checkpoint, in tokens; an export draws 10,000."""

TESTS = Path(__file__).parent
SHARED = Path(__file__).parents[2] / "shared"

BUILD_SIDE_FOLDERS = ("export", "train", "recipes", "against_transformers")
"""Folders of tests/ whose files import torch."""

Report = Callable[[str], None]


class _WithoutBuildSide(pytest.Module):
    """A test file that cannot be imported, because packages are missing."""

    def collect(self) -> NoReturn:
        missing = ", ".join([*MISSING, *TRAINING_MISSING])
        reason = f"the build side is not installed ({missing} missing): pip install 'edgelm[cpu,train]'"
        if REQUIRED:
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


class _Deselected(pytest.Module):
    """A test file whose tests would all be deselected."""

    def collect(self) -> list[pytest.Item | pytest.Collector]:
        return []


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Import no file that needs the build side where packages are missing, or with ``-m "not export"``.

    Importing torch takes seconds.
    """
    if not _needs_build_side(module_path):
        return None
    if parent.config.option.markexpr == "not export":
        deselected: pytest.Module = _Deselected.from_parent(parent, path=module_path)
        return deselected
    if not MISSING and not (TRAINING_MISSING and {"train", "recipes"} & set(module_path.parts)):
        return None
    module: pytest.Module = _WithoutBuildSide.from_parent(parent, path=module_path)
    return module


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny tensors gain nothing from threads. On a busy machine, torch's threads make them 20 times slower."""
    if MISSING or not any(_needs_build_side(item.path) for item in request.session.items):
        yield
        return
    import torch

    own_threads, in_environment = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
    yield
    torch.set_num_threads(own_threads)
    if in_environment is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = in_environment


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of this test draw little text and do not measure their speed."""
    from tests.export.checkpoints import FOOTPRINT

    monkeypatch.setattr("edgelm_export.certify.certificate.measure_footprint", lambda bundle: FOOTPRINT)
    monkeypatch.setattr("edgelm_export.pipeline.EVALUATION_TOKENS", TINY_TOKENS)
    monkeypatch.setattr("edgelm_export.fit.CALIBRATION_TOKENS", TINY_TOKENS)


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """The folder of trained checkpoints and texts beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"there is no folder {SHARED} with trained checkpoints")
    return SHARED


@pytest.fixture(scope="session")
def tiny_export(tmp_path_factory: pytest.TempPathFactory) -> "TinyExport":
    """Makes and exports a random checkpoint, once a session for each shape and precision."""
    from tests.export.checkpoints import TinyExport

    return TinyExport(tmp_path_factory.mktemp("tiny-exports"), TINY_TOKENS)


@pytest.fixture
def report(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Report:
    """Shows a measured number on the terminal and in the JUnit file, even if the test passes."""
    writer = request.config.get_terminal_writer()
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def show(line: str) -> None:
        record_property("measured", line)
        with capture.global_and_fixture_disabled():
            writer.line(f"\n  measured: {line}")

    return show


def _needs_build_side(path: Path) -> bool:
    return any((TESTS / folder) in path.parents for folder in BUILD_SIDE_FOLDERS)
