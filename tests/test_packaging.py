"""The files in a wheel and in a source distribution."""

import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import edgelm
from tests.conftest import ROOT

PACKAGES = ("edgelm", "edgelm_export", "edgelm_train", "edgelm_recipes", "edgelm_models")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built as pip would."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True, timeout=120)
    return folder


def test_wheel_installs_four_packages_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        top = {name.split("/")[0] for name in names}
        assert {name for name in top if not name.endswith(".dist-info")} == set(PACKAGES)
        for package in PACKAGES:
            assert f"{package}/py.typed" in names
        for file in ("bundle.json", "model.onnx", "model.onnx.data", "tokenizer.json", "README.md"):
            assert f"edgelm_models/stories-6m-int8/{file}" in names
        for folder in ("serve/playground", "pictures"):
            for path in (ROOT / "edgelm" / folder).iterdir():
                assert path.name == "__pycache__" or f"edgelm/{folder}/{path.name}" in names
        assert not any("__pycache__" in name or "/tests/" in name for name in names)
        assert sum(info.compress_size for info in wheel.infolist()) < 8_000_000
        metadata = Parser().parsestr(wheel.read(f"edgelm-{edgelm.__version__}.dist-info/METADATA").decode())
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert {"cpu", "gpu", "export", "test"} <= set(metadata.get_all("Provides-Extra") or [])
    plain = [line for line in metadata.get_all("Requires-Dist") or [] if "extra ==" not in line]
    assert sorted(line.split(">")[0] for line in plain) == ["click", "numpy", "safetensors", "tokenizers"]


def test_sdist_can_build_the_wheel_again(built: Path, tmp_path: Path) -> None:
    shutil.unpack_archive(next(built.glob("*.tar.gz")), tmp_path)
    folder = next(tmp_path.iterdir())
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "again")]
    subprocess.run(command, cwd=folder, check=True, timeout=120)
    again, first = next((tmp_path / "again").glob("*.whl")), next(built.glob("*.whl"))
    with zipfile.ZipFile(again) as one, zipfile.ZipFile(first) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())
