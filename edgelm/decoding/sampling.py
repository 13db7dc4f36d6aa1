"""From logits to a token: filters on one row of logits, draws, and the choice that joins them.

A filter takes logits, float32 of shape (N,), and returns the indices it keeps, ascending. Each filter of a chain works
on the logits that the previous filter kept, so the whole vocabulary is read but never sorted. Order and meaning are
those of transformers' logits warpers, so the same options give the same distribution. Excluded tokens are -inf.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt

from edgelm.decoding.generation_config import GenerationConfig
from edgelm.decoding.logits_processors import MASKED
from edgelm.ids import Indices, Logits

Filter = Callable[[Logits], Indices]

_FIRST_TRY = 256
_STRIPES = 16
_SHORT_BLOCK, _BLOCK = 256, 8192
_BINS, _BINS_A_LOGIT = 512, 16
_DRAW, _EXCLUDE, _BEAMS = 0, 1, 2  # purposes of a random number


def kth_largest(values: Logits, k: int) -> np.float32:
    """The `k`-th largest of `values`, 1 <= k <= N."""
    largest_values = values[_at_least_largest(values, k)]
    rank = len(largest_values) - k
    return np.float32(np.partition(largest_values, rank)[rank])


def largest(values: Logits, k: int) -> Indices:
    """The indices of the `k` largest of `values`, the largest first; of equal values the lower index comes first."""
    indices = _at_least_largest(values, min(k, len(values)))
    return indices[np.argsort(-values[indices], kind="stable")][:k]


def _at_least_largest(values: Logits, k: int) -> Indices:
    """The indices, ascending, of the `k` largest of `values` and of some smaller ones: about k in all for a small k."""
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


def top_k_filter(logits: Logits, k: int, at_least: int = 1) -> Indices:
    """Keep the `k` largest logits, and every logit equal to the smallest of these (Fan et al., arXiv 1805.04833)."""
    return np.flatnonzero(logits >= kth_largest(logits, min(max(k, at_least), len(logits))))


def top_p_filter(logits: Logits, p: float, at_least: int = 1) -> Indices:
    """Keep the fewest tokens whose probabilities sum to at least `p` (Holtzman et al., arXiv 1904.09751)."""
    softmax = _Softmax(logits)
    return _fewest(logits, softmax.weights, p * softmax.total, at_least)


def min_p_filter(logits: Logits, p: float, at_least: int = 1) -> Indices:
    """Keep tokens at least `p` times as likely as the likeliest (Nguyen et al., arXiv 2407.01082)."""
    return _above(logits, logits.max() + np.float32(np.log(p)), at_least)


def typical_filter(logits: Logits, p: float, at_least: int = 1) -> Indices:
    """Keep the tokens whose surprise is nearest the entropy, as few as have probabilities that sum to `p`.

    Source: Meister et al., arXiv 2202.00666.
    """
    softmax = _Softmax(logits)
    mean = softmax.logit_of(float(np.exp(-softmax.entropy(logits))))  # the logit of a token of that surprise
    nearness = logits - mean
    np.negative(np.abs(nearness, out=nearness), out=nearness)
    return _fewest(nearness, softmax.weights, p * softmax.total, at_least)


def epsilon_filter(logits: Logits, epsilon: float, at_least: int = 1) -> Indices:
    """Keep tokens with a probability of at least `epsilon` (Hewitt et al., arXiv 2210.15191)."""
    return _above(logits, _Softmax(logits).logit_of(epsilon), at_least)


def eta_filter(logits: Logits, epsilon: float, at_least: int = 1) -> Indices:
    """Keep tokens with a probability of at least min(epsilon, sqrt(epsilon) · exp(-entropy)).

    Source: Hewitt et al., arXiv 2210.15191.
    """
    softmax = _Softmax(logits)
    eta = min(epsilon, epsilon**0.5 * float(np.exp(-softmax.entropy(logits))))
    return _above(logits, softmax.logit_of(eta), at_least)


def top_n_sigma_filter(logits: Logits, n: float, at_least: int = 1) -> Indices:
    """Keep logits within `n` standard deviations of the largest (Tang et al., arXiv 2411.07641)."""
    finite = logits if logits.min() > -np.inf else logits[logits > -np.inf]
    return _above(logits, logits.max() - np.float32(n) * finite.std(), at_least)


def exclude_top_choices(logits: Logits, threshold: float) -> Logits:
    """Rule out every token with a probability of at least `threshold`, except the least likely of these tokens.

    Source: XTC by p-e-w, github.com/oobabooga/text-generation-webui/pull/6335.
    """
    top = np.flatnonzero(logits >= _Softmax(logits).logit_of(threshold))
    if len(top) < 2:
        return logits
    result = logits.copy()
    result[top] = MASKED
    least = top[np.argmin(logits[top])]
    result[least] = logits[least]
    return result


def mirostat_filter(logits: Logits, mu: float) -> Indices:
    """Keep tokens with a surprise of at most `mu` bits, and always the likeliest (Basu et al., arXiv 2007.14966)."""
    return _above(logits, _Softmax(logits).logit_of(2.0**-mu), 1)


def filters_of(config: GenerationConfig, at_least: int = 1) -> tuple[Filter, ...]:
    """The filters that a configuration uses, in transformers' order; each keeps at least `at_least` tokens."""
    filters: list[Filter | None] = [
        None if config.top_n_sigma is None else partial(top_n_sigma_filter, n=config.top_n_sigma, at_least=at_least),
        None if config.top_k is None else partial(top_k_filter, k=config.top_k, at_least=at_least),
        partial(top_p_filter, p=config.top_p, at_least=at_least) if config.top_p < 1 else None,
        partial(min_p_filter, p=config.min_p, at_least=at_least) if config.min_p else None,
        partial(typical_filter, p=config.typical_p, at_least=at_least) if config.typical_p < 1 else None,
        partial(epsilon_filter, epsilon=config.epsilon_cutoff, at_least=at_least) if config.epsilon_cutoff else None,
        partial(eta_filter, epsilon=config.eta_cutoff, at_least=at_least) if config.eta_cutoff else None,
    ]
    return tuple(keep for keep in filters if keep is not None)


