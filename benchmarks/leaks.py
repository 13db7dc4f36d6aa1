"""How the resident memory of one process grows while it generates, and while it loads and closes models.

    python -m benchmarks.leaks [BUNDLE] [--generations N] [--loads N]

The slope is that of a straight line through the second half of the samples, because the first texts fill pools and
caches that stay. Ctrl-C ends a row early, and reports what there is. Needs Linux.
"""

import argparse
import contextlib
import gc
import time
from collections.abc import Callable

import numpy as np

import edgelm
from edgelm.engine.memory import resident_bytes

PROMPTS = ("Once upon a time", "The dog", "Lily was sad. She began to", "")
SAMPLES = 200


def samples(count: int, use: Callable[[int], object]) -> tuple[list[float], list[float]]:
    """Seconds and resident MB (10^6 bytes) at SAMPLES moments of `count` uses."""
    seconds, memory_mb, started = list[float](), list[float](), time.perf_counter()
    every = max(1, count // SAMPLES)
    with contextlib.suppress(KeyboardInterrupt):
        for number in range(count):
            use(number)
            if number % every == 0:
                gc.collect()
                seconds.append(time.perf_counter() - started)
                memory_mb.append(resident_bytes() / 1e6)
    return seconds, memory_mb


def report(name: str, count: int, seconds: list[float], memory_mb: list[float]) -> None:
    half = len(seconds) // 2
    slope = np.polyfit(np.array(seconds[half:]) / 3600, memory_mb[half:], 1)[0]
    grown = memory_mb[-1] - memory_mb[len(memory_mb) // 10]
    done = (len(seconds) - 1) * max(1, count // SAMPLES) + 1
    print(f"{done} {name} in {seconds[-1]:.0f} s: {memory_mb[0]:.1f} MB at first, {memory_mb[-1]:.1f} MB at last")
    print(f"  {grown:+.2f} MB after the first tenth, {slope:+.2f} MB an hour in the second half")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how memory grows over many generations, loads and closes.")
    parser.add_argument("bundle", nargs="?", metavar="BUNDLE", help="default: the embedded model")
    parser.add_argument("--generations", type=int, default=10_000, metavar="N", help="default %(default)s")
    parser.add_argument("--loads", type=int, default=1_000, metavar="N", help="default %(default)s")
    options = parser.parse_args()
    with edgelm.load(options.bundle) as model:

        def generate(number: int) -> None:
            prompt, tokens = PROMPTS[number % len(PROMPTS)], 4 + number % 29
            model.generate(prompt, max_new_tokens=tokens, do_sample=True, seed=number)

        report("generations", options.generations, *samples(options.generations, generate))

    def load_and_close(_: int) -> None:
        with edgelm.load(options.bundle) as other:
            other.generate(PROMPTS[0], max_new_tokens=2)

    report("loads and closes", options.loads, *samples(options.loads, load_and_close))


if __name__ == "__main__":
    main()
