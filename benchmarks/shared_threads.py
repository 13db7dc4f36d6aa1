"""What shared threads cost, in fresh processes: `python benchmarks/shared_threads.py BUNDLE [ROUNDS]`."""

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
    found: dict[str, list[list[float]]] = {"own": [], "shared": []}
    for _ in range(int(sys.argv[2]) if len(sys.argv) > 2 else 7):
        for kind, rounds in found.items():
            done = subprocess.run([sys.executable, "-c", CODE, sys.argv[1], kind], capture_output=True, check=True)
            rounds.append(json.loads(done.stdout))
    for kind, rounds in found.items():
        decode, prefill = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"{kind:6} threads: decode {decode:6.1f} tokens/s, prefill {prefill:6.0f}")


if __name__ == "__main__":
    main()
