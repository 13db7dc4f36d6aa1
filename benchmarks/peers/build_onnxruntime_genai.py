"""Makes a model of onnxruntime-genai by its own model builder.

    python -m benchmarks.peers.build_onnxruntime_genai CHECKPOINT FOLDER 8|4

`benchmarks.peers` runs it in an environment of its own, for all models but GPT-2, which the builder does not know.
"""

import argparse
import subprocess
import sys


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.build_onnxruntime_genai", description="Build for onnxruntime-genai."
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("bits", choices=("8", "4"))
    options = parser.parse_args()
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    command += ["-i", options.checkpoint, "-o", options.folder, "-p", f"int{options.bits}", "-e", "cpu"]
    # Level 4 multiplies in integers, as edgelm's bundles and llama.cpp do; without it the products are float32.
    raise SystemExit(subprocess.run([*command, "--extra_options", "accuracy_level=4"]).returncode)


if __name__ == "__main__":
    main()
