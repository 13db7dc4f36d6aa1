"""A checkpoint as a CTranslate2 model with int8 weights, by its own converter. Runs in the converters' environment.

python -m benchmarks.peers.convert_ctranslate2 CHECKPOINT FOLDER
"""

import json
import sys
from pathlib import Path

from ctranslate2.converters import TransformersConverter


def name_special_tokens(folder: Path) -> None:
    """Give every special token that the checkpoint does not have the first word: CTranslate2 takes no null for one.

    The benchmark suppresses the end of text anyway.
    """
    first = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))[0]
    file = folder / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    named = {name: first if name.endswith("_token") and value is None else value for name, value in settings.items()}
    file.write_text(json.dumps(named), encoding="utf-8")


def main() -> None:
    checkpoint, folder = sys.argv[1:]
    TransformersConverter(checkpoint).convert(folder, quantization="int8", force=True)
    name_special_tokens(Path(folder))


if __name__ == "__main__":
    main()
