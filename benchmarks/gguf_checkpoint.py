"""Writes a GGUF file as a checkpoint folder, which the converters of all engines read.

    python -m benchmarks.gguf_checkpoint FILE FOLDER

The weights are float32, as edgelm's exporter reads them.
"""

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a GGUF file as a checkpoint folder.")
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    options = parser.parse_args()

    from edgelm_export.source.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(options.file)
    options.folder.mkdir(parents=True)
    checkpoint.model.save_pretrained(options.folder, max_shard_size="100GB")
    checkpoint.tokenizer.save(options.folder)
    settings = json.dumps(checkpoint.generation_settings, indent=1)
    (options.folder / "generation_config.json").write_text(settings, encoding="utf-8")
    # transformers takes the class from here; the backend in tokenizer.json says the rest.
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (options.folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")


if __name__ == "__main__":
    main()
