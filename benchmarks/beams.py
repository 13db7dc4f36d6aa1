"""Beam search of edgelm beside optimum's, on the same random weights of GPT-2's shape, in one interleaved run.

    python -m benchmarks.beams

Prints a Markdown table of the seconds of whole calls, prompt included, and one JSON object as its last line. The first
run makes the models, which takes minutes.
"""

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from benchmarks.against_optimum import make_models
from benchmarks.engines import BASELINE, ENGINES
from benchmarks.machine import machine_facts
from benchmarks.make_gpt2 import add_shape_options, shape_of
from benchmarks.prepare import DEFAULT_WORK, model_folder
from benchmarks.rounds import Case, Worker, run_rounds, started_worker

COMPARED = ("edgelm int8", "edgelm int4", BASELINE)


def call_seconds(worker: Worker, case: Case) -> list[float]:
    """Seconds of the whole call in each round."""
    return [answer["prefill_seconds"] + answer["decode_seconds"] for answer in worker.answers[case]]


def _parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure beam search beside optimum's.")
    parser.add_argument(
        "--work",
        type=Path,
        default=DEFAULT_WORK,
        metavar="DIR",
        help="folder that keeps the models; default %(default)s",
    )
    parser.add_argument("--num-beams", type=int, default=4, metavar="N", help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="after the warm-up; default %(default)s")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of each engine; default %(default)s")
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N", help="default %(default)s")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="default %(default)s")
    add_shape_options(parser)
    return parser.parse_args()


def main() -> None:
    options = _parsed_options()
    shape = shape_of(options)
    make_models(options.work, shape)
    case = Case(options.prompt_tokens, options.new_tokens, num_beams=options.num_beams)
    with ExitStack() as stack:
        workers = []
        for name in COMPARED:
            print(f"loading {name}", file=sys.stderr)
            folder = model_folder(options.work, shape, ENGINES[name].model)
            workers.append(stack.enter_context(started_worker(name, ENGINES[name].loader, folder, options.threads)))
        other_cpus = run_rounds(workers, [case], shape.vocabulary, options.rounds)
        seconds = {worker.name: call_seconds(worker, case) for worker in workers}
        peaks = {worker.name: worker.answers[case][-1]["peak_bytes"] for worker in workers}
    print(f"| engine, {options.num_beams} beams | seconds (min-max) | x {BASELINE} | peak MB |\n|---|--:|--:|--:|")
    ratios = {}
    for name, own in seconds.items():
        ratios[name] = median(a / b for a, b in zip(own, seconds[BASELINE], strict=True))
        spread = f"{median(own):.2f} ({min(own):.2f}-{max(own):.2f})"
        print(f"| {name} | {spread} | {ratios[name]:.2f} | {peaks[name] / 1e6:.0f} |")
    print()
    facts = {
        **{name: value for name, value in vars(options).items() if name != "work"},
        "machine": machine_facts(),
        "mean_cpus_busy_with_other_processes": round(sum(other_cpus) / len(other_cpus), 3),
        "seconds": seconds,
        "ratios": ratios,
        "peak_bytes": peaks,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
