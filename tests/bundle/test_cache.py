"""The cache where a bundle cannot be removed at once: on Windows, because a program uses it; anywhere, after a kill."""

from pathlib import Path

import pytest

from edgelm.bundle.cache import CachedModel, Ref

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CachedModel:
    """A model with two commits: one that "v1" means, and one that "main" means."""
    monkeypatch.setenv("EDGELM_CACHE", str(tmp_path))
    made = CachedModel.of("owner/name")
    for revision, commit in (("v1", OLD), ("main", NEW)):
        made.bundle_folder(commit).mkdir(parents=True)
        (made.bundle_folder(commit) / "bundle.json").touch()
        made.remember(Ref("owner/name", revision, commit))
    return made


def refuse(path: Path, target: Path) -> None:
    """Windows renames no folder with an open file."""
    raise PermissionError(13, "Access is denied", str(path))


@pytest.mark.parametrize("revision", ["v1", None])
def test_a_bundle_in_use_stays_with_the_name_under_which_it_can_be_removed_later(
    model: CachedModel, monkeypatch: pytest.MonkeyPatch, revision: str | None
) -> None:
    with model.locked() as held, monkeypatch.context() as windows:
        assert held
        windows.setattr(Path, "rename", refuse)
        with pytest.raises(PermissionError):
            model.forget(revision)
    assert model.find("v1") == model.bundle_folder(OLD) and model.find("main") == model.bundle_folder(NEW)
    with model.locked():
        model.forget(revision)
    assert model.find("v1") is None and not model.bundle_folder(OLD).exists()
    assert (model.find("main") is None) == (revision is None)


def test_a_commit_that_two_revisions_mean_stays_while_one_of_them_does(model: CachedModel) -> None:
    model.remember(Ref("owner/name", "v2", OLD))
    with model.locked():
        model.forget("v1")
        assert model.find("v2") == model.bundle_folder(OLD)
        model.forget("v2")
    assert not model.bundle_folder(OLD).exists()


def test_what_a_killed_removal_left_goes_with_the_next_one(model: CachedModel) -> None:
    left = model.folder / f".removed-{OLD}"
    left.mkdir()
    (left / "model.onnx").touch()
    with model.locked():
        model.forget("v1")
    assert not left.exists() and not model.bundle_folder(OLD).exists()
