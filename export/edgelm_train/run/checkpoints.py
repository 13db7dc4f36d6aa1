"""The checkpoints of a run: each states the hash of all its files, so a run goes on from a whole one only.

This file loads without torch.
"""

import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgelm.errors import TrainingError
from edgelm_train.run.folder import sha256_of_file, write_json

_STATE_FILE = "trainer_state.json"
_FILES = "files.json"


def seal(checkpoint: Path) -> None:
    """State the hashes of all files of a checkpoint in one more file: the last one, so that it marks a whole one."""
    write_json(checkpoint / _FILES, {path.name: sha256_of_file(path) for path in sorted(checkpoint.iterdir())})


def last_checkpoint(
    folder: Path, *, with_best: bool = True, say: Callable[[str], None] = lambda line: None
) -> Path | None:
    """The newest whole checkpoint in `folder`; None where none was ever written to its end.

    A whole checkpoint has every file with the content it was written with: weights, optimizer, schedule, random state
    and the state of the run. Otherwise the resumed run would have another curve. Where there is a whole checkpoint,
    the others that are newer or damaged are removed.

    Args:
        folder: of the run.
        with_best: whether the checkpoint with the best weights so far must be whole too.
        say: gets a line about every checkpoint that is passed over.

    Raises:
        TrainingError: there are damaged checkpoints and no whole one.
    """
    found = sorted((path for path in folder.glob("checkpoint-*") if path.is_dir()), key=_step, reverse=True)
    passed: dict[Path, str] = {}
    for checkpoint in found:
        reason = _damage(checkpoint)
        if reason is None and with_best and (best := folder / _best(checkpoint)) != checkpoint:
            trouble = f"it is missing: {best}" if not best.is_dir() else _damage(best)
            reason = trouble and f"the best weights before it, in {best.name}, are lost ({trouble})"
        if reason is None:
            for other, why in passed.items():
                say(f"{other.name} is passed over: {why}")
                shutil.rmtree(other)
            return checkpoint
        passed[checkpoint] = reason
    if any((checkpoint / _FILES).exists() for checkpoint in passed):
        listed = ", ".join(f"{checkpoint.name} ({why})" for checkpoint, why in passed.items())
        raise TrainingError(
            f"no checkpoint in {folder} is whole: {listed}; nothing was deleted; restore one, or remove {folder} to "
            "start this run again"
        )
    for checkpoint, why in passed.items():
        say(f"{checkpoint.name} is passed over: {why}; the run starts again")
        shutil.rmtree(checkpoint)
    return None


def follow_umask(folder: Path) -> None:
    """Give every file in `folder` that only its owner may read the mode that a new file gets there.

    safetensors writes into a temporary file of mode 0600 and renames it, whatever the umask says.
    """
    private = [path for path in folder.iterdir() if path.is_file() and stat.S_IMODE(path.stat().st_mode) == 0o600]
    if private:
        probe = folder / ".mode"
        probe.touch()
        mode = stat.S_IMODE(probe.stat().st_mode)
        probe.unlink()
        for path in private:
            path.chmod(mode)


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint has all its files as they were written."""
    return checkpoint.is_dir() and _damage(checkpoint) is None


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None where it is whole."""
    try:
        listed = _read(checkpoint / _FILES)
    except FileNotFoundError:
        return "it was not written to its end"
    except (OSError, ValueError):
        return f"{_FILES} is damaged"
    for name, sha256 in listed.items():
        path = checkpoint / Path(name).name
        if not path.is_file():
            return f"{name} is missing"
        try:
            same = sha256_of_file(path) == sha256
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if not same:
            return f"{name} is damaged"
    return None if _STATE_FILE in listed else f"{_FILES} is damaged"


def _best(checkpoint: Path) -> str:
    """Name of the checkpoint with the best weights, as a whole checkpoint states it."""
    best = _read(checkpoint / _STATE_FILE).get("best_model_checkpoint")
    return checkpoint.name if best is None else Path(best).name


def _read(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(path)
    return content


def _step(checkpoint: Path) -> int:
    step = checkpoint.name.removeprefix("checkpoint-")
    return int(step) if step.isdecimal() else -1
