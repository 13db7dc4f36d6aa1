"""Converts a checkpoint to an OpenVINO model with compressed weights, by optimum-intel.

    python -m benchmarks.peers.convert_openvino CHECKPOINT FOLDER int8|int4

`benchmarks.peers` runs it in the converters' environment.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

GROUP_SIZES = (128, 64, 32)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.convert_openvino", description="Convert a checkpoint to OpenVINO."
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("weight_format", choices=("int8", "int4"))
    options = parser.parse_args()
    checkpoint, weight_format = options.checkpoint, options.weight_format
    command = [
        str(Path(sys.executable).parent / "optimum-cli"),
        *("export", "openvino", "--model", str(checkpoint), "--task", "text-generation-with-past"),
        *("--weight-format", weight_format),
    ]
    if weight_format == "int4":
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        width = config["n_embd"] if config["model_type"] == "gpt2" else config["hidden_size"]
        group = next(size for size in GROUP_SIZES if width % size == 0)
        # All products have 4 bits. The tied table keeps 8, as that of edgelm and of llama.cpp does.
        command += ["--group-size", str(group), "--ratio", "1.0", "--sym"]
    raise SystemExit(subprocess.run([*command, str(options.folder)]).returncode)


if __name__ == "__main__":
    main()
