"""Log-probabilities out of logits: pure functions, natural logarithms (nats), float64 inside.

Shapes: T tokens, V vocabulary.
"""

import numpy as np
import numpy.typing as npt

from edgelm.errors import DeviceError

Logits = npt.NDArray[np.float32]
Logprobs = npt.NDArray[np.float64]
IdLogprob = tuple[int, float]
"""A token id and its log-probability."""


def log_softmax(values: npt.NDArray[np.floating]) -> Logprobs:
    """Normalise the logarithms `values` (V,), so that their exponentials sum to 1.

    Raises:
        DeviceError: a value is NaN, or the largest is infinite.
    """
    highest = float(values.max())
    if not np.isfinite(highest):  # NaN carries through max
        raise DeviceError(
            "the model computed NaN or infinite logits, which have no probabilities: it does not work on this device; "
            "run `edgelm verify`, or use a bundle of another precision"
        )
    shifted = values.astype(np.float64) - highest
    return np.asarray(shifted - np.log(np.exp(shifted).sum()), np.float64)


def logprobs_of(logits: Logits, ids: npt.NDArray[np.int64]) -> Logprobs:
    """The log-probability of each token `ids` (T,) under its row of `logits` (T, V)."""
    # Row by row: a float64 copy of (T, V) would be the largest array of all.
    return np.array([log_softmax(row)[token] for row, token in zip(logits, ids, strict=True)], np.float64)


def with_alternatives(logits: Logits, token: int, count: int) -> tuple[IdLogprob, ...]:
    """`token` first, then the `count` likeliest tokens, likeliest first (of equals the lower id); `logits` is (V,).

    The token is among those again where it is that likely.
    """
    logprobs = log_softmax(logits)
    ids = [token]
    count = min(count, len(logprobs))
    if count:
        threshold = np.partition(logprobs, -count)[-count]
        candidates = np.flatnonzero(logprobs >= threshold)
        ids += candidates[np.argsort(-logprobs[candidates], kind="stable")][:count].tolist()
    return tuple((i, float(logprobs[i])) for i in ids)
