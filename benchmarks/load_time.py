"""What loading costs beside an older checkout, because every check before ONNX Runtime adds to it.

    python -m benchmarks.load_time OLD_CHECKOUT [BUNDLE ...] [--rounds N]

Each round loads every bundle with both checkouts, in turn and in processes of their own; without a bundle, the embedded
model. The old checkout has to know the bundle's format. Prints medians in milliseconds: the CPU time and the wall time
of `edgelm.load`, the CPU time of the imports before it, and the median of the differences within a round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ("load, CPU", "load, wall", "imports, CPU")
WORKER = """
import json, sys, time
started = time.process_time()
import onnxruntime, tokenizers
from edgelm import load
imported = time.process_time()
wall = time.perf_counter()
model = load(sys.argv[1] if len(sys.argv) > 1 else None)
wall, loaded = time.perf_counter() - wall, time.process_time()
print(json.dumps([1000 * seconds for seconds in (loaded - imported, wall, imported - started)]))
model.close()
"""


def milliseconds(checkout: Path, bundle: Path | None, caches: Path) -> list[float]:
    """Load a bundle in a new process with the code of `checkout`; returns what `MEASURED` names.

    `caches` is a folder for bytecode.

    Raises:
        SystemExit: the checkout cannot load the bundle. The reason stands above.
    """
    path = os.pathsep.join(str(checkout / part) for part in ("", "export", "models"))
    command = [sys.executable, "-P", "-c", WORKER, *([] if bundle is None else [str(bundle)])]
    environment = os.environ | {"PYTHONPATH": path, "PYTHONPYCACHEPREFIX": str(caches), "ORT_DISABLE_TELEMETRY": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is not compiled at every start
    with tempfile.TemporaryDirectory() as folder:  # not a checkout, from which modules would be imported
        done = subprocess.run(command, env=environment, cwd=folder, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{checkout} cannot load {bundle or 'the embedded model'}: the reason stands above")
    times: list[float] = json.loads(done.stdout.splitlines()[-1])
    return times


def print_bundle(old: Path, bundle: Path | None, rounds: int, caches: Path) -> None:
    """Load a bundle with both checkouts `rounds` times, after a round that fills caches, and print the medians."""
    times: dict[Path, list[list[float]]] = {old: [], ROOT: []}
    for count in range(rounds + 1):
        for checkout in (old, ROOT) if count % 2 else (ROOT, old):
            took = milliseconds(checkout, bundle, caches)
            if count:
                times[checkout].append(took)
    print("the embedded model" if bundle is None else bundle)
    print(f"  {'ms':14} {'old':>8} {'new':>8} {'new - old':>10}")
    for index, name in enumerate(MEASURED):
        before, after = ([took[index] for took in times[checkout]] for checkout in (old, ROOT))
        more = statistics.median(new - old for old, new in zip(before, after, strict=True))
        print(f"  {name:14} {statistics.median(before):8.1f} {statistics.median(after):8.1f} {more:+10.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load_time", description="Measure what loading costs beside an older checkout."
    )
    parser.add_argument("old", type=Path, metavar="OLD_CHECKOUT")
    parser.add_argument("bundles", nargs="*", type=Path, metavar="BUNDLE", help="default: the embedded model")
    parser.add_argument("--rounds", type=int, default=11, metavar="N", help="default %(default)s")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgelm-bytecode-") as caches:
        for bundle in options.bundles or (None,):
            place = None if bundle is None else bundle.resolve()
            print_bundle(options.old.resolve(), place, options.rounds, Path(caches))


if __name__ == "__main__":
    main()
