"""The held-out loss of a checkpoint: ``python -m benchmarks.held_out_loss CHECKPOINT TEXT HELD_OUT WINDOW...``.

The first HELD_OUT documents of TEXT, packed as `edgelm pretrain` packs them, in windows of so many tokens.
"""

import sys
from pathlib import Path

from edgelm_train.data.bpe import load_bpe
from edgelm_train.data.corpus import read_corpus
from edgelm_train.data.packing import pack
from edgelm_train.models.sizes import load_weights, named_config
from edgelm_train.run.held_out import loss_in_windows


def main(checkpoint: Path, text: Path, held_out: int, windows: list[int]) -> None:
    """Print one line for each window."""
    corpus = read_corpus([text], held_out=held_out)
    packed = pack(corpus.held_out, load_bpe(checkpoint))
    model = load_weights(checkpoint, named_config(str(checkpoint / "config.json")))
    for window in windows:
        loss = loss_in_windows(model, packed.ids, window)
        print(
            f"windows of {window}: loss {loss.per_token:.4f}, perplexity {loss.perplexity:.2f} "
            f"({loss.tokens:,} of {len(packed):,} tokens predicted)",
            flush=True,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), [int(window) for window in sys.argv[4:]])
