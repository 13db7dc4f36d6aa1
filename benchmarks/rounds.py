"""Interleaved rounds: every engine is loaded in a process of its own, and a round asks each engine in turn."""

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.engines import ENVIRONMENT
from benchmarks.machine import busy_cpu_seconds
from benchmarks.report import Measured

ROOT = Path(__file__).parent.parent
SETTLE_SECONDS = 0.2
"""Pause between two turns, because thread pools spin for some milliseconds after their last work."""


class WorkerEnded(SystemExit):
    """The process of an engine ended. Its stderr says why."""


@dataclass(frozen=True, slots=True)
class Case:
    """The request that every engine gets in a turn."""

    prompt_tokens: int
    new_tokens: int
    batch: int = 1
    num_beams: int = 1

    def prompts(self, vocabulary: int, turn: int) -> list[list[int]]:
        """Random token ids (B, T), equal for all engines in a turn and new in every turn.

        They are new because an engine with a prompt cache must not find the beginning of a prompt there.
        """
        rows = [random.Random(f"{turn} {self.prompt_tokens} {row}") for row in range(self.batch)]
        return [draw.choices(range(vocabulary), k=self.prompt_tokens) for draw in rows]


@dataclass
class Worker:
    """The process of one engine, and its answers."""

    name: str
    process: subprocess.Popen[str]
    loading: dict[str, Any] = field(default_factory=dict)
    answers: dict[Case, list[dict[str, Any]]] = field(default_factory=dict)

    def ask(self, prompts: Sequence[Sequence[int]], new_tokens: int, num_beams: int = 1) -> dict[str, Any]:
        """Have the engine continue `prompts` (B, T).

        Raises:
            SystemExit: it made another number of tokens than `new_tokens`.
            WorkerEnded: the process ended.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(
            json.dumps({"prompts": prompts, "new_tokens": new_tokens, "num_beams": num_beams}) + "\n"
        )
        self.process.stdin.flush()
        answer = self.answer()
        if len(answer["token_ids"]) != new_tokens:
            raise SystemExit(f"{self.name} made {len(answer['token_ids'])} tokens instead of {new_tokens}")
        return answer

    def answer(self) -> dict[str, Any]:
        """The next JSON line of the process.

        Raises:
            WorkerEnded: the process ended.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise WorkerEnded(
                f"the worker of {self.name} ended with status {self.process.wait()}; the reason stands above"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def started_worker(
    name: str, loader: str, folder: Path, threads: int, python: str | Path = sys.executable
) -> Iterator[Worker]:
    """A worker that has loaded its model. Its process ends with the context.

    Args:
        name: name of the engine.
        loader: function that loads the engine, as "module:function".
        folder: folder of the model.
        threads: threads of the engine.
        python: interpreter of the environment that the engine is installed in.

    Raises:
        WorkerEnded: the engine could not load its model.
    """
    process = subprocess.Popen(
        [str(python), "-m", "benchmarks.worker", loader, str(folder), str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=ENVIRONMENT,
        cwd=ROOT,
    )
    with process:  # closes the pipes, which ends the worker, and waits for it
        worker = Worker(name, process)
        worker.loading = worker.answer()
        yield worker


def run_rounds(workers: Sequence[Worker], cases: Sequence[Case], vocabulary: int, rounds: int) -> list[float]:
    """Ask every worker for every case in turn, `rounds` times after a warm-up.

    Returns:
        CPUs that other processes kept busy during each turn.
    """
    other_cpus: list[float] = []
    for count in range(rounds + 1):
        first = count % len(workers)
        for case in cases:
            prompts = case.prompts(vocabulary, count)
            for worker in [*workers[first:], *workers[:first]]:
                time.sleep(SETTLE_SECONDS)
                busy, started = busy_cpu_seconds(), time.perf_counter()
                answer = worker.ask(prompts, case.new_tokens, case.num_beams)
                seconds = time.perf_counter() - started
                if count == 0:
                    continue  # the warm-up
                other_cpus.append(max(0.0, busy_cpu_seconds() - busy - answer["cpu_seconds"]) / seconds)
                worker.answers.setdefault(case, []).append(answer)
            if count:
                print(f"round {count} of {rounds}, {_speeds(workers, case)}", file=sys.stderr)
        if not count:
            print("warm-up: done", file=sys.stderr)
    return other_cpus


def _speeds(workers: Sequence[Worker], case: Case) -> str:
    speeds = [(w.name, (case.new_tokens - 1) * case.batch / w.answers[case][-1]["decode_seconds"]) for w in workers]
    listed = ", ".join(f"{name} {speed:.0f}" for name, speed in speeds)
    return f"tokens/s after {case.prompt_tokens}: {listed}"


def measured(worker: Worker, case: Case) -> Measured:
    """The worker's answers to `case` as speeds. The first new token belongs to the prefill."""
    answers = worker.answers[case]
    new_tokens = case.new_tokens * case.batch
    return Measured(
        prefill_tokens_per_second=[case.prompt_tokens * case.batch / answer["prefill_seconds"] for answer in answers],
        decode_tokens_per_second=[(case.new_tokens - 1) * case.batch / answer["decode_seconds"] for answer in answers],
        call_tokens_per_second=[
            new_tokens / (answer["prefill_seconds"] + answer["decode_seconds"]) for answer in answers
        ],
        import_seconds=worker.loading["import_seconds"],
        load_seconds=worker.loading["load_seconds"],
        loaded_peak_bytes=worker.loading["loaded_peak_bytes"],
        loaded_anonymous_bytes=worker.loading["loaded_anonymous_bytes"],
        peak_bytes=answers[-1]["peak_bytes"],
        anonymous_bytes=answers[-1]["anonymous_bytes"],
        idle_cpu_seconds=max(answer["idle_cpu_seconds"] for answer in answers),
    )
