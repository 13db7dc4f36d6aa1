"""The forecast of a model's memory against what it takes: `python benchmarks/memory.py BUNDLE...`."""

import subprocess
import sys

CODE = """
import sys
import edgelm, edgelm.model, onnxruntime, tokenizers
from edgelm.engine.memory import resident_bytes

before = resident_bytes()
model = edgelm.load(sys.argv[1], threads=2)
loaded = resident_bytes() - before
model.generate([5] * (model.session.context_length - 2), max_new_tokens=3)
full = resident_bytes() - before
memory = model.memory
numbers = (memory.weights_bytes, loaded, full, memory.forecast_bytes)
print(*(f"{number / 1e6:14.1f}" for number in numbers))
"""


def main() -> None:
    print(f"{'MB':40}", *(f"{name:>14}" for name in ("weights file", "loaded", "full context", "forecast")))
    for bundle in sys.argv[1:]:
        done = subprocess.run([sys.executable, "-c", CODE, bundle], capture_output=True, text=True, check=True)
        print(f"{bundle[-40:]:40}", done.stdout.rstrip())


if __name__ == "__main__":
    main()
