"""Makes a checkpoint of GPT-2's shape with random weights, because speed and memory depend on the shape alone.

    python -m benchmarks.make_gpt2 FOLDER

The folder is in Hugging Face layout, with a tokenizer that reads text byte by byte. Nothing is downloaded.
"""

import argparse
from dataclasses import dataclass, fields
from itertools import chain, islice, product
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a GPT-2, and the seed of its weights. The defaults are the 124M model's."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50257
    context: int = 1024
    seed: int = 0


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each field of `Shape`."""
    for field in fields(Shape):
        parser.add_argument(f"--{field.name}", type=int, default=field.default, metavar="N", help="default %(default)s")


def shape_of(options: argparse.Namespace) -> Shape:
    """The `Shape` of parsed options."""
    return Shape(**{field.name: getattr(options, field.name) for field in fields(Shape)})


def make_checkpoint(folder: Path, shape: Shape) -> int:
    """Write a checkpoint into `folder`.

    Returns:
        Number of parameters; the tied head counts once.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=shape.layers,
        n_embd=shape.width,
        n_head=shape.heads,
        vocab_size=shape.vocabulary,
        n_positions=shape.context,
        # No end of text, because every engine must write all requested tokens.
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(shape.seed)
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder)
    save_byte_tokenizer(folder, shape)
    return sum(parameter.numel() for parameter in model.parameters())


def save_byte_tokenizer(folder: Path, shape: Shape) -> None:
    """Write a byte-level tokenizer with the model's vocabulary size, the 256 bytes first.

    It has no merges. It reads text as single bytes, and it can decode every token of the model.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = chain.from_iterable(map("".join, product(alphabet, repeat=length)) for length in (1, 2, 3))
    vocabulary = {word: token_id for token_id, word in enumerate(islice(words, shape.vocabulary))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=shape.context).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a GPT-2 checkpoint with random weights.")
    parser.add_argument("folder", type=Path, help="where to write it")
    add_shape_options(parser)
    options = parser.parse_args()
    parameters = make_checkpoint(options.folder, shape_of(options))
    print(f"{options.folder}: {parameters / 1e6:.1f} million parameters")


if __name__ == "__main__":
    main()
