"""edgelm beside optimum and transformers, on the same random weights of GPT-2's shape, in one interleaved run.

    python -m benchmarks.against_optimum

Prints a Markdown table and, as its last line, one JSON object. Progress goes to stderr.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.engines import BASELINE, ENGINES, ENVIRONMENT
from benchmarks.machine import busy_cpu_seconds, machine_facts
from benchmarks.make_gpt2 import Shape, add_shape_options, shape_of
from benchmarks.prepare import DEFAULT_WORK, model_folder
from benchmarks.report import Measured, as_json, markdown

PROMPT_SEED = 0
SETTLE_SECONDS = 0.2
"""Between two turns: thread pools spin for some milliseconds after their last work."""


@dataclass
class Worker:
    """The process of one engine, and what it has answered."""

    name: str
    process: subprocess.Popen[str]
    loading: dict[str, Any] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, request: object) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the worker of {self.name} ended with status {self.process.wait()}; its reason is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def started_worker(name: str, folder: Path, threads: int) -> Iterator[Worker]:
    """A worker that has loaded its model; it ends with the context."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.worker", name, str(folder), str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=ENVIRONMENT,
    )
    with process:  # closes the pipes, at which the worker ends, and waits for it
        worker = Worker(name, process)
        worker.loading = worker.answer()
        yield worker


def run_rounds(
    workers: list[Worker], prompt: list[int], new_tokens: int, rounds: int, num_beams: int = 1
) -> list[float]:
    """Every worker in turn, `rounds` times; returns how many CPUs other processes kept busy, turn by turn."""
    others: list[float] = []
    for count in range(rounds + 1):
        first = count % len(workers)
        for worker in workers[first:] + workers[:first]:
            time.sleep(SETTLE_SECONDS)
            busy, started = busy_cpu_seconds(), time.perf_counter()
            answer = worker.ask({"prompt": prompt, "new_tokens": new_tokens, "num_beams": num_beams})
            seconds = time.perf_counter() - started
            if answer["new_tokens"] != new_tokens:
                raise SystemExit(f"{worker.name} made {answer['new_tokens']} tokens instead of {new_tokens}")
            if count == 0:
                continue  # the warm-up
            others.append(max(0.0, busy_cpu_seconds() - busy - answer["cpu_seconds"]) / seconds)
            worker.answers.append(answer)
        name = f"round {count} of {rounds}" if count else "warm-up"
        print(f"{name}: {_speeds(workers, new_tokens) if count else 'done'}", file=sys.stderr)
    return others


def _speeds(workers: list[Worker], new_tokens: int) -> str:
    speeds = [(w.name, (new_tokens - 1) / w.answers[-1]["decode_seconds"]) for w in workers]
    return ", ".join(f"{name} {speed:.0f} tokens/s" for name, speed in speeds)


def measured(worker: Worker, prompt_tokens: int, new_tokens: int) -> Measured:
    """The worker's answers as speeds. The first new token belongs to the prefill."""
    answers = worker.answers
    return Measured(
        prefill_tokens_per_second=[prompt_tokens / answer["prefill_seconds"] for answer in answers],
        decode_tokens_per_second=[(new_tokens - 1) / answer["decode_seconds"] for answer in answers],
        import_seconds=worker.loading["import_seconds"],
        load_seconds=worker.loading["load_seconds"],
        loaded_peak_bytes=worker.loading["loaded_peak_bytes"],
        peak_bytes=answers[-1]["peak_bytes"],
        idle_cpu_seconds=max(answer["idle_cpu_seconds"] for answer in answers),
    )


def make_models(work: Path, shape: Shape) -> None:
    sizes = [f"--{name}={getattr(shape, name)}" for name in Shape.__slots__]
    command = [sys.executable, "-m", "benchmarks.prepare", "--work", str(work), *sizes]
    if subprocess.run(command, env=ENVIRONMENT).returncode:
        raise SystemExit("making the models failed; its reason is above")


def _parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure edgelm beside optimum and transformers.")
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, metavar="DIR", help="keeps the models; %(default)s")
    parser.add_argument("--rounds", type=int, default=11, metavar="N", help="after the warm-up; default %(default)s")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of each engine; default %(default)s")
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N", help="default %(default)s")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="default %(default)s")
    add_shape_options(parser)
    options = parser.parse_args()
    if options.rounds < 1 or options.prompt_tokens < 1 or options.new_tokens < 2:
        parser.error("it takes a round, a prompt token and two new tokens at least")
    if options.prompt_tokens + options.new_tokens > options.context:
        parser.error(f"{options.prompt_tokens} + {options.new_tokens} tokens do not fit a context of {options.context}")
    return options


def main() -> None:
    options = _parsed_options()
    shape = shape_of(options)
    make_models(options.work, shape)
    prompt = random.Random(PROMPT_SEED).choices(range(shape.vocabulary), k=options.prompt_tokens)
    with ExitStack() as stack:
        workers: list[Worker] = []
        for name, engine in ENGINES.items():
            print(f"loading {name}", file=sys.stderr)
            folder = model_folder(options.work, shape, engine.model)
            workers.append(stack.enter_context(started_worker(name, folder, options.threads)))
        others = run_rounds(workers, prompt, options.new_tokens, options.rounds)
        results = {w.name: measured(w, len(prompt), options.new_tokens) for w in workers}
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **{name: value for name, value in vars(options).items() if name != "work"},
        "machine": machine_facts(),
        "mean_cpus_busy_with_other_processes": round(sum(others) / len(others), 3),
        "baseline": BASELINE,
        "engines": as_json(results, BASELINE),
    }
    print(markdown(results, BASELINE))
    print()
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
