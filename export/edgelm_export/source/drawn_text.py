"""Text drawn from the source model itself: every language and domain has such text for measuring and calibrating."""

from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import transformers

from edgelm.engine.graph import Graph
from edgelm.errors import ExportError
from edgelm.ids import IdArray, Logits
from edgelm_export.graph.bare_bundle import write_bare_bundle
from edgelm_export.model.families import collect_weights
from edgelm_export.quantize.calibrate import store
from edgelm_export.quantize.recipe import fixed_recipe

MAX_ROW_TOKENS = 256
"""Many short rows are faster than few long rows, because a step reads all weights once for all rows."""
_BATCH_ROWS = 64
_BLOCK_TOKENS = 256
"""Tokens whose weights are summed before a token is chosen; only the chosen block is summed token by token."""


class TextDrawer:
    """Samples texts of a model at temperature 1.

    The runtime computes the model's own graph in float32, because it takes less than half of torch's time: it joins
    what torch computes operation by operation. A fault of that graph would give odd text, and hide nothing, because
    optimum's graph judges the bundle on it.
    """

    def __init__(self, model: transformers.PreTrainedModel, folder: Path) -> None:
        """Write the graph of `model` into `folder`, a new one, which must stay as long as text is drawn."""
        folder.mkdir()
        weights = collect_weights(model)
        self._bundle = write_bare_bundle(store(weights, fixed_recipe("fp32", weights), None), folder)
        self._bos_token_id: int | None = model.config.bos_token_id

    def draw(self, tokens: int, seed: int) -> list[IdArray]:
        """Sample rows of token ids, (T,) each.

        Every row starts with the model's BOS token, or with a random token where the model has none. It runs to the end
        of the context or to 256 tokens, even through ends of text.

        Args:
            tokens: minimum number of ids that all rows together predict. The first id of a row is not predicted.

        Raises:
            ExportError: the model computes NaN or infinity.
        """
        length = min(self._bundle.manifest.architecture.context_length, MAX_ROW_TOKENS)
        rows = -(-tokens // (length - 1))
        generator = torch.Generator().manual_seed(seed)
        texts: list[IdArray] = []
        with closing(Graph.open(self._bundle, device="cpu")) as graph:
            for start in range(0, rows, _BATCH_ROWS):
                texts += self._draw_batch(graph, min(_BATCH_ROWS, rows - start), length, generator)
        return texts

    def _draw_batch(self, graph: Graph, rows: int, length: int, generator: torch.Generator) -> list[IdArray]:
        vocab, bos = self._bundle.manifest.architecture.vocab_size, self._bos_token_id
        drawn = np.empty((rows, length), np.int64)  # (B, T)
        if bos is not None and 0 <= bos < vocab:
            drawn[:, 0] = bos
        else:
            drawn[:, 0] = torch.randint(vocab, (rows,), generator=generator).numpy()
        uniform = torch.rand((length, rows), generator=generator, dtype=torch.float64).numpy()  # (T, B)
        weights = np.zeros((rows, -(-vocab // _BLOCK_TOKENS), _BLOCK_TOKENS), np.float32)  # the last block has padding
        batch = graph.session().batch(rows, length)
        for at in range(1, length):
            drawn[:, at] = _choose(batch.step(drawn[:, at - 1]), uniform[at], weights)
        return list(drawn)


def _choose(logits: Logits, uniform: npt.NDArray[np.float64], weights: npt.NDArray[np.float32]) -> IdArray:
    """Draw a token for each row of `logits` by inverting the cumulative distribution of its softmax.

    A row costs one random number and about one read of the row. torch.multinomial costs a random number for each token
    of the vocabulary, which took more time than a small model itself.

    Args:
        logits: (B, V).
        uniform: random numbers in [0, 1), (B,).
        weights: memory for the unnormalized probabilities, (B, blocks, tokens in a block); zero behind the vocabulary.

    Raises:
        ExportError: the logits contain NaN or infinity.
    """
    rows, vocab = logits.shape
    flat = weights.reshape(rows, -1)[:, :vocab]  # a view
    with np.errstate(invalid="ignore"):  # infinity minus infinity; refused below
        np.subtract(logits, logits.max(axis=1, keepdims=True), out=flat)
    np.exp(flat, out=flat)
    blocks = weights.sum(axis=2, dtype=np.float64).cumsum(axis=1)  # (B, blocks)
    if not np.isfinite(blocks).all():
        raise ExportError("the model computes NaN or infinite logits: its weights are damaged or were never trained")
    # Below the total even where the product rounds up, so that the chosen token has a positive weight.
    target = np.minimum(uniform * blocks[:, -1], np.nextafter(blocks[:, -1], 0))[:, None]  # (B, 1)
    every = np.arange(rows)
    block = (blocks <= target).sum(axis=1)  # (B,)
    within = weights[every, block].cumsum(axis=1, dtype=np.float64)  # (B, tokens in a block)
    before = np.where(block > 0, blocks[every, block - 1], 0.0)[:, None]
    rest = np.minimum(target - before, np.nextafter(within[:, -1:], 0))
    chosen: IdArray = block * _BLOCK_TOKENS + (within <= rest).sum(axis=1)
    return chosen
