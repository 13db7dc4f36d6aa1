"""Models that come as Python packages: the wheel that `edgelm pack --wheel` writes, and the name that it answers to."""

import csv
import hashlib
import os
import sys
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pytest

import edgelm
from edgelm.bundle.folder import Bundle
from edgelm.bundle.installed import find_installed, installed_models
from edgelm.bundle.wheel import write_wheel
from edgelm.errors import BundleError, ConfigError
from tests.conftest import TINY_BUNDLE, RunCommand, edit_manifest
from tests.environments import INSTALLS, Environment

NAME = "My.tiny_model"
FOLDER = "edgelm_model_my_tiny_model"


def install(site: Path, wheel: Path) -> None:
    """Unpack a wheel into a folder for packages, as installers do."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """The tiny bundle as a wheel."""
    return write_wheel(Bundle.read(TINY_BUNDLE), tmp_path, NAME, "1.2")


@pytest.fixture
def site(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path where the wheel is installed."""
    folder = tmp_path / "site"
    install(folder, wheel)
    monkeypatch.syspath_prepend(str(folder))
    return folder


def test_the_same_bundle_makes_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    first = wheel.read_bytes()
    assert wheel.name == "my_tiny_model-1.2-py3-none-any.whl"
    assert write_wheel(Bundle.read(TINY_BUNDLE), tmp_path, NAME, "1.2").read_bytes() == first


def test_the_wheel_lists_its_files_and_holds_no_code(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        facts = "my_tiny_model-1.2.dist-info"
        rows = {row[0]: row[1:] for row in csv.reader(archive.read(f"{facts}/RECORD").decode().splitlines())}
        assert set(rows) == set(names) and not [name for name in names if name.endswith((".py", ".pth", ".so"))]
        for name, (digest, size) in rows.items():
            if not name.endswith("RECORD"):
                content = archive.read(name)
                assert int(size) == len(content)
                assert digest == "sha256=" + _urlsafe(hashlib.sha256(content).digest())
        metadata = BytesParser().parsebytes(archive.read(f"{facts}/METADATA"))
        assert metadata["Name"] == NAME and metadata["Version"] == "1.2" and "Requires-Dist" not in metadata
        assert archive.read(f"{facts}/entry_points.txt").decode() == f"[edgelm.models]\n{NAME} = {FOLDER}\n"


def _urlsafe(digest: bytes) -> str:
    import base64

    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def test_facts_of_a_bundle_cannot_add_fields_to_the_metadata(tiny_copy: Path, tmp_path: Path) -> None:
    edit_manifest(tiny_copy, lambda m: m["source"].update(name="x\nRequires-Dist: evil", license="MIT\r\nX: y"))
    made = write_wheel(Bundle.read(tiny_copy), tmp_path, "x", "1.0")
    with zipfile.ZipFile(made) as archive:
        metadata = BytesParser().parsebytes(archive.read("x-1.0.dist-info/METADATA"))
    assert "Requires-Dist" not in metadata and "X" not in metadata
    assert metadata["Summary"].startswith("x Requires-Dist: evil ")


@pytest.mark.parametrize("name", ["", "-x", "a b", "../a", "ä", "a" * 65, "edgelm", "Edgelm_Models"])
def test_names_that_no_package_may_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError):
        write_wheel(Bundle.read(TINY_BUNDLE), tmp_path, name, "1.0")


@pytest.mark.parametrize("version", ["", "v1", "1..0", "1.0+local", "1.0\n", "٣"])
def test_versions_that_no_package_may_have(tmp_path: Path, version: str) -> None:
    with pytest.raises(ConfigError, match="is no version"):
        write_wheel(Bundle.read(TINY_BUNDLE), tmp_path, "x", version)


def test_the_name_is_found_as_indexes_compare_it(site: Path) -> None:
    for name in (NAME, "my-tiny-model", "MY_tiny.MODEL"):
        with edgelm.load(name) as model:
            assert model.bundle.path == site / FOLDER
    assert [model.name for model in installed_models()] == [NAME]
    assert find_installed("another") is None
    assert not [name for name in sys.modules if name.startswith("edgelm_model_")]


