"""From logits to a token: filters on one row of logits, and draws. Pure functions; tokens ruled out are -inf.

A filter takes logits, float32 of shape (N,), and returns the places it keeps, ascending. A chain of filters works on
ever fewer logits: the whole vocabulary is read, but never sorted. Order and meaning are those of transformers'
logits warpers, so that the same options give the same distribution.
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import numpy.typing as npt

from edgelm.decoding.generation_config import GenerationConfig
from edgelm.decoding.logits_processors import MASKED, Row

Places = npt.NDArray[np.intp]
Filter = Callable[[Row], Places]

_FIRST_TRY = 256
_STRIPES = 16
_SHORT_BLOCK, _BLOCK = 256, 8192
_BINS, _BINS_A_LOGIT = 512, 16
_DRAW, _EXCLUDE, _BEAMS = 0, 1, 2  # what a random number is for


def kth_largest(values: Row, k: int) -> np.float32:
    """The `k`-th largest of `values`, 1 <= k <= N."""
    few = values[_at_least_largest(values, k)]
    return np.float32(np.partition(few, len(few) - k)[len(few) - k])


def largest(values: Row, k: int) -> Places:
    """The places of the `k` largest of `values`, the largest first, equal ones by place."""
    places = _at_least_largest(values, min(k, len(values)))
    return places[np.argsort(-values[places], kind="stable")][:k]


def _at_least_largest(values: Row, k: int) -> Places:
    """The places, ascending, of the `k` largest of `values` and of some others: about k where k is small."""
    columns = len(values) // _STRIPES
    if k > columns // 4:
        if k > len(values) // 4:
            return np.arange(len(values))
        bound = np.partition(values, len(values) - k)[len(values) - k]
    else:
        # The k-th largest of the columns' maxima is a lower bound: k columns have a value at least as large.
        maxima = values[: columns * _STRIPES].reshape(_STRIPES, columns).max(axis=0)
        bound = np.partition(maxima, columns - k)[columns - k]
    return np.flatnonzero(values >= bound)


def top_k_filter(logits: Row, k: int, at_least: int = 1) -> Places:
    """Keep the `k` largest logits, and all that equal the smallest of them (Fan et al., arXiv 1805.04833)."""
    return np.flatnonzero(logits >= kth_largest(logits, min(max(k, at_least), len(logits))))


def top_p_filter(logits: Row, p: float, at_least: int = 1) -> Places:
    """Keep the fewest tokens whose probabilities sum to at least `p` (Holtzman et al., arXiv 1904.09751)."""
    softmax = _Softmax(logits)
    return _fewest(logits, softmax.weights, p * softmax.total, at_least)


def min_p_filter(logits: Row, p: float, at_least: int = 1) -> Places:
    """Keep tokens at least `p` times as likely as the likeliest (Nguyen et al., arXiv 2407.01082)."""
    return _above(logits, logits.max() + np.float32(np.log(p)), at_least)


def typical_filter(logits: Row, p: float, at_least: int = 1) -> Places:
    """Keep the fewest tokens of mass `p` whose surprise is nearest the entropy (Meister et al., arXiv 2202.00666)."""
    softmax = _Softmax(logits)
    mean = softmax.logit_of(float(np.exp(-softmax.entropy(logits))))  # the logit of a token of that surprise
    nearness = logits - mean
    np.negative(np.abs(nearness, out=nearness), out=nearness)
    return _fewest(nearness, softmax.weights, p * softmax.total, at_least)


def epsilon_filter(logits: Row, epsilon: float, at_least: int = 1) -> Places:
    """Keep tokens of probability `epsilon` at least (Hewitt et al., arXiv 2210.15191)."""
    return _above(logits, _Softmax(logits).logit_of(epsilon), at_least)


def eta_filter(logits: Row, epsilon: float, at_least: int = 1) -> Places:
    """The same with min(epsilon, sqrt(epsilon) · exp(-entropy)) (Hewitt et al., arXiv 2210.15191)."""
    softmax = _Softmax(logits)
    eta = min(epsilon, epsilon**0.5 * float(np.exp(-softmax.entropy(logits))))
    return _above(logits, softmax.logit_of(eta), at_least)


def top_n_sigma_filter(logits: Row, n: float, at_least: int = 1) -> Places:
    """Keep logits within `n` standard deviations of the largest (Tang et al., arXiv 2411.07641)."""
    finite = logits if logits.min() > -np.inf else logits[logits > -np.inf]
    return _above(logits, logits.max() - np.float32(n) * finite.std(), at_least)


def exclude_top_choices(logits: Row, threshold: float) -> Row:
    """Rule out all tokens of probability `threshold` at least but the least likely of them (XTC, p-e-w,
    github.com/oobabooga/text-generation-webui/pull/6335); returns new logits."""
    top = np.flatnonzero(logits >= _Softmax(logits).logit_of(threshold))
    if len(top) < 2:
        return logits
    result = logits.copy()
    result[top] = MASKED
    least = top[np.argmin(logits[top])]
    result[least] = logits[least]
    return result


def mirostat_filter(logits: Row, mu: float) -> Places:
    """Keep tokens whose surprise is at most `mu` bits, the likeliest always (Basu et al., arXiv 2007.14966)."""
    return _above(logits, _Softmax(logits).logit_of(2.0**-mu), 1)


def filters_of(config: GenerationConfig, at_least: int = 1) -> tuple[Filter, ...]:
    """The filters a configuration asks for, in transformers' order; each keeps `at_least` tokens."""

    def wanted() -> Iterator[Filter]:
        if config.top_n_sigma is not None:
            yield partial(top_n_sigma_filter, n=config.top_n_sigma, at_least=at_least)
        if config.top_k is not None:
            yield partial(top_k_filter, k=config.top_k, at_least=at_least)
        if config.top_p < 1:
            yield partial(top_p_filter, p=config.top_p, at_least=at_least)
        if config.min_p > 0:
            yield partial(min_p_filter, p=config.min_p, at_least=at_least)
        if config.typical_p < 1:
            yield partial(typical_filter, p=config.typical_p, at_least=at_least)
        if config.epsilon_cutoff > 0:
            yield partial(epsilon_filter, epsilon=config.epsilon_cutoff, at_least=at_least)
        if config.eta_cutoff > 0:
            yield partial(eta_filter, epsilon=config.eta_cutoff, at_least=at_least)

    return tuple(wanted())


