"""edgelm beside optimum and transformers, on the same random weights of GPT-2's shape, in one interleaved run.

    python -m benchmarks.against_optimum

Prints a Markdown table, and one JSON object as its last line. Progress goes to stderr. The first run makes the models,
which takes minutes.
"""

import argparse
import json
import subprocess
import sys
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.engines import BASELINE, ENGINES, ENVIRONMENT
from benchmarks.machine import machine_facts
from benchmarks.make_gpt2 import Shape, add_shape_options, shape_of
from benchmarks.prepare import DEFAULT_WORK, model_folder
from benchmarks.report import as_json, markdown
from benchmarks.rounds import Case, Worker, measured, run_rounds, started_worker


def make_models(work: Path, shape: Shape) -> None:
    """Make the missing models of `shape` under `work`, in a process of its own."""
    sizes = [f"--{name}={getattr(shape, name)}" for name in Shape.__slots__]
    command = [sys.executable, "-m", "benchmarks.prepare", "--work", str(work), *sizes]
    if subprocess.run(command, env=ENVIRONMENT).returncode:
        raise SystemExit("the models could not be made; the reason stands above")


def _parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure edgelm beside optimum and transformers.")
    parser.add_argument(
        "--work",
        type=Path,
        default=DEFAULT_WORK,
        metavar="DIR",
        help="folder that keeps the models; default %(default)s",
    )
    parser.add_argument("--rounds", type=int, default=11, metavar="N", help="after the warm-up; default %(default)s")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of each engine; default %(default)s")
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N", help="default %(default)s")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="default %(default)s")
    add_shape_options(parser)
    options = parser.parse_args()
    if options.rounds < 1 or options.prompt_tokens < 1 or options.new_tokens < 2:
        parser.error("--rounds and --prompt-tokens must be at least 1, and --new-tokens at least 2")
    if options.prompt_tokens + options.new_tokens > options.context:
        parser.error(f"{options.prompt_tokens} + {options.new_tokens} tokens do not fit a context of {options.context}")
    return options


def main() -> None:
    options = _parsed_options()
    shape = shape_of(options)
    make_models(options.work, shape)
    case = Case(options.prompt_tokens, options.new_tokens)
    with ExitStack() as stack:
        workers: list[Worker] = []
        for name, engine in ENGINES.items():
            print(f"loading {name}", file=sys.stderr)
            folder = model_folder(options.work, shape, engine.model)
            workers.append(stack.enter_context(started_worker(name, engine.loader, folder, options.threads)))
        other_cpus = run_rounds(workers, [case], shape.vocabulary, options.rounds)
        results = {worker.name: measured(worker, case) for worker in workers}
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **{name: value for name, value in vars(options).items() if name != "work"},
        "machine": machine_facts(),
        "mean_cpus_busy_with_other_processes": round(sum(other_cpus) / len(other_cpus), 3),
        "baseline": BASELINE,
        "engines": as_json(results, BASELINE),
    }
    print(markdown(results, BASELINE))
    print()
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
