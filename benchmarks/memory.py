"""The forecast of a model's memory beside the memory that a full context really takes.

    python -m benchmarks.memory BUNDLE [BUNDLE ...]

Each bundle runs in a fresh process. Prints a table in MB (10^6 bytes), without the memory of Python and the libraries.
"""

import argparse
import subprocess
import sys

CODE = """
import sys
import edgelm, edgelm.model, onnxruntime, tokenizers
from edgelm.engine.memory import resident_bytes

imported = resident_bytes()
model = edgelm.load(sys.argv[1], threads=2)
loaded = resident_bytes() - imported
model.generate([5] * (model.session.context_length - 2), max_new_tokens=3)
full = resident_bytes() - imported
memory = model.memory
numbers = (memory.weights_bytes, loaded, full, memory.forecast_bytes)
print(*(f"{number / 1e6:14.1f}" for number in numbers))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description="Compare the forecast of a model's memory with what it takes."
    )
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE")
    options = parser.parse_args()
    print(f"{'MB':40}", *(f"{name:>14}" for name in ("weights file", "loaded", "full context", "forecast")))
    for bundle in options.bundles:
        done = subprocess.run([sys.executable, "-c", CODE, bundle], capture_output=True, text=True, check=True)
        print(f"{bundle[-40:]:40}", done.stdout.rstrip())


if __name__ == "__main__":
    main()
