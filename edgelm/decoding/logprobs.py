"""Log-probabilities out of logits: pure functions, natural logarithms (nats).

Shapes: T tokens, V vocabulary.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from edgelm.errors import DeviceError
from edgelm.ids import IdArray, Logits, Logprobs

IdLogprob = tuple[int, float]
"""A token id and its log-probability."""

BROKEN_LOGITS = (
    "the model computed NaN or infinite logits, which have no probabilities: it does not work on this device; "
    "run `edgelm verify`, or use a bundle of another precision"
)


def log_softmax(
    logits: npt.NDArray[np.floating], dtype: type[np.floating] = np.float64, *, nan_ok: bool = False
) -> npt.NDArray[Any]:
    """Log-probabilities of logits (..., V), float32 or float64, over the last axis.

    Args:
        logits: (..., V).
        dtype: type of the result and of the exponentials, whose sum is always float64.
        nan_ok: return NaN for a row without probabilities, as `edgelm verify` needs it, instead of raising.

    Raises DeviceError if a logit is NaN, or if the largest logit of a row is infinite.
    """
    largest = logits.max(axis=-1, keepdims=True)
    if not nan_ok and not np.isfinite(largest).all():  # NaN carries through max
        raise DeviceError(BROKEN_LOGITS)
    result: npt.NDArray[np.floating] = np.subtract(logits, largest, dtype=dtype)
    result -= np.log(np.exp(result).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(dtype)
    return result


def logprobs_of(logits: Logits, ids: IdArray) -> Logprobs:
    """The log-probability of each token of `ids` (T,) under its row of `logits` (T, V)."""
    # Row by row, because a float64 copy of (T, V) would be the largest array of all.
    return np.array([log_softmax(row)[token] for row, token in zip(logits, ids, strict=True)], np.float64)


def with_alternatives(logits: Logits, token: int, count: int) -> tuple[IdLogprob, ...]:
    """`token` first, then the `count` likeliest tokens by `logits` (V,), likeliest first.

    Of equally likely tokens the lower id comes first. `token` appears twice where it is one of the likeliest.
    """
    logprobs = log_softmax(logits)
    ids = [token]
    count = min(count, len(logprobs))
    if count:
        threshold = np.partition(logprobs, -count)[-count]
        candidates = np.flatnonzero(logprobs >= threshold)
        ids += candidates[np.argsort(-logprobs[candidates], kind="stable")][:count].tolist()
    return tuple((i, float(logprobs[i])) for i in ids)
