"""Measures how long an export takes, stage by stage.

    python -m benchmarks.export_time [--sizes 1M 6M 124M] [--precision int8] [--checkpoint FOLDER ...]

Each export runs in a process of its own on checkpoints with random weights, because the time depends on the shape
alone. The table has the seconds that passed and the CPU seconds, those of child processes included.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import get_args

from benchmarks.machine import machine_facts
from benchmarks.make_gpt2 import Shape, make_checkpoint
from edgelm.bundle.manifest import FixedPrecision

SHAPES = {
    "1M": Shape(layers=2, width=20, heads=2),
    "6M": Shape(layers=6, width=256, heads=4, vocabulary=4096, context=512),
    "124M": Shape(),
}
"""A small model with GPT-2's vocabulary, the model that comes with edgelm, and GPT-2 itself."""
LIMIT_SECONDS = {"1M": 25, "6M": 15, "124M": 150}
"""What an export to int8 may take on two cores that do nothing else."""

Stages = list[tuple[str, float, float]]
"""Name, seconds and CPU seconds of each stage."""


def measure(source: Path, output: Path, precision: str) -> Stages:
    """Export `source` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.export_time", "--worker", str(source), str(output), precision]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    stages: Stages = json.loads(done.stdout.splitlines()[-1])
    return stages


def export_in_stages(source: str, output: Path, precision: FixedPrecision) -> Stages:
    """Export `source` in this process."""
    stages: Stages = []
    name, began = "loading torch, transformers and optimum", (time.monotonic(), 0.0)

    def begin(stage: str) -> None:
        nonlocal name, began
        now = time.monotonic(), _cpu_seconds()
        stages.append((name, now[0] - began[0], now[1] - began[1]))
        name, began = stage, now

    from edgelm_export.pipeline import export

    export(source, output, precision, accept_quality_loss=True, report=begin)
    begin("")
    return stages


def _cpu_seconds() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def print_table(stages: Stages) -> None:
    """Print a row for each stage, and the sum."""
    print("| stage | seconds | CPU seconds |\n|---|---|---|")
    for name, seconds, cpu_seconds in stages:
        print(f"| {name} | {seconds:.1f} | {cpu_seconds:.1f} |")
    print(f"| **all** | **{sum(stage[1] for stage in stages):.1f}** | **{sum(stage[2] for stage in stages):.1f}** |")


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        source, output, precision = sys.argv[2:]
        chosen = next(name for name in get_args(FixedPrecision) if name == precision)
        print(json.dumps(export_in_stages(source, Path(output), chosen)))
        return
    parser = argparse.ArgumentParser(description="Measure how long an export takes, stage by stage.")
    parser.add_argument("--sizes", nargs="*", choices=tuple(SHAPES), default=list(SHAPES), help="default: all of them")
    parser.add_argument("--precision", choices=get_args(FixedPrecision), default="int8", help="default %(default)s")
    parser.add_argument("--checkpoint", type=Path, action="append", default=[], help="a checkpoint to export too")
    options = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in machine_facts().items()))
    with tempfile.TemporaryDirectory() as work:
        for size in options.sizes:
            parameters = make_checkpoint(Path(work) / size, SHAPES[size])
            limit = f", limit {LIMIT_SECONDS[size]} s" if options.precision == "int8" else ""
            print(f"\n{size}: {parameters / 1e6:.1f} million parameters, {SHAPES[size].vocabulary:,} tokens{limit}\n")
            print_table(measure(Path(work) / size, Path(work) / f"{size}-bundle", options.precision))
        for number, checkpoint in enumerate(options.checkpoint):
            print(f"\n{checkpoint}\n")
            print_table(measure(checkpoint, Path(work) / f"bundle-{number}", options.precision))


if __name__ == "__main__":
    main()
