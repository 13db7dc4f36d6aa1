"""The folder of a run: begun once, gone on with by the same command, tidied at the end; and the run's device."""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from edgelm.errors import TrainingError
from edgelm_export.source.checkpoint import Checkpoint
from edgelm_export.source.fingerprint import model_sha256
from edgelm_train.run.loop import Precision
from edgelm_train.run.record import RunRecord, read_record, refuse_changes

RUN_FOLDER = "training"
"""Inside the output: the run's record, its tokenizer where it made one, its checkpoints while it goes on, and
TensorBoard's files."""


def check_out(out: Path) -> RunRecord | None:
    """Refuse an output that is neither new nor of a run to go on with; returns that run's record.

    Raises:
        TrainingError: it holds something else, or the run in it is finished.
    """
    if out.is_file():
        raise TrainingError(f"{out} is a file; give a new folder as --out")
    if (out / "report.json").exists():
        raise TrainingError(f"the run in {out} is finished; see {out / 'report.md'}, or give another --out")
    started = read_record(out / RUN_FOLDER)
    if started is None and out.exists() and any(out.iterdir()):
        raise TrainingError(f"{out} is not empty; give a new folder as --out")
    return started


def begin_run(
    out: Path, started: RunRecord | None, recorded: Mapping[str, object], precision: Callable[[], Precision]
) -> tuple[Path, Precision]:
    """The folder for the run's checkpoints, once what is `recorded` of it is what it was started with, and its
    precision: what `precision` says as it begins, whatever it would say later.

    Args:
        started: what `check_out` found in `out`.

    Raises:
        TrainingError: the run in `out` was started with something else.
    """
    folder = out / RUN_FOLDER
    if started is None:
        started = RunRecord(recorded, {"precision": precision()})
        started.write(folder)
    refuse_changes(started, recorded, out)
    return folder, "bf16" if started.decided.get("precision") == "bf16" else "fp32"


def end_run(folder: Path) -> None:
    """Remove the checkpoints of a run whose result is saved."""
    for checkpoint in folder.rglob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def sha256_of_file(file: Path) -> str:
    """Hexadecimal; tells one file of data from another."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of_weights(folder: Path) -> str:
    """Hexadecimal; tells one checkpoint's weights from another's."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        digest.update(f"{file.name} {sha256_of_file(file)}\n".encode())
    return digest.hexdigest()


def fingerprints(checkpoint: Checkpoint, data: Path, held_out: Path | None) -> dict[str, object]:
    """What must stay the same when the tuning of a checkpoint is resumed, beside its options."""
    return {
        "base": checkpoint.name,
        "weights": model_sha256(checkpoint.model),
        "tokenizer": hashlib.sha256(checkpoint.tokenizer.to_json().encode()).hexdigest(),
        "data": sha256_of_file(data),
        "held-out data": None if held_out is None else sha256_of_file(held_out),
    }


def device_for(asked: str) -> str:
    """ "cuda" or "cpu" for an option that may also be "auto".

    Raises:
        TrainingError: a GPU was asked for, and there is none.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        raise TrainingError("--device cuda was asked for, but torch finds no CUDA GPU here")
    return "cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu"