def test_what_stands_at_the_path_comes_first(
    site: Path, tiny_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_copy.rename(NAME)
    assert Bundle.read(NAME).path == tmp_path / NAME
    (tmp_path / "my-tiny-model").touch()
    with pytest.raises(BundleError, match="neither a bundle folder nor"):
        Bundle.read("my-tiny-model")
    with pytest.raises(BundleError, match="there is no such folder"):
        Bundle.read(Path("my_tiny_model"))  # a Path is a path


def test_two_packages_with_one_name_are_refused(site: Path, tmp_path: Path) -> None:
    install(site, write_wheel(Bundle.read(TINY_BUNDLE), tmp_path, "other", "3.0"))
    entry = site / "other-3.0.dist-info" / "entry_points.txt"
    entry.write_text("[edgelm.models]\nmy_tiny_model = edgelm_model_other\n")
    with pytest.raises(BundleError, match=r"means two installed models, of My.tiny_model 1.2 and other 3.0"):
        Bundle.read("my-tiny-model")


def test_the_same_package_twice_on_the_path_is_one(
    site: Path, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "second", wheel)
    monkeypatch.syspath_prepend(str(tmp_path / "second"))
    assert Bundle.read(NAME).path == tmp_path / "second" / FOLDER


def test_a_manifest_that_the_package_does_not_state_is_refused(site: Path) -> None:
    edit_manifest(site / FOLDER, lambda m: m["source"].update(license="other"))
    with pytest.raises(BundleError, match=r"was altered: its bundle\.json is not what the package's RECORD says"):
        Bundle.read(NAME)
    Bundle.read(site / FOLDER)  # as a folder it is a bundle like any other


def test_code_in_the_package_is_never_run(site: Path) -> None:
    (site / FOLDER / "__init__.py").write_text("raise SystemExit('code was run')")
    with pytest.raises(BundleError, match=r"'__init__.py' is not listed"):
        Bundle.read(NAME)


@pytest.mark.parametrize(
    "place, message",
    [("../evil", "no plain name of a folder"), ("a.b", "no plain name"), ("os:path", "no plain"), ("gone", "lists no")],
)
def test_places_that_no_wheel_of_ours_names(site: Path, place: str, message: str) -> None:
    facts = next(site.glob("*.dist-info"))
    (facts / "entry_points.txt").write_text(f"[edgelm.models]\n{NAME} = {place}\n")
    with pytest.raises(BundleError, match=message):
        Bundle.read(NAME)


def test_broken_metadata_of_other_packages_does_not_matter(site: Path) -> None:
    for number, content in enumerate([b"\xff\xfe\0", b"[edgelm.models]\nno equals sign\n[", b"[edgelm.models\n= x"]):
        facts = site / f"broken{number}-1.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_bytes(content)
        (facts / "entry_points.txt").write_bytes(content)
    (site / "empty-1.dist-info").mkdir()
    assert Bundle.read(NAME).path == site / FOLDER


def test_without_a_list_of_files_one_sentence_says_so(site: Path) -> None:
    (next(site.glob("*.dist-info")) / "RECORD").unlink()
    with pytest.raises(BundleError, match=r"lists no edgelm_model_my_tiny_model/bundle\.json; run: pip install"):
        Bundle.read(NAME)


def test_links_that_an_installer_made_are_followed(site: Path, tmp_path: Path) -> None:
    try:
        for path in (site / FOLDER).iterdir():
            path.rename(tmp_path / path.name)
            path.symlink_to(tmp_path / path.name)
    except OSError:
        pytest.skip("this system makes no links")
    with edgelm.load(NAME) as model:
        assert model.generate("ab", max_new_tokens=2).stats.new_tokens == 2


def test_commands_take_the_name(wheel: Path, site: Path, edgelm_command: RunCommand) -> None:
    env = {"PYTHONPATH": os.pathsep.join([str(site), *filter(None, sys.path)])}
    assert edgelm_command("info", NAME, env=env).status == 0
    assert edgelm_command("run", "-m", "my-tiny-model", "ab", "-n", "3", env=env).status == 0
    done = edgelm_command("pack", str(TINY_BUNDLE), "--wheel", "--name", NAME, "--version", "1.2", "-o", str(site))
    assert done.status == 0 and f"--hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}" in done.stderr
    assert edgelm_command("pack", str(TINY_BUNDLE), "--name", "x").status == 2
    assert "there is no folder" in edgelm_command("pack", str(TINY_BUNDLE), "--wheel", "-o", "no").one_line()


@INSTALLS[0]
@INSTALLS[1]
def test_pip_installs_it_with_its_hash(wheel: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(f"{NAME}==1.2 --hash=sha256:{digest}\n")
    environment.install("--no-index", "--find-links", str(tmp_path), "-r", str(requirements))
    code = "from importlib.metadata import entry_points as e; print([p.value for p in e(group='edgelm.models')])"
    assert environment.run(code) == f"['{FOLDER}']\n"