def candidates(logits: Row, temperature: float, filters: tuple[Filter, ...]) -> tuple[Places | None, Row]:
    """The tokens (N,) to draw from, ascending, and their logits (N,), after temperature and filters; None for all."""
    if temperature != 1:
        logits = logits / np.float32(temperature)
    tokens: Places | None = None
    for keep in filters:
        tokens, logits = narrowed(tokens, logits, keep(logits))
    return tokens, logits


def narrowed(tokens: Places | None, logits: Row, kept: Places) -> tuple[Places, Row]:
    """Of candidates those at the places `kept`."""
    return kept if tokens is None else tokens[kept], logits[kept]


def draw(logits: Row, uniform: float) -> int:
    """The place at `uniform` in [0, 1) of the cumulative distribution softmax(`logits`); never one of -inf."""
    softmax = _Softmax(logits)
    weights, start = softmax.weights, 0
    target = uniform * softmax.total
    if len(weights) > _BLOCK:  # first the block, then the place in it
        starts = np.arange(0, len(weights), _SHORT_BLOCK)
        blocks = np.add.reduceat(weights, starts, dtype=np.float64)
        ends = np.cumsum(blocks)
        block = min(int(np.searchsorted(ends, target, side="right")), int(np.flatnonzero(blocks)[-1]))
        start = block * _SHORT_BLOCK
        weights, target = weights[start : start + _SHORT_BLOCK], target - float(ends[block] - blocks[block])
    place = int(np.searchsorted(np.cumsum(weights, dtype=np.float64), target, side="right"))
    if place == len(weights):  # rounding of the sums
        place = int(np.flatnonzero(weights)[-1])
    return start + place


