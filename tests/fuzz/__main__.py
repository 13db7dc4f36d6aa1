"""``python -m tests.fuzz TARGET --count N --seed S --jobs J``: a long run, from the repository's root.

It prints how many inputs were accepted, refused and failed, the slowest input and the memory, and exits 1 if an input
crashed, hung, took too long or too much memory, or raised what the reader does not promise to raise.
"""

import argparse
import signal
import sys
from pathlib import Path

from tests.fuzz.harness import failing_input, fuzz
from tests.fuzz.targets import TARGETS


def main() -> int:
    """Run what the command line says; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Read mutated inputs, and count.")
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--count", type=int, default=10_000, help="number of inputs")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other inputs")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--save", type=Path, help="folder for the inputs that fail")
    arguments = parser.parse_args()
    target = TARGETS[arguments.target]
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell lets its background processes ignore the first
        signal.signal(number, signal.default_int_handler)
    report = fuzz(target, arguments.count, arguments.seed, arguments.jobs, arguments.first)
    for failure in report.failures:
        _print(f"input {failure.index} of seed {arguments.seed}: {failure.what}")
        if arguments.save is not None:
            arguments.save.mkdir(parents=True, exist_ok=True)
            with failing_input(target, arguments.seed, failure.index) as data:
                (arguments.save / f"{target.name}-{arguments.seed}-{failure.index}").write_bytes(data)
    _print(
        f"{target.name}: {report.count:,} inputs of seed {arguments.seed}: {report.accepted:,} accepted, "
        f"{report.refused:,} refused, {len(report.failures):,} failed; slowest {report.slowest_seconds:.3f} s "
        f"(input {report.slowest_input}), peak memory +{report.memory_bytes / 1e6:.0f} MB; "
        f"{report.seconds:.0f} s, {report.count / report.seconds:,.0f} inputs/s"
    )
    return 1 if report.failures else 0


def _print(line: str) -> None:
    sys.stdout.write(line.encode("ascii", "backslashreplace").decode() + "\n")


if __name__ == "__main__":
    sys.exit(main())
