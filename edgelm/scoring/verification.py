"""Measure a bundle again on its reference tokens, on this machine and without torch, and judge the differences.

An intact bundle gives slightly different results on another machine, because the rounding of activations amplifies
differences in a kernel's last bits (docs/quality.md). The export measured how large such differences get (`value_noise`
and `mean_noise`) by running the same tokens through other kernels. The tolerances are multiples of these figures.
Altered weights cause larger differences, or differences in the mean.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from edgelm.bundle.certificate import Reference
from edgelm.bundle.reference import ReferenceData, rounded, rows_of
from edgelm.decoding.logprobs import log_softmax
from edgelm.engine.session import Session
from edgelm.ids import IdArray, Logits, Logprobs
from edgelm.scoring.comparison import row_slices

NOISE_FACTOR = 1.5
"""Tolerance of single log-probabilities, in multiples of their noise. The noise is saturated (it is an amplified last
bit), so it hardly differs between machines. Results that differ from the first LayerNorm on, instead of the first
attention, have 1.2 times as much noise (docs/decisions.md)."""
MEAN_NOISE_FACTOR = 2.0
"""Tolerance of means over all positions, in multiples of their noise. Noise averages out; the effect of altered weights
does not."""
FLOOR_NATS = 0.002
"""Added to both tolerances, for two roundings to 1/1024 nat and for float32 sums in another order."""


@dataclass(frozen=True, slots=True)
class Observed:
    """A model's log-probabilities on T reference tokens, in nats."""

    top: Logprobs
    """(T, K): of the K listed tokens at each position."""
    next: Logprobs
    """(T,): of the token that follows in the row; 0 at a row's end."""
    mean: Logprobs
    """(V,): of every token, averaged over the positions."""
    argmax: IdArray
    """(T,): ids of the likeliest tokens."""


@dataclass(frozen=True, slots=True)
class Drift:
    """Root mean square differences between two observations of one bundle, in nats."""

    values: float
    """Of single log-probabilities."""
    means: float
    """Of the mean log-probabilities."""


@dataclass(frozen=True, slots=True)
class Figures:
    """How far a bundle is from its source on the reference tokens."""

    perplexity_ratio: float
    mean_kl_divergence: float
    top1_agreement: float


@dataclass(frozen=True, slots=True)
class Check:
    """Comparison of one measured figure with the certificate."""

    name: str
    measured: float
    stated: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the measured figure is within the tolerance; NaN never is."""
        return abs(self.measured - self.stated) <= self.tolerance


def observe(
    facts: Reference,
    ids: IdArray,
    top_ids: IdArray,
    score: Callable[[IdArray], Iterable[Logits]],
    vocab_size: int,
    progress: Callable[[float], None] = lambda share: None,
) -> Observed:
    """Run a model over the reference tokens `ids` (T,), row by row.

    Args:
        facts: the length of a row.
        ids: (T,).
        top_ids: (T, K), the tokens whose log-probabilities are kept at each position.
        score: computes the logits of a row of ids, in pieces (t, V).
        vocab_size: V.
        progress: called with the share of the tokens that is done.
    """
    tops, nexts, argmaxes = [], [], []
    mean = np.zeros(vocab_size)
    at = 0
    for row in rows_of(facts, ids):
        following = np.append(row[1:], -1)
        done = 0
        for piece in score(row):
            for part in row_slices(*piece.shape):
                logs = log_softmax(piece[part], nan_ok=True)  # (t, V)
                count = len(logs)
                tops.append(np.take_along_axis(logs, top_ids[at : at + count], 1))
                targets = following[done : done + count]
                nexts.append(np.where(targets < 0, 0.0, logs[np.arange(count), targets]))
                argmaxes.append(logs.argmax(axis=1))
                for row_logs in logs:
                    mean += row_logs
                at, done = at + count, done + count
            progress(at / len(ids))
    return Observed(np.concatenate(tops), np.concatenate(nexts), mean / len(ids), np.concatenate(argmaxes))


def observe_session(
    facts: Reference,
    data: ReferenceData,
    session: Session,
    *,
    one_by_one: bool = False,
    progress: Callable[[float], None] = lambda share: None,
) -> Observed:
    """Run a bundle over its reference tokens, in chunks or `one_by_one`, whose difference is the bundle's noise.

    `progress` is called with the share of the tokens that is done.
    """

    def score(row: IdArray) -> Iterable[Logits]:
        session.reset()
        if one_by_one:
            return (session.step([token])[None] for token in row)
        return session.score_pieces(row)

    observed = observe(facts, data.ids, data.top_ids, score, session.vocab_size, progress)
    session.reset()
    return observed


def drift(data: ReferenceData, observed: Observed) -> Drift:
    """The differences between `observed` and the bundle's results at its export."""
    values = np.concatenate(
        [(rounded(observed.top) - data.bundle_top).ravel(), rounded(observed.next) - data.bundle_next]
    )
    means = observed.mean - data.bundle_mean
    return Drift(float(np.sqrt(np.square(values).mean())), float(np.sqrt(np.square(means).mean())))


def figures(facts: Reference, data: ReferenceData, observed: Observed) -> Figures:
    """How far the observed bundle is from its source on the reference tokens."""
    predicted = _predicted_tokens(facts)
    nats = (data.source_next.sum() - observed.next.sum()) / predicted
    return Figures(
        perplexity_ratio=math.exp(min(nats, 700.0)),
        mean_kl_divergence=_coarse_kl(data.source_top, observed.top),
        top1_agreement=float((observed.argmax == data.top_ids[:, 0]).mean()),
    )


def source_perplexity(facts: Reference, data: ReferenceData) -> float:
    """The source's perplexity on the reference tokens."""
    return math.exp(-data.source_next.sum() / _predicted_tokens(facts))


def checks(facts: Reference, data: ReferenceData, measured: Figures, drifted: Drift) -> list[Check]:
    """Every comparison that `edgelm verify` makes, with its tolerance."""
    # Four standard deviations of a mean of independent errors as large as a single value's, and the drift's own floor.
    spread = FLOOR_NATS + 4 * facts.value_noise / math.sqrt(_predicted_tokens(facts))
    source = source_perplexity(facts, data)
    return [
        # The reference file and the manifest state the same figure, so only rounding may differ.
        Check("source's perplexity", source, facts.source_perplexity, 1e-6 * facts.source_perplexity),
        Check("perplexity ratio", measured.perplexity_ratio, facts.perplexity_ratio, facts.perplexity_ratio * spread),
        Check("log-probabilities differ by, nats", drifted.values, 0.0, NOISE_FACTOR * facts.value_noise + FLOOR_NATS),
        Check("their means differ by, nats", drifted.means, 0.0, MEAN_NOISE_FACTOR * facts.mean_noise + FLOOR_NATS / 4),
    ]


def _predicted_tokens(facts: Reference) -> int:
    return facts.tokens - -(-facts.tokens // facts.row_tokens)  # the first token of a row is not predicted


def _coarse_kl(source: Logprobs, bundle: Logprobs) -> float:
    """Mean KL(source || bundle) in nats; the tokens outside the K listed ones (T, K) count as one."""
    p, q = np.exp(source), np.exp(bundle)  # (T, K)
    listed = (p * (source - bundle)).sum(axis=1)  # (T,)
    rest_p, rest_q = np.maximum(1 - p.sum(axis=1), 1e-9), np.maximum(1 - q.sum(axis=1), 1e-9)
    return float((listed + rest_p * np.log(rest_p / rest_q)).mean())
