"""How much of the memory's bandwidth decoding uses.

    python -m benchmarks.bandwidth BUNDLE [BUNDLE ...]

A step reads the weights of every product once, and the keys and values of all earlier tokens. In turns with the steps,
the same number of threads sums up a buffer of the same size. Prints a Markdown table.
"""

import argparse
import random
import statistics
import threading
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgelm.bundle.folder import Bundle
from edgelm.engine.graph import Graph
from edgelm.engine.session import Session

ROUNDS, STEPS = 15, 32


def step_bytes(session: Session, context: int) -> int:
    """Bytes that a step after `context` tokens reads: the weights of all products, and the keys and values."""
    manifest = session.bundle.manifest
    weights = manifest.files[manifest.graph.weights_file].size_bytes
    looked_up = ["transformer.wpe.weight"]
    if any(matrix.name == "lm_head.weight" for matrix in manifest.recipe.matrices):
        looked_up.append("transformer.wte.weight")
    for matrix in manifest.recipe.matrices:
        if matrix.name in looked_up:
            weights -= int(np.prod(matrix.shape)) * matrix.bits // 8
    return weights + context * session.bytes_per_token


def read_seconds(parts: list[npt.NDArray[np.int64]]) -> float:
    """Seconds to sum up all parts, one thread for each part."""
    threads = [threading.Thread(target=part.sum) for part in parts]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started


def measure(bundle: Path, context: int, threads: int) -> str:
    """Measure one bundle.

    Args:
        bundle: folder of the bundle.
        context: tokens in the cache before the first measured step.
        threads: threads of the session and of the reading.

    Returns:
        A row of the table.
    """
    session = Graph.open(Bundle.read(bundle), device="cpu", threads=threads).session()
    size = step_bytes(session, context + STEPS // 2)
    parts = np.array_split(np.ones(size // 8, np.int64), threads)
    prompt = random.Random(0).choices(range(session.vocab_size), k=context)
    steps, reads = [], []
    for _ in range(ROUNDS):
        session.reset()
        session.step(prompt)
        started = time.perf_counter()
        for token in range(STEPS):
            session.step([token])
        steps.append((time.perf_counter() - started) / STEPS)
        reads.append(min(read_seconds(parts) for _ in range(3)))
    step, read = statistics.median(steps), statistics.median(reads)
    share = statistics.median(a / b for a, b in zip(reads, steps, strict=True))
    return (
        f"| {bundle.name} | {size / 1e6:.0f} | {step * 1e3:.2f} | {size / step / 1e9:.1f} | "
        f"{size / read / 1e9:.1f} | {share:.0%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure which share of the memory's bandwidth decoding uses.")
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument("--context", type=int, default=128, metavar="N", help="cached tokens; default %(default)s")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="default %(default)s")
    options = parser.parse_args()
    print("| bundle | MB a step | ms a step | decoding GB/s | buffer GB/s | share |\n|---|--:|--:|--:|--:|--:|")
    for bundle in options.bundles:
        print(measure(bundle, options.context, options.threads), flush=True)


if __name__ == "__main__":
    main()
