"""Texts of a scheduler beside calls of `generate` and a batch: speed, and the CPU that handing out each token takes.

    python -m benchmarks.scheduler [BUNDLE] [--rounds N]

Prints one Markdown table: medians over interleaved rounds, with minimum and maximum in brackets; x is the median over
the rounds of the ratio to `generate_batch`. Read the CPU column of a run with `--threads 1`: with more threads it has
the waiting of ONNX Runtime's threads in it.
"""

import argparse
import asyncio
import threading
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import edgelm
from edgelm import Model, Submission, TextScheduler

PROMPTS = ("Once upon a time", "Lily", "The dog", "One day", "Tom", "A cat", "In the park", "Mom said")
OPTIONS: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "eos_token_id": (), "seed": 3}

Ways = dict[str, Callable[[], object]]


def read_by_threads(submissions: list[Submission]) -> None:
    """Read each submission token by token, in a thread of its own."""
    threads = [threading.Thread(target=lambda own=own: list(own)) for own in submissions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


async def read_by_tasks(submissions: list[Submission]) -> None:
    """Read each submission token by token, in a task of its own."""

    async def read(submission: Submission) -> None:
        async for _ in submission:
            pass

    await asyncio.gather(*map(read, submissions))


def ways_of(model: Model, scheduler: TextScheduler, new_tokens: int) -> Ways:
    """Ways to generate a text for each prompt. The first one is what the others are compared with."""
    options = {**OPTIONS, "max_new_tokens": new_tokens}

    def submitted() -> list[Submission]:
        return [scheduler.submit(prompt, key=prompt, **options) for prompt in PROMPTS]

    count = len(PROMPTS)
    return {
        f"`generate_batch` of {count}": lambda: model.generate_batch(PROMPTS, max_rows=count, **options),
        f"{count} calls of `generate`": lambda: [model.generate(prompt, **options) for prompt in PROMPTS],
        f"{count} submissions, `completion`": lambda: [each.completion() for each in submitted()],
        f"{count} submissions, {count} threads read each token": lambda: read_by_threads(submitted()),
        f"{count} submissions, {count} tasks read each token": lambda: asyncio.run(read_by_tasks(submitted())),
    }


def measured(ways: Ways, rounds: int, tokens: int) -> dict[str, list[tuple[float, float]]]:
    """Tokens a second, and CPU microseconds a token, of each way in each round after a warm-up."""
    values: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            started, cpu = time.perf_counter(), time.process_time()
            way()
            seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
            if number:
                values[name].append((tokens / seconds, 1e6 * cpu_seconds / tokens))
    return values


def table(values: dict[str, list[tuple[float, float]]]) -> str:
    base = next(iter(values.values()))
    lines = ["| all texts together | tokens/s | x | CPU μs/token | x |", "|---|--:|--:|--:|--:|"]
    for name, own in values.items():
        cells = [name]
        for column in (0, 1):
            numbers = [row[column] for row in own]
            ratio = median(row[column] / other[column] for row, other in zip(own, base, strict=True))
            cells += [f"{median(numbers):.0f} ({min(numbers):.0f}-{max(numbers):.0f})", f"{ratio:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a scheduler beside single calls and a batch.")
    parser.add_argument("bundle", nargs="?", metavar="BUNDLE", help="default: the embedded model")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="after a warm-up; default %(default)s")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="default %(default)s")
    parser.add_argument("--new-tokens", type=int, default=100, metavar="N", help="of each text; default %(default)s")
    options = parser.parse_args()
    with (
        edgelm.load(options.bundle, device="cpu", threads=options.threads) as model,
        model.scheduler(max_rows=len(PROMPTS)) as scheduler,
    ):
        ways = ways_of(model, scheduler, options.new_tokens)
        print(table(measured(ways, options.rounds, options.new_tokens * len(PROMPTS))))


if __name__ == "__main__":
    main()
