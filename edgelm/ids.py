"""Token ids as the runtime takes them: checked once, and cut into the pieces that one call computes."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edgelm.errors import PromptError, pass_interrupts_on

TokenIds: TypeAlias = Sequence[int] | npt.NDArray[np.integer[Any]]
"""Token ids as a caller may pass them, (T,)."""
IdArray: TypeAlias = npt.NDArray[np.int64]
"""Checked token ids, int64 (T,)."""
Logits: TypeAlias = npt.NDArray[np.float32]
"""(V,) of one position, or (N, V) of N positions."""
Hidden: TypeAlias = npt.NDArray[np.float32]
"""Hidden states (T, E): the output of the final norm."""
Attention: TypeAlias = npt.NDArray[np.float32]
"""Shares of attention (L, A, T, P + T): in each layer and query head, what a new token takes from each token so far."""
KeysValues: TypeAlias = npt.NDArray[Any]
"""Keys and values (2·layers, H, T, D) of the cache's float type: each layer's keys, then its values."""
Indices: TypeAlias = npt.NDArray[np.intp]
"""Places in an array, such as rows of a batch."""
Logprobs: TypeAlias = npt.NDArray[np.float64]
"""Log-probabilities, in nats."""

PREFILL_CHUNK_TOKENS = 256
"""Longer prompts run in pieces of this size, which bounds the memory of activations."""


def as_ids(ids: TokenIds, vocab_size: int) -> IdArray:
    """Check token ids; returns int64 of shape (T,), T >= 1.

    Raises PromptError if they are not a flat list of whole numbers from 0 to `vocab_size` - 1, at least one.
    """
    try:
        array = np.asarray(ids)
    except (ValueError, OverflowError) as error:
        pass_interrupts_on(error)
        raise PromptError("token ids must be a flat list of whole numbers") from None
    if array.size == 0:
        raise PromptError("there are no token ids; give at least one")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise PromptError(f"token ids must be a flat list of whole numbers, got {array.dtype} of shape {array.shape}")
    low, high = array.min(), array.max()
    if low < 0 or high >= vocab_size:
        wrong = int(low if low < 0 else high)
        raise PromptError(f"token id {wrong} is out of range: this model knows 0 to {vocab_size - 1}")
    return array.astype(np.int64, copy=False)


def prompt_chunks(ids: IdArray, chunk_tokens: int | None = None) -> list[IdArray]:
    """Pieces of `chunk_tokens`, or PREFILL_CHUNK_TOKENS, for one call each; a single token left over joins the last.

    GroupQueryAttention has another kernel for one token, which differs in the last bits, and results must not depend on
    where a prompt is cut.
    """
    starts = list(range(0, max(1, len(ids) - 1), chunk_tokens or PREFILL_CHUNK_TOKENS))
    return [ids[start:stop] for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True)]


LEAST_TOKENS = 2
"""Minimum length of a prompt's piece: one token alone has another kernel, which differs in the last bits."""


def common_prefix(first: TokenIds, second: TokenIds) -> int:
    """Length of the longest common beginning of two texts, in tokens."""
    limit = min(len(first), len(second))
    differing = np.flatnonzero(np.asarray(first[:limit]) != np.asarray(second[:limit]))
    return int(differing[0]) if len(differing) else limit


def shared_tokens(held: TokenIds, prompt: TokenIds) -> int:
    """How many tokens of `prompt` need not be computed, because the tokens `held` begin with them.

    The last two tokens are always computed, for their logits. What was computed from one token is never used.
    """
    limit = max(0, min(len(held), len(prompt) - LEAST_TOKENS))
    shared = common_prefix(held[:limit], prompt[:limit])
    return shared if shared >= LEAST_TOKENS else 0
