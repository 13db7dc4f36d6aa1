"""The held-out loss of a checkpoint.

    python -m benchmarks.held_out_loss CHECKPOINT
    python -m benchmarks.held_out_loss CHECKPOINT data/stories.txt --held-out 206 --windows 256 512

The first documents of the text are packed as `edgelm pretrain` packs them. Prints one line for each window length.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.data import HELD_OUT_STORIES


def report(checkpoint: Path, text: Path, held_out: int | None, windows: Sequence[int]) -> None:
    """Print the loss of `checkpoint` on `text`.

    Args:
        checkpoint: folder in Hugging Face layout, with `config.json` and `tokenizer.json`.
        text: file of documents.
        held_out: number of documents to measure on, from the beginning of the text; None for all.
        windows: lengths of the windows, in tokens.
    """
    from edgelm_train.data.bpe import load_bpe
    from edgelm_train.data.corpus import read_documents
    from edgelm_train.data.packing import pack
    from edgelm_train.models.sizes import load_weights, named_config
    from edgelm_train.run.held_out import loss_in_windows

    tokenizer, end_of_text = load_bpe(checkpoint)
    packed = pack(read_documents(text)[:held_out], tokenizer, tokenizer.token_to_id(end_of_text))
    model = load_weights(checkpoint, named_config(str(checkpoint / "config.json")))
    for window in windows:
        loss = loss_in_windows(model, packed.ids, window)
        print(
            f"windows of {window}: loss {loss.per_token:.4f}, perplexity {math.exp(loss.per_token):.2f} "
            f"({loss.tokens:,} of {len(packed):,} tokens predicted)",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.held_out_loss", description="Measure the held-out loss of a checkpoint."
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder in Hugging Face layout")
    parser.add_argument(
        "text",
        nargs="?",
        type=Path,
        default=HELD_OUT_STORIES,
        metavar="TEXT",
        help="documents with <|endoftext|> between them; default: the held-out stories of benchmarks/texts",
    )
    parser.add_argument("--held-out", type=int, metavar="N", help="measure on the first N documents; default: all")
    parser.add_argument(
        "--windows", nargs="+", type=int, default=[256, 512], metavar="N", help="window lengths; default 256 512"
    )
    options = parser.parse_args()
    report(options.checkpoint, options.text, options.held_out, options.windows)


if __name__ == "__main__":
    main()
