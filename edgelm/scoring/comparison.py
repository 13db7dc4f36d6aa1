"""Comparison of two models' logits on the same tokens."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from edgelm.engine.session import Session
from edgelm.ids import IdArray, Logits

_SLICE_VALUES = 65_536
"""Logits that are copied to float64 at a time: half a megabyte, which stays in a core's own cache."""


@dataclass(frozen=True)
class Comparison:
    """Differences between a source and a bundle, summed over the predicted tokens of one or more texts."""

    tokens: int = 0
    source_nats: float = 0.0
    bundle_nats: float = 0.0
    kl_nats: float = 0.0
    same_top1: int = 0
    max_abs_logit_difference: float = 0.0

    def __add__(self, other: "Comparison") -> "Comparison":
        return Comparison(
            self.tokens + other.tokens,
            self.source_nats + other.source_nats,
            self.bundle_nats + other.bundle_nats,
            self.kl_nats + other.kl_nats,
            self.same_top1 + other.same_top1,
            max(self.max_abs_logit_difference, other.max_abs_logit_difference),
        )


def row_slices(rows: int, vocab_size: int) -> Iterator[slice]:
    """Slices of a few rows each that together are all rows of logits (rows, vocab_size)."""
    size = max(1, _SLICE_VALUES // vocab_size)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def compare_logits(source: Logits, bundle: Logits, targets: IdArray) -> Comparison:
    """Compare two models' logits (T, V), whose row t predicts `targets[t]`, on targets (T,)."""
    total = Comparison()
    for part in row_slices(*source.shape):
        total += _compare_rows(source[part], bundle[part], targets[part])
    return total


def _compare_rows(source: Logits, bundle: Logits, targets: IdArray) -> Comparison:
    rows = np.arange(len(targets))
    source_best, bundle_best = source.argmax(axis=1), bundle.argmax(axis=1)  # of a row with NaN, the first NaN
    difference = np.subtract(source, bundle, dtype=np.float64)  # (T, V)
    largest = float(np.float32(np.abs(difference).max()))  # the difference in the type of the logits
    # Logits relative to the row's largest, whose exponentials cannot overflow.
    source_rest = np.subtract(source, source[rows, source_best, None], dtype=np.float64)
    bundle_rest = np.subtract(bundle, bundle[rows, bundle_best, None], dtype=np.float64)
    source_nats, bundle_nats = -source_rest[rows, targets], -bundle_rest[rows, targets]
    weights = np.exp(source_rest, out=source_rest)
    source_sum = weights.sum(axis=1)
    source_log, bundle_log = np.log(source_sum), np.log(np.exp(bundle_rest, out=bundle_rest).sum(axis=1))
    difference -= (source[rows, source_best].astype(np.float64) - bundle[rows, bundle_best])[:, None]
    kl = np.multiply(weights, difference, out=weights).sum(axis=1) / source_sum - source_log + bundle_log
    return Comparison(
        tokens=len(targets),
        source_nats=float((source_nats + source_log).sum()),
        bundle_nats=float((bundle_nats + bundle_log).sum()),
        kl_nats=float(kl.sum()),
        same_top1=int((source_best == bundle_best).sum()),
        max_abs_logit_difference=largest,
    )


def compare_texts(
    reference: Callable[[IdArray], Logits],
    session: Session,
    texts: Sequence[IdArray],
    progress: Callable[[float], None] = lambda share: None,
) -> Comparison:
    """Compare a reference model with a bundle over whole texts.

    Args:
        reference: computes logits (T, V) from ids (T,).
        session: runs the bundle.
        texts: ids (T,) of each text.
        progress: called after each text with the fraction of texts that are done.
    """
    total = Comparison()
    for done, ids in enumerate(texts):
        session.reset()
        source = reference(ids)  # (T, V)
        start = 0
        for bundle in session.score_pieces(ids):
            targets = ids[start + 1 : start + 1 + len(bundle)]  # one fewer at the end of the text
            end = start + len(targets)
            total += compare_logits(source[start:end], bundle[: len(targets)], targets)
            start = end
        progress((done + 1) / len(texts))
    session.reset()
    return total
