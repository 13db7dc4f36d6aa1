"""Speed with a thread pool per model and with one pool that all models share.

    python -m benchmarks.shared_threads BUNDLE

Every measurement runs in a fresh process, in turns. Prints the medians over the rounds.
"""

import argparse
import json
import statistics
import subprocess
import sys

CODE = """
import json, os, sys
import edgelm

model = edgelm.load(sys.argv[1], threads=2, shared_threads=sys.argv[2] == "shared")
model.warmup()
stats = model.generate([5] * 128, max_new_tokens=96, do_sample=False, eos_token_id=[]).stats
print(json.dumps([stats.tokens_per_second, 128 / stats.prefill_seconds]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.shared_threads", description="Measure what a shared thread pool costs."
    )
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="default %(default)s")
    options = parser.parse_args()
    speeds: dict[str, list[list[float]]] = {"own": [], "shared": []}
    for _ in range(options.rounds):
        for kind, rounds in speeds.items():
            done = subprocess.run([sys.executable, "-c", CODE, options.bundle, kind], capture_output=True, check=True)
            rounds.append(json.loads(done.stdout))
    for kind, rounds in speeds.items():
        decode, prefill = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"{kind:6} threads: decode {decode:6.1f} tokens/s, prefill {prefill:6.0f} tokens/s")


if __name__ == "__main__":
    main()