def candidates(logits: Logits, temperature: float, filters: tuple[Filter, ...]) -> tuple[Indices | None, Logits]:
    """The tokens (N,) to draw from, ascending, and their logits (N,), after temperature and filters.

    The tokens are None where all of the vocabulary is left.
    """
    if temperature != 1:
        logits = logits / np.float32(temperature)
    tokens: Indices | None = None
    for keep in filters:
        kept = keep(logits)
        tokens, logits = kept if tokens is None else tokens[kept], logits[kept]
    return tokens, logits


class TokenChoice:
    """Chooses the tokens of one row, with the random numbers of `seed` and `row`; its only state is mirostat's.

    A shallow copy chooses the same, and leaves that state alone.
    """

    def __init__(self, config: GenerationConfig, seed: int, row: int) -> None:
        self._config, self._seed, self._row = config, seed, row
        self._filters = filters_of(config)
        self._mu = 2 * (config.mirostat_tau or 0.0)  # mirostat 2: the surprise allowed, in bits

    def __call__(self, logits: Logits, step: int) -> int:
        """The next token, given processed logits (V,)."""
        config = self._config
        if not config.do_sample:
            return int(np.argmax(logits))
        tokens, logits = candidates(logits, config.temperature, self._filters)
        excludes = config.xtc_probability > 0
        if excludes and uniform(self._seed, self._row, step, _EXCLUDE) < config.xtc_probability:
            logits = exclude_top_choices(logits, config.xtc_threshold)
        if config.mirostat_tau is not None:
            kept = mirostat_filter(logits, self._mu)
            tokens, logits = kept if tokens is None else tokens[kept], logits[kept]
        index = draw(logits, uniform(self._seed, self._row, step))
        if config.mirostat_tau is not None:
            weights = np.exp(logits - logits.max(), dtype=np.float64)
            surprise = -float(np.log2(weights[index] / weights.sum()))
            self._mu -= config.mirostat_eta * (surprise - config.mirostat_tau)
        return index if tokens is None else int(tokens[index])


