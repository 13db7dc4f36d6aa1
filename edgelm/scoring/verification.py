"""Measures a bundle again on its reference tokens, on this machine and without torch, and judges the difference.

A right bundle on another machine does not give the same bits: rounding of activations amplifies the last bits of a
kernel (docs/quality.md). How far that goes was measured when the bundle was made (`value_noise`, `mean_noise`: the
same tokens through other kernels); the tolerances are multiples of it. Altered weights differ further, or in the mean.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgelm.bundle.certificate import Reference
from edgelm.bundle.reference import LogProbabilities, ReferenceData, rounded, rows_of
from edgelm.engine.session import Session
from edgelm.ids import Logits
from edgelm.scoring.comparison import SLICE_ROWS, log_softmax

NOISE_FACTOR = 1.5
"""Of single values. Their noise is saturated (an amplified last bit), so machines hardly differ in it; numbers that
differ from the first LayerNorm on, and not from the first attention, have 1.2 times as much (docs/decisions.md)."""
MEAN_NOISE_FACTOR = 2.0
"""Of means over all positions: noise averages out, what altered weights do does not."""
FLOOR_NATS = 0.002
"""Added to both: two roundings to 1/1024 nat, and float32 sums in another order."""


@dataclass(frozen=True, slots=True)
class Observed:
    """One model's log-probabilities on reference tokens, in nats."""

    top: LogProbabilities  # (T, K)
    next: LogProbabilities  # (T,), 0 at a row's end
    mean: LogProbabilities  # (V,)
    argmax: npt.NDArray[np.int64]  # (T,)


@dataclass(frozen=True, slots=True)
class Drift:
    """How far two observations of one bundle are apart, root mean squares in nats."""

    values: float
    means: float


@dataclass(frozen=True, slots=True)
class Figures:
    """What a bundle lost on reference tokens."""

    perplexity_ratio: float
    mean_kl_divergence: float
    top1_agreement: float


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison with the certificate."""

    name: str
    measured: float
    stated: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether it is within its tolerance; a NaN never is."""
        return abs(self.measured - self.stated) <= self.tolerance


def observe(
    facts: Reference,
    ids: npt.NDArray[np.int64],
    top_ids: npt.NDArray[np.int64],
    score: Callable[[npt.NDArray[np.int64]], Iterable[Logits]],
    vocab_size: int,
) -> Observed:
    """Run a model over the rows of `ids` (T,).

    Args:
        top_ids: (T, K) the tokens whose log-probabilities are wanted.
        score: logits (t, V) of a row, in pieces.
    """
    tops, nexts, argmaxes = [], [], []
    mean = np.zeros(vocab_size)
    at = 0
    for row in rows_of(facts, ids):
        following = np.append(row[1:], -1)
        done = 0
        for piece in score(row):
            for start in range(0, len(piece), SLICE_ROWS):
                logs = log_softmax(piece[start : start + SLICE_ROWS])  # (t, V)
                count = len(logs)
                tops.append(np.take_along_axis(logs, top_ids[at : at + count], 1))
                wanted = following[done : done + count]
                nexts.append(np.where(wanted < 0, 0.0, logs[np.arange(count), wanted]))
                argmaxes.append(logs.argmax(axis=1))
                mean += logs.sum(axis=0)
                at, done = at + count, done + count
    return Observed(np.concatenate(tops), np.concatenate(nexts), mean / len(ids), np.concatenate(argmaxes))


def observe_session(facts: Reference, data: ReferenceData, session: Session, *, one_by_one: bool = False) -> Observed:
    """Run a bundle over its reference, in chunks or, for its noise, one token at a time."""

    def score(row: npt.NDArray[np.int64]) -> Iterable[Logits]:
        session.reset()
        if one_by_one:
            return (session.step([token])[None] for token in row)
        return session.score_pieces(row)

    observed = observe(facts, data.ids, data.top_ids, score, session.vocab_size)
    session.reset()
    return observed


def drift(data: ReferenceData, observed: Observed) -> Drift:
    """How far a bundle is from what it gave when it was made."""
    values = np.concatenate(
        [(rounded(observed.top) - data.bundle_top).ravel(), rounded(observed.next) - data.bundle_next]
    )
    means = observed.mean - data.bundle_mean
    return Drift(float(np.sqrt(np.square(values).mean())), float(np.sqrt(np.square(means).mean())))


def figures(facts: Reference, data: ReferenceData, observed: Observed) -> Figures:
    """What the observed bundle lost against the source on the reference tokens."""
    predicted = _predicted_tokens(facts)
    nats = (data.source_next.sum() - observed.next.sum()) / predicted
    return Figures(
        perplexity_ratio=math.exp(min(nats, 700.0)),
        mean_kl_divergence=_coarse_kl(data.source_top, observed.top),
        top1_agreement=float((observed.argmax == data.top_ids[:, 0]).mean()),
    )


def source_perplexity(facts: Reference, data: ReferenceData) -> float:
    """The source's, on the reference tokens."""
    return math.exp(-data.source_next.sum() / _predicted_tokens(facts))


def checks(facts: Reference, data: ReferenceData, found: Figures, apart: Drift) -> list[Check]:
    """Every comparison that `edgelm verify` makes, each with its tolerance."""
    # A mean of independent errors of one value's size, four standard deviations; and the drift's own floor.
    spread = FLOOR_NATS + 4 * facts.value_noise / math.sqrt(_predicted_tokens(facts))
    source = source_perplexity(facts, data)
    return [
        # The file against the manifest: the same numbers, so the tolerance is that of arithmetic.
        Check("source's perplexity", source, facts.source_perplexity, 1e-6 * facts.source_perplexity),
        Check("perplexity ratio", found.perplexity_ratio, facts.perplexity_ratio, facts.perplexity_ratio * spread),
        Check("log-probabilities differ by, nats", apart.values, 0.0, NOISE_FACTOR * facts.value_noise + FLOOR_NATS),
        Check("their means differ by, nats", apart.means, 0.0, MEAN_NOISE_FACTOR * facts.mean_noise + FLOOR_NATS / 4),
    ]


def _predicted_tokens(facts: Reference) -> int:
    rows = -(-facts.tokens // facts.row_tokens)
    return facts.tokens - rows


def _coarse_kl(source: LogProbabilities, bundle: LogProbabilities) -> float:
    """Mean KL(source || bundle) over the K listed tokens (T, K) and all others as one, in nats."""
    p, q = np.exp(source), np.exp(bundle)  # (T, K)
    listed = (p * (source - bundle)).sum(axis=1)  # (T,)
    rest_p, rest_q = np.maximum(1 - p.sum(axis=1), 1e-9), np.maximum(1 - q.sum(axis=1), 1e-9)
    return float((listed + rest_p * np.log(rest_p / rest_q)).mean())
