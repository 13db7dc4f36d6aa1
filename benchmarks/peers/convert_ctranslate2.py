"""A checkpoint as a CTranslate2 model with int8 weights, by its own converter. Runs in the converters' environment.

python -m benchmarks.peers.convert_ctranslate2 CHECKPOINT FOLDER
"""

import sys

from ctranslate2.converters import TransformersConverter


def main() -> None:
    checkpoint, folder = sys.argv[1:]
    TransformersConverter(checkpoint).convert(folder, quantization="int8", force=True)


if __name__ == "__main__":
    main()