def draw(logits: Logits, uniform: float) -> int:
    """The index at `uniform` in [0, 1) of the cumulative distribution softmax(`logits`); never that of a -inf."""
    softmax = _Softmax(logits)
    weights, start = softmax.weights, 0
    target = uniform * softmax.total
    if len(weights) > _BLOCK:  # first the block, then the index in it
        starts = np.arange(0, len(weights), _SHORT_BLOCK)
        blocks = np.add.reduceat(weights, starts, dtype=np.float64)
        ends = np.cumsum(blocks)
        block = min(int(np.searchsorted(ends, target, side="right")), int(np.flatnonzero(blocks)[-1]))
        start = block * _SHORT_BLOCK
        weights, target = weights[start : start + _SHORT_BLOCK], target - float(ends[block] - blocks[block])
    index = int(np.searchsorted(np.cumsum(weights, dtype=np.float64), target, side="right"))
    if index == len(weights):  # because the sums are rounded
        index = int(np.flatnonzero(weights)[-1])
    return start + index


def draw_without_replacement(logits: Logits, count: int, uniforms: npt.NDArray[np.float64]) -> Indices:
    """`count` indices drawn one after another from softmax(`logits`), each at most once, in the order drawn.

    The largest of logits + Gumbel noise are such a sample (Kool et al., arXiv 1903.06059). The noise is made from
    `uniforms`, random numbers in [0, 1), (N,).
    """
    noise = -np.log(-np.log(uniforms + 1e-300))
    return largest((logits - logits.max() + noise).astype(np.float32), count)


def uniform(seed: int, row: int, step: int, purpose: int = _DRAW) -> float:
    """The random number in [0, 1) of a step of a row (Philox 4x64, Salmon et al., SC 2011).

    It is a function of its arguments alone, so a row's draws do not depend on its neighbours.
    """
    return float(int(_philox(seed, row, step, purpose).random_raw()) >> 11) * 2.0**-53


def beam_uniforms(seed: int, step: int, count: int) -> npt.NDArray[np.float64]:
    """`count` random numbers in [0, 1) for a step of beam sampling, one for every token after every beam."""
    return np.random.Generator(_philox(seed, 0, step, _BEAMS)).random(count)


def _philox(seed: int, row: int, step: int, purpose: int) -> np.random.Philox:
    key, counter = np.array([seed, row], np.uint64), np.array([step, purpose, 0, 0], np.uint64)
    return np.random.Philox(key=key, counter=counter)


class _Softmax:
    """Softmax of logits (N,) before the division by `total`."""

    def __init__(self, logits: Logits) -> None:
        self.largest = logits.max()
        self.weights: Logits = logits - self.largest
        np.exp(self.weights, out=self.weights)  # in place: fresh pages cost as much as the work
        self.total = float(self.weights.sum(dtype=np.float64))

    def entropy(self, logits: Logits) -> float:
        """Entropy of the distribution, in nats."""
        relative = np.maximum(logits - self.largest, np.float32(-1e4))  # 0 times -inf would be NaN
        relative *= self.weights
        return float(np.log(self.total)) - float(relative.sum(dtype=np.float64)) / self.total

    def logit_of(self, probability: float) -> np.float32:
        """The logit of a token that has this probability."""
        return np.float32(float(self.largest) + np.log(self.total) + np.log(probability))


def _above(logits: Logits, threshold: np.float32, at_least: int) -> Indices:
    """The indices of logits of at least `threshold`, and those of the `at_least` largest in any case."""
    lowest = logits.max() if at_least == 1 else kth_largest(logits, min(at_least, len(logits)))
    return np.flatnonzero(logits >= min(threshold, lowest))


def _fewest(keys: Logits, weights: Logits, target: float, at_least: int) -> Indices:
    """The fewest indices whose `weights` (N,) sum to `target`, by their `keys` (N,), the largest first; ascending.

    Of equal keys the lower index comes first. At least `at_least` indices are returned.
    """
    order = largest(keys, _FIRST_TRY)
    mass = np.cumsum(weights[order], dtype=np.float64)
    if mass[-1] >= target or len(order) == len(keys):
        return np.sort(order[: max(int(np.searchsorted(mass, target)) + 1, at_least)])
    # Many tokens are needed: a histogram finds the bin in which the mass is reached, and only that bin is sorted.
    # Block by block, because 8-byte arrays of the vocabulary's length cost more in page faults than in work.
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
    mass_above = float(ends[reached - 1]) if reached else 0.0
    kept = bins < reached
    kept[within[: int(np.searchsorted(np.cumsum(weights[within], dtype=np.float64), target - mass_above)) + 1]] = True
    kept[order[:at_least]] = True
    return np.flatnonzero(kept)
