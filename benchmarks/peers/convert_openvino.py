"""A checkpoint as an OpenVINO model with compressed weights, by optimum-intel. Runs in the converters' environment.

python -m benchmarks.peers.convert_openvino CHECKPOINT FOLDER int8|int4
"""

import json
import subprocess
import sys
from pathlib import Path

GROUP_SIZES = (128, 64, 32)


def main() -> None:
    checkpoint, folder, weight_format = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    command = [
        str(Path(sys.executable).parent / "optimum-cli"),
        *("export", "openvino", "--model", str(checkpoint), "--task", "text-generation-with-past"),
        *("--weight-format", weight_format),
    ]
    if weight_format == "int4":
        width = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["n_embd"]
        group = next(size for size in GROUP_SIZES if width % size == 0)
        # Every matrix of the body at 4 bits; the tied table stays at 8, as edgelm's and llama.cpp's.
        command += ["--group-size", str(group), "--ratio", "1.0", "--sym"]
    raise SystemExit(subprocess.run([*command, str(folder)]).returncode)


if __name__ == "__main__":
    main()
