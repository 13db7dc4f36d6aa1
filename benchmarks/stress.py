"""Eight threads generate, cancel and abandon texts while processes fork and models close: nothing may hang or leak.

    python -m benchmarks.stress [BUNDLE] [--generations N]

Needs Linux. Prints descriptors, threads and memory after each round of threads.
"""

import argparse
import asyncio
import os
import random
import threading
import time
from pathlib import Path

import edgelm
from edgelm.decoding.generation_config import GenerationOptions
from edgelm.engine.memory import resident_bytes

PROMPT = "Once upon a time"
THREADS, SEEDS = 8, 8


def facts() -> tuple[int, int, float]:
    """Numbers of descriptors and threads of this process, and its resident memory in MB (10^6 bytes)."""
    count = [len(list(Path(f"/proc/self/{name}").iterdir())) for name in ("fd", "task")]
    return count[0], count[1], resident_bytes() / 1e6


def one(model: edgelm.Model, expected: dict[int, tuple[int, ...]], chance: random.Random) -> bool:
    """Generate once, and perhaps cancel, abandon or await the generation.

    Args:
        model: the model of all threads.
        expected: token ids by seed.
        chance: decides what happens.

    Returns:
        Whether the token ids are right as far as the generation went.
    """
    seed, way = chance.randrange(SEEDS), chance.choice(["all", "cancel", "leave", "async", "timeout"])
    options: GenerationOptions = {"max_new_tokens": 12, "do_sample": True, "seed": seed}
    if way in ("async", "timeout"):
        try:
            limit = 5.0 if way == "async" else 0.002
            completion = asyncio.run(asyncio.wait_for(model.agenerate(PROMPT, **options), limit))
        except TimeoutError:
            return way == "timeout"
        return completion.choices[0].token_ids == expected[seed]
    cancel, got = threading.Event(), list[int]()
    options["cancel"] = cancel
    for chunk in model.stream(PROMPT, **options):
        got += chunk.token_ids
        if way != "all" and chance.random() < 0.3:
            if way == "leave":
                break
            cancel.set()
    return tuple(got) == expected[seed][: len(got)] and (way != "all" or len(got) == len(expected[seed]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate in eight threads while processes fork and models close.")
    parser.add_argument("bundle", nargs="?", metavar="BUNDLE", help="default: the embedded model")
    parser.add_argument("--generations", type=int, default=200, metavar="N", help="per thread; default %(default)s")
    options = parser.parse_args()
    model = edgelm.load(options.bundle, threads=2)

    def ids(seed: int) -> tuple[int, ...]:
        return model.generate(PROMPT, max_new_tokens=12, do_sample=True, seed=seed).choices[0].token_ids

    expected = {seed: ids(seed) for seed in range(SEEDS)}
    wrong: list[str] = []
    done = [0] * THREADS

    def work(number: int, generations: int) -> None:
        chance = random.Random(number)
        for _ in range(generations):
            if not one(model, expected, chance):
                wrong.append(f"thread {number}")
            done[number] += 1

    def round_of_threads(generations: int) -> None:
        threads = [threading.Thread(target=work, args=(number, generations)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        forks = closes = 0
        while any(thread.is_alive() for thread in threads):
            child = os.fork()
            if child == 0:
                os._exit(0 if ids(1) == expected[1] else 1)
            if os.waitpid(child, 0)[1]:
                wrong.append("fork")
            with edgelm.load(options.bundle, threads=2) as other:
                other.generate(PROMPT, max_new_tokens=2)
            forks, closes = forks + 1, closes + 1
            time.sleep(0.05)
        print(f"{sum(done)} generations, {forks} forks, {closes} loads and closes, {len(wrong)} wrong;", end=" ")
        print("descriptors {}, threads {}, {:.1f} MB".format(*facts()))

    for generations in (options.generations // 10, options.generations, options.generations):
        round_of_threads(generations)
    model.close()
    assert wrong == [], wrong


if __name__ == "__main__":
    main()
