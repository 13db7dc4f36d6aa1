"""Converts a checkpoint to a CTranslate2 model with int8 weights, by CTranslate2's own converter.

    python -m benchmarks.peers.convert_ctranslate2 CHECKPOINT FOLDER

`benchmarks.peers` runs it in the converters' environment.
"""

import argparse
import json
from pathlib import Path


def name_special_tokens(folder: Path) -> None:
    """Name the first word of the vocabulary for every special token that the checkpoint lacks.

    CTranslate2 refuses null there, and the benchmark suppresses the end of text anyway.
    """
    first = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))[0]
    file = folder / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    named = {name: first if name.endswith("_token") and value is None else value for name, value in settings.items()}
    file.write_text(json.dumps(named), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.convert_ctranslate2", description="Convert a checkpoint to CTranslate2."
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    options = parser.parse_args()

    from ctranslate2.converters import TransformersConverter

    TransformersConverter(options.checkpoint).convert(str(options.folder), quantization="int8", force=True)
    name_special_tokens(options.folder)


if __name__ == "__main__":
    main()
