"""Engines side by side: every one loaded in its own process, asked in turn, round after round."""

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
"""Between two turns: thread pools spin for some milliseconds after their last work."""


class WorkerEnded(SystemExit):
    """The process of an engine is gone; its own stderr says why."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is asked of every engine in a turn."""

    prompt_tokens: int
    new_tokens: int
    batch: int = 1
    num_beams: int = 1

    def prompts(self, vocabulary: int, turn: int) -> list[list[int]]:
        """Random token ids (B, T): the same for every engine in a turn, and new in every turn.

        An engine that keeps what it has seen must not find a prompt's beginning there.
        """
        rows = [random.Random(f"{turn} {self.prompt_tokens} {row}") for row in range(self.batch)]
        return [draw.choices(range(vocabulary), k=self.prompt_tokens) for draw in rows]


@dataclass
class Worker:
    """The process of one engine, and what it has answered."""

    name: str
    process: subprocess.Popen[str]
    loading: dict[str, Any] = field(default_factory=dict)
    answers: dict[Case, list[dict[str, Any]]] = field(default_factory=dict)

    def ask(self, prompts: Sequence[Sequence[int]], new_tokens: int, num_beams: int = 1) -> dict[str, Any]:
        """Have it continue `prompts`; checks that it made as many tokens as it was asked for."""
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
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise WorkerEnded(f"the worker of {self.name} ended with status {self.process.wait()}; its reason is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def started_worker(
    name: str, loader: str, folder: Path, threads: int, python: str | Path = sys.executable
) -> Iterator[Worker]:
    """A worker that has loaded its model; it ends with the context.

    Args:
        loader: "module:function" of the engine.
        python: the interpreter of the environment that the engine is installed in.

    Raises:
        WorkerEnded: it did not load.
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
    with process:  # closes the pipes, at which the worker ends, and waits for it
        worker = Worker(name, process)
        worker.loading = worker.answer()
        yield worker


def run_rounds(workers: Sequence[Worker], cases: Sequence[Case], vocabulary: int, rounds: int) -> list[float]:
    """Every case, every worker in turn, `rounds` times after a warm-up.

    Returns how many CPUs other processes kept busy, turn by turn.
    """
    others: list[float] = []
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
                others.append(max(0.0, busy_cpu_seconds() - busy - answer["cpu_seconds"]) / seconds)
                worker.answers.setdefault(case, []).append(answer)
            if count:
                print(f"round {count} of {rounds}, {_speeds(workers, case)}", file=sys.stderr)
        if not count:
            print("warm-up: done", file=sys.stderr)
    return others


def _speeds(workers: Sequence[Worker], case: Case) -> str:
    speeds = [(w.name, (case.new_tokens - 1) * case.batch / w.answers[case][-1]["decode_seconds"]) for w in workers]
    listed = ", ".join(f"{name} {speed:.0f}" for name, speed in speeds)
    return f"tokens/s after {case.prompt_tokens}: {listed}"


def measured(worker: Worker, case: Case) -> Measured:
    """The worker's answers as speeds. The first new token belongs to the prefill."""
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
