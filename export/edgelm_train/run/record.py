"""What a run was started with, kept beside its checkpoints: the same command resumes it, another one is refused."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgelm.errors import TrainingError
from edgelm_train.run.json_file import write_json

_FILE = "run.json"
_HASHED = ("data", "held-out data", "weights", "tokenizer")
"""What is recorded by its SHA-256."""


@dataclass(frozen=True)
class RunRecord:
    """Options as they were given, and what was decided from them once and holds for every part of the run."""

    options: Mapping[str, object]
    """JSON values by option name as on the command line, without dashes in front."""
    decided: Mapping[str, object]

    def write(self, folder: Path) -> None:
        """Put it into `folder`, which is made."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / _FILE, {"options": dict(self.options), "decided": dict(self.decided)})


def read_record(folder: Path) -> RunRecord | None:
    """The record in `folder`; None where no run was started there.

    Raises:
        TrainingError: it is damaged.
    """
    path = folder / _FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return RunRecord(dict(content["options"]), dict(content["decided"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise TrainingError(f"{path} is damaged; remove the folder {folder} to start this run again") from None


def refuse_changes(started: RunRecord, options: Mapping[str, object], out: Path) -> None:
    """Raises TrainingError, which names the first option that is not what the run in `out` was started with."""
    for name in [*started.options, *options]:
        before, now = started.options.get(name), options.get(name)
        if before != now:
            raise TrainingError(
                f"the run in {out} was started with {_shown(name, before)}, not {_shown(name, now)}; resume it with "
                "its own options, or give another --out"
            )


def _shown(name: str, value: object) -> str:
    if name in _HASHED:
        return f"other {name} (sha256 {str(value)[:12]}...)" if value else f"no {name}"
    if name == "config":
        return "another config.json"
    return f"no --{name}" if value is None else f"--{name} {value}"
