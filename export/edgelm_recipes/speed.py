"""How fast a bundle does its task, and how much memory that takes, in a process that has loaded nothing else."""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from edgelm.engine.memory import peak_rss_bytes
from edgelm.errors import PromptError, TrainingError
from edgelm.generation.task_format import TaskText
from edgelm.loading import load
from edgelm.model import Model

SPEED_INPUTS = 30
"""Inputs whose time is measured."""


@dataclass(frozen=True)
class Runnable:
    """A bundle, and what is put before its prompts."""

    bundle: Path
    prefix: Path | None = None

    def open(self, task: Path, threads: int) -> Model:
        """Load it with the task of the file `task`."""
        return load(self.bundle, device="cpu", threads=threads, prefix=self.prefix, task=task)


@dataclass(frozen=True)
class Speed:
    """How long a bundle takes for an input of its task, in a process of its own."""

    median_seconds: float
    tokens_per_second: float | None
    """Median over the texts that were written; None where the task writes none."""
    peak_rss_bytes: int
    inputs: int
    threads: int


def measure_speed(run: Runnable, task: Path, inputs: Sequence[Mapping[str, str]], threads: int) -> Speed:
    """Time the task in a process of its own, because this process has loaded torch.

    Raises:
        TrainingError: the bundle does not run there.
    """
    asked = {
        "bundle": str(run.bundle.absolute()),
        "prefix": None if run.prefix is None else str(run.prefix.absolute()),
        "task": str(task.absolute()),
        "threads": threads,
        "inputs": list(inputs),
    }
    # -P: without it Python would import modules from the current folder, which may be anybody's.
    command = [sys.executable, "-P", "-c", "from edgelm_recipes.speed import answer_speed; answer_speed()"]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise TrainingError(f"the finished bundle does not run: {done.stderr.strip()[-500:] or done.returncode}")
    return Speed(**json.loads(done.stdout))


def answer_speed() -> None:
    """The other process of `measure_speed`: it reads what is asked from standard input, and prints an answer."""
    asked = json.load(sys.stdin)
    prefix = None if asked["prefix"] is None else Path(asked["prefix"])
    model = Runnable(Path(asked["bundle"]), prefix).open(Path(asked["task"]), asked["threads"])
    seconds, rates = [], []
    for number, values in enumerate([asked["inputs"][0], *asked["inputs"]]):  # the first one warms up
        model.forget()
        began = time.perf_counter()
        try:
            result = model.task(values)
        except PromptError:  # too long for the context
            continue
        if number:
            seconds.append(time.perf_counter() - began)
            if isinstance(result, TaskText) and result.completion.stats.new_tokens > 1:
                rates.append(result.completion.stats.tokens_per_second)
    if not seconds:
        raise SystemExit("no input fits into the context")
    speed = Speed(median(seconds), median(rates) if rates else None, peak_rss_bytes(), len(seconds), asked["threads"])
    sys.stdout.write(json.dumps(asdict(speed)))
