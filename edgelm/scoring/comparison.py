"""Comparison of two models' logits on the same tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edgelm.decoding.logprobs import log_softmax
from edgelm.engine.session import Session
from edgelm.ids import IdArray, Logits

SLICE_ROWS = 64
"""Rows of logits that become log-probabilities at a time, because float64 copies of (T, V) are large."""


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


def compare_logits(source: Logits, bundle: Logits, targets: IdArray) -> Comparison:
    """Compare two models' logits (T, V), whose row t predicts `targets[t]`, on targets (T,)."""
    source_log, bundle_log = log_softmax(source, nan_ok=True), log_softmax(bundle, nan_ok=True)  # (T, V)
    rows = np.arange(len(targets))
    return Comparison(
        tokens=len(targets),
        source_nats=-float(source_log[rows, targets].sum()),
        bundle_nats=-float(bundle_log[rows, targets].sum()),
        kl_nats=float((np.exp(source_log) * (source_log - bundle_log)).sum()),
        same_top1=int((source.argmax(axis=1) == bundle.argmax(axis=1)).sum()),
        max_abs_logit_difference=float(np.abs(source - bundle).max()),
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
        source, bundle = reference(ids), session.score(ids)  # (T, V)
        for start in range(0, len(ids) - 1, SLICE_ROWS):
            part = slice(start, min(start + SLICE_ROWS, len(ids) - 1))
            total += compare_logits(source[part], bundle[part], ids[part.start + 1 : part.stop + 1])
        progress((done + 1) / len(texts))
    session.reset()
    return total
