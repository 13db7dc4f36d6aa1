"""The files in a wheel and in a source distribution."""

import re
import shutil
import subprocess
import sys
import tomllib
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
    assert again.read_bytes() == first.read_bytes()


@pytest.mark.parametrize(
    ("constraints", "extras"),
    [
        ("lowest.txt", ["cpu", "chat", "hub", "constrain", "serve", "evaluate"]),
        ("lowest-export.txt", ["cpu", "export", "train"]),
    ],
)
def test_the_lowest_versions_are_those_of_the_bounds(constraints: str, extras: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [*project["dependencies"], *(each for extra in extras for each in project["optional-dependencies"][extra])]
    bounds = {match[1]: match[2] for each in needed if (match := re.match(r"([\w-]+)>=([\d.]+)", each))}
    if constraints == "lowest-export.txt":  # transformers 4.57 takes none older
        bounds |= {"tokenizers": "0.22", "safetensors": "0.4.3"}
    lines = (ROOT / "tests" / constraints).read_text(encoding="utf-8").splitlines()
    pins = {line.partition("==")[0]: line.partition("==")[2] for line in lines if not line.startswith("#")}
    assert {name: whole(version) for name, version in pins.items()} == {n: whole(v) for n, v in bounds.items()}


def whole(version: str) -> tuple[int, ...]:
    """A version as three numbers."""
    return tuple(map(int, [*version.split("."), "0", "0"][:3]))


def test_the_citation_has_the_version() -> None:
    assert f"\nversion: {edgelm.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform == "win32", reason="it is a script for bash")
def test_a_release_needs_the_tag_of_the_version_and_a_dated_section(tmp_path: Path) -> None:
    def refusal(tag: str) -> str:
        command = ["bash", str(ROOT / ".ci" / "release"), tag, str(tmp_path / "dist")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and not list(tmp_path.iterdir())
        return done.stderr

    assert "the tag is v9.9" in refusal("v9.9")
    if f"## {edgelm.__version__}, unreleased" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"):
        assert "has no date" in refusal(f"v{edgelm.__version__}")
