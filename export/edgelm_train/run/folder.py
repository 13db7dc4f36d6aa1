"""The folder of a run and the record in it: one command starts the run, the same command resumes it.

This file loads without torch, because the commands check their output folder before they load it.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from edgelm.errors import TrainingError
from edgelm_export.source.hub import first_line
from edgelm_train.run.lock import is_empty

if TYPE_CHECKING:
    from edgelm_train.run.machine import Precision

RUN_FOLDER = "training"
"""The part of an output folder with the record of the run, its checkpoints until it is finished, the event files of
TensorBoard, and the tokenizer of ``edgelm pretrain``."""
_RECORD_FILE = "run.json"
_HASHED = ("data", "held-out data", "weights", "tokenizer", "adapter")  # recorded by their SHA-256


@dataclass(frozen=True)
class RunRecord:
    """The options with which a run was started, and the decisions that a resumed run keeps."""

    options: Mapping[str, object]
    """JSON values by the name of the flag, without its dashes."""
    decided: Mapping[str, object]

    def write(self, folder: Path) -> None:
        """Write the record into `folder`, which is created."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / _RECORD_FILE, {"options": dict(self.options), "decided": dict(self.decided)})


def read_record(folder: Path) -> RunRecord | None:
    """The record in `folder`; None where no run was started there.

    Raises:
        TrainingError: the record is damaged.
    """
    path = folder / _RECORD_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return RunRecord(dict(content["options"]), dict(content["decided"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise TrainingError(f"{path} is damaged; remove the folder {folder} to start this run again") from None


def refuse_changes(started: RunRecord, options: Mapping[str, object], out: Path) -> None:
    """Raises a TrainingError that names the first of `options` that differs from those of the run in `out`."""
    for name in [*started.options, *options]:
        recorded, given = started.options.get(name), options.get(name)
        if recorded != given:
            raise TrainingError(
                f"the run in {out} was started with {_shown(name, recorded)}, not {_shown(name, given)}; resume it "
                "with its own options, or give another --out"
            )


def check_out(out: Path) -> RunRecord | None:
    """The record of the unfinished run in `out`; None where `out` is a new or an empty folder.

    Raises:
        TrainingError: `out` has other files in it, or its run is finished.
    """
    check_name(out)
    if out.exists() and not out.is_dir():
        raise TrainingError(f"{out} is a file; give a new folder as --out")
    if (out / "report.json").exists():
        raise TrainingError(f"the run in {out} is finished; see {out / 'report.md'}, or give another --out")
    started = read_record(out / RUN_FOLDER)
    if started is None and out.exists() and not is_empty(out):
        raise TrainingError(f"{out} is not empty; give a new folder as --out")
    return started


def check_name(path: Path) -> None:
    """Raises TrainingError where the name of a file or folder is not UTF-8, because libraries of training refuse it."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        raise TrainingError(
            f"the name {shown} is not UTF-8, which training needs; rename it, or give another"
        ) from None


def begin_run(out: Path, options: Mapping[str, object], measure: "Callable[[], Precision]") -> "Precision":
    """Record a new run in `out`, or check that the run that is resumed was started with these `options`.

    Returns:
        The precision of the run: that of `measure` for a new run, the recorded one for a resumed run.

    Raises:
        TrainingError: the run in `out` was started with other options.
    """
    started = read_record(out / RUN_FOLDER)
    if started is None:
        started = RunRecord(options, {"precision": measure()})
        started.write(out / RUN_FOLDER)
    refuse_changes(started, options, out)
    return "bf16" if started.decided.get("precision") == "bf16" else "fp32"


@contextmanager
def saving(out: Path) -> Iterator[None]:
    """In this context the result is written into `out`; what goes wrong gets a sentence. The run stays resumable.

    Raises:
        TrainingError: a file cannot be written.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not (isinstance(error, (OSError, SafetensorError)) or disk_is_full(error)):
            raise
        reason = "the disk is full" if disk_is_full(error) else first_line(error)
        raise TrainingError(
            f"cannot write the result into {out}: {reason}; make room, and give the same command again"
        ) from None


def disk_is_full(error: Exception) -> bool:
    """Whether `error` means a full disk, for which torch's archive writer and safetensors have errors of their own."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return full or any(words in str(error) for words in ("inline_container", "No space left", "File too large"))


def end_run(out: Path) -> None:
    """Remove the checkpoints of a run whose result is saved in `out`."""
    for checkpoint in (out / RUN_FOLDER).rglob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def write_json(path: Path, content: object) -> None:
    """Write or replace a JSON file as a whole: a process that is killed meanwhile leaves no half file."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def sha256_of_file(file: Path) -> str:
    """SHA-256 (hex) of the content of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of_weights(folder: Path) -> str:
    """SHA-256 (hex) of the names and contents of all files of weights in a folder."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        digest.update(f"{file.name} {sha256_of_file(file)}\n".encode())
    return digest.hexdigest()


def _shown(name: str, value: object) -> str:
    if name in _HASHED:
        return f"other {name} (sha256 {str(value)[:12]}...)" if value else f"no {name}"
    if name == "config":
        return "another config.json"
    return f"no --{name}" if value is None else f"--{name} {value}"