def draw_without_replacement(logits: Row, count: int, uniforms: npt.NDArray[np.float64]) -> Places:
    """`count` places drawn one after another from softmax(`logits`), each at most once, in the order drawn.

    The largest of logits + Gumbel noise are such a sample (Kool et al., arXiv 1903.06059); the noise is made of one
    random number in [0, 1) for each place.
    """
    noise = -np.log(-np.log(uniforms + 1e-300))
    return largest((logits - logits.max() + noise).astype(np.float32), count)


def uniform(seed: int, row: int, step: int, purpose: int = _DRAW) -> float:
    """The random number in [0, 1) of a step of a row: a function of its arguments alone, so that a row's draws do
    not depend on its neighbours (Philox 4x64, Salmon et al., SC 2011)."""
    return float(int(_philox(seed, row, step, purpose).random_raw()) >> 11) * 2.0**-53


def xtc_excludes(seed: int, row: int, step: int, probability: float) -> bool:
    """Whether XTC works at a step of a row."""
    return probability > 0 and uniform(seed, row, step, _EXCLUDE) < probability


def beam_uniforms(seed: int, step: int, count: int) -> npt.NDArray[np.float64]:
    """The random numbers in [0, 1) of a step of beam sampling: one for every token after every beam."""
    return np.random.Generator(_philox(seed, 0, step, _BEAMS)).random(count)


def _philox(seed: int, row: int, step: int, purpose: int) -> np.random.Philox:
    key, counter = np.array([seed, row], np.uint64), np.array([step, purpose, 0, 0], np.uint64)
    return np.random.Philox(key=key, counter=counter)


class _Softmax:
    """Softmax of logits (N,) with its factor left out, and what follows from it."""

    def __init__(self, logits: Row) -> None:
        self.largest = logits.max()
        self.weights: Row = logits - self.largest
        np.exp(self.weights, out=self.weights)  # in place: fresh pages cost as much as the work
        self.total = float(self.weights.sum(dtype=np.float64))

    def entropy(self, logits: Row) -> float:
        """In nats."""
        relative = np.maximum(logits - self.largest, np.float32(-1e4))  # a weight of 0 times -inf is none
        relative *= self.weights
        return float(np.log(self.total)) - float(relative.sum(dtype=np.float64)) / self.total

    def logit_of(self, probability: float) -> np.float32:
        """The logit of a token that has this probability."""
        return np.float32(float(self.largest) + np.log(self.total) + np.log(probability))


def _above(logits: Row, threshold: np.float32, at_least: int) -> Places:
    """Where logits are `threshold` or more, and the `at_least` largest in any case."""
    lowest = logits.max() if at_least == 1 else kth_largest(logits, min(at_least, len(logits)))
    return np.flatnonzero(logits >= min(threshold, lowest))


def _fewest(keys: Row, weights: Row, target: float, at_least: int) -> Places:
    """The fewest places, by falling key, that have `target` of the weights, and `at_least` so many; ascending.

    Of places with equal keys the first go first.
    """
    order = largest(keys, _FIRST_TRY)
    mass = np.cumsum(weights[order], dtype=np.float64)
    if mass[-1] >= target or len(order) == len(keys):
        return np.sort(order[: max(int(np.searchsorted(mass, target)) + 1, at_least)])
    # Many are needed: a histogram finds the bin in which the mass is reached, and only that bin is sorted.
    # Block by block: arrays of the vocabulary's length in 8-byte numbers cost more in page faults than in work.
    scaled = np.minimum((keys[order[0]] - keys) * np.float32(_BINS_A_LOGIT), np.float32(_BINS - 1))
    bins = scaled.astype(np.uint16)
    ends = np.cumsum(
        sum(
            np.bincount(bins[at : at + _BLOCK], weights[at : at + _BLOCK], minlength=_BINS)
            for at in range(0, len(bins), _BLOCK)
        )
    )
    reached = min(int(np.searchsorted(ends, target)), _BINS - 1)
    within = np.flatnonzero(bins == reached)
    within = within[np.argsort(-keys[within], kind="stable")]
    before = float(ends[reached - 1]) if reached else 0.0
    kept = bins < reached
    kept[within[: int(np.searchsorted(np.cumsum(weights[within], dtype=np.float64), target - before)) + 1]] = True
    kept[order[:at_least]] = True
    return np.flatnonzero(kept)
