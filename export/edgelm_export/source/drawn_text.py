"""Text drawn from the source model itself: every language and domain has such text for measuring and calibrating."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from edgelm.errors import ExportError
from edgelm.ids import IdArray, Logits
from edgelm_export.model.families import describe
from edgelm_export.source.checkpoint import quiet_torch

MAX_ROW_TOKENS = 256
"""Many short rows are faster than few long rows, because a step reads all weights once for all rows."""
_BATCH_ROWS = 64
_BLOCK_TOKENS = 256
"""Tokens whose weights are summed before a token is chosen; only the chosen block is summed token by token."""


def draw_texts(model: transformers.PreTrainedModel, tokens: int, seed: int) -> list[IdArray]:
    """Sample rows of token ids, (T,) each, at temperature 1.

    Every row starts with the model's BOS token, or with a random token where the model has none. It runs to the end of
    the context or to 256 tokens, even through ends of text.

    Args:
        tokens: minimum number of ids that all rows together predict. The first id of a row is not predicted.

    Raises:
        ExportError: the model computes NaN or infinity.
    """
    length = min(describe(model).context_length, MAX_ROW_TOKENS)
    rows = -(-tokens // (length - 1))
    generator = torch.Generator().manual_seed(seed)
    texts: list[IdArray] = []
    with quiet_torch(), torch.inference_mode():
        for start in range(0, rows, _BATCH_ROWS):
            texts += _draw_batch(model, min(_BATCH_ROWS, rows - start), length, generator)
    return texts


def _draw_batch(
    model: transformers.PreTrainedModel, rows: int, length: int, generator: torch.Generator
) -> list[IdArray]:
    vocab, bos = model.config.vocab_size, model.config.bos_token_id
    drawn = np.empty((rows, length), np.int64)  # (B, T)
    has_bos = bos is not None and 0 <= bos < vocab
    drawn[:, 0] = bos if has_bos else torch.randint(vocab, (rows,), generator=generator).numpy()
    uniform = torch.rand((length, rows), generator=generator, dtype=torch.float64).numpy()  # (T, B)
    weights = np.zeros((rows, -(-vocab // _BLOCK_TOKENS), _BLOCK_TOKENS), np.float32)  # the last block is padded with 0
    past = Cache(layers=[_FixedRoom(length) for _ in range(describe(model).num_layers)])
    for at in range(1, length):
        ids = torch.from_numpy(drawn[:, at - 1 : at])  # (B, 1)
        logits = model(input_ids=ids, past_key_values=past, use_cache=True).logits[:, -1].numpy()  # (B, V)
        drawn[:, at] = _choose(logits, uniform[at], weights)
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


class _FixedRoom(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """A layer's keys and values in memory that is taken once: DynamicLayer copies all of them at every token."""

    def __init__(self, length: int) -> None:
        """Make an empty layer with room for `length` tokens."""
        super().__init__()
        self._length = length

    def lazy_initialization(self, key_states: Tensor) -> None:
        """Take the memory, in the shape (B, H, length, D) of the first keys."""
        super().lazy_initialization(key_states)
        batch, heads, _, head_dim = key_states.shape
        self._room = key_states.new_empty(2, batch, heads, self._length, head_dim)
        self.keys, self.values = self._room[:, :, :, :0]

    def update(
        self, key_states: Tensor, value_states: Tensor, cache_kwargs: dict[str, Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, H, T, D); returns all of them, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states)
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        self._room[0, :, :, start:end] = key_states
        self._room[1, :, :, start:end] = value_states
        self.keys, self.values = self._room[:, :, :, :end]
        return self.keys, self.values
