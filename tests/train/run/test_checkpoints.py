"""Which checkpoint a run goes on from: the newest whole one, with the best weights before it."""

import json
import sys
from pathlib import Path

import pytest

from edgelm.errors import TrainingError
from edgelm_train.run.checkpoints import follow_umask, is_whole, last_checkpoint, seal

pytestmark = pytest.mark.export


def checkpoint(folder: Path, step: int, best: int | None = None, *, sealed: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "model.safetensors").write_bytes(bytes([step]))
    state = {"global_step": step, "best_model_checkpoint": None if best is None else f"/elsewhere/checkpoint-{best}"}
    (path / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    if sealed:
        seal(path)
    return path


def test_the_newest_by_number(tmp_path: Path) -> None:
    checkpoint(tmp_path, 9)
    newest = checkpoint(tmp_path, 10, best=9)
    assert last_checkpoint(tmp_path) == newest


def test_one_that_was_not_written_to_its_end_is_removed(tmp_path: Path) -> None:
    whole, said = checkpoint(tmp_path, 5), list[str]()
    part = checkpoint(tmp_path, 7, sealed=False)
    assert last_checkpoint(tmp_path, say=said.append) == whole
    assert said == ["checkpoint-7 is passed over: it was not written to its end"] and not part.exists()


def test_a_run_that_fell_in_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    checkpoint(tmp_path, 5, sealed=False)
    said: list[str] = []
    assert last_checkpoint(tmp_path, say=said.append) is None
    assert said == ["checkpoint-5 is passed over: it was not written to its end; the run starts again"]


def test_lost_best_weights_count_if_they_are_kept(tmp_path: Path) -> None:
    best, newest = checkpoint(tmp_path, 5), checkpoint(tmp_path, 9, best=5)
    (best / "model.safetensors").write_bytes(b"")
    assert last_checkpoint(tmp_path, with_best=False) == newest
    with pytest.raises(TrainingError, match=r"the best weights before it, in checkpoint-5, are lost"):
        last_checkpoint(tmp_path)
    assert best.exists() and newest.exists()


def test_a_file_that_was_changed_in_its_middle(tmp_path: Path) -> None:
    whole = checkpoint(tmp_path, 5)
    assert is_whole(whole) and not is_whole(tmp_path / "nowhere")
    (whole / "model.safetensors").write_bytes(b"\0")
    assert not is_whole(whole)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no modes of this kind")
def test_a_private_file_gets_the_mode_of_a_new_one(tmp_path: Path) -> None:
    for name, mode in (("a", 0o600), ("b", 0o400)):
        (tmp_path / name).touch()
        (tmp_path / name).chmod(mode)
    follow_umask(tmp_path)
    (tmp_path / "new").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "new").stat().st_mode
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o400
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "new"]
