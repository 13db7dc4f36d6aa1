"""From logits to a token: pure functions on one row of logits, float32 of shape (V,).

Filters return a new row in which the tokens ruled out are -inf. Order and meaning are those of transformers'
logits processors, so that the same options give the same distribution.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from edgelm.errors import DeviceError
from edgelm.generation_config import GenerationConfig

Row = npt.NDArray[np.float32]

_TOP_P_FIRST_TRY = 256


def penalize_repetition(logits: Row, seen: npt.NDArray[np.int64], penalty: float) -> Row:
    """Divide positive and multiply negative logits of the tokens `seen` by `penalty` (CTRL, arXiv 1909.05858)."""
    result = logits.copy()
    values = result[seen]
    result[seen] = np.where(values < 0, values * penalty, values / penalty)
    return result


def top_k_filter(logits: Row, k: int) -> Row:
    """Keep the `k` largest logits, and all that equal the smallest of them (Fan et al., arXiv 1805.04833)."""
    if k >= len(logits):
        return logits
    threshold = np.partition(logits, -k)[-k]
    return _keep(logits, logits >= threshold)


def top_p_filter(logits: Row, p: float) -> Row:
    """Keep the smallest set of tokens whose probabilities sum to at least `p` (Holtzman et al., arXiv 1904.09751)."""
    if p >= 1:
        return logits
    weights = np.exp(logits - logits.max(), dtype=np.float64)  # (V,)
    target = p * float(weights.sum())
    candidates = min(_TOP_P_FIRST_TRY, len(logits))
    while True:
        # A partition of the likeliest few nearly always holds the mass; sorting 50,257 logits costs ten times more.
        order = np.argpartition(logits, -candidates)[-candidates:]
        order = order[np.argsort(-logits[order], kind="stable")]  # (candidates,) likeliest first
        mass = np.cumsum(weights[order])
        if mass[-1] >= target or candidates == len(logits):
            break
        candidates = min(8 * candidates, len(logits))
    kept = int(np.searchsorted(mass, target)) + 1  # the token that reaches the mass is in
    mask = np.zeros(len(logits), bool)
    mask[order[:kept]] = True
    return _keep(logits, mask)


def min_p_filter(logits: Row, p: float) -> Row:
    """Keep tokens at least `p` times as likely as the likeliest (Nguyen et al., arXiv 2407.01082)."""
    if p <= 0:
        return logits
    return _keep(logits, logits >= logits.max() + np.float32(np.log(p)))


def sampling_logits(logits: Row, config: GenerationConfig) -> Row:
    """Temperature, then the filters, in transformers' order."""
    if config.temperature != 1:
        logits = logits / np.float32(config.temperature)
    if config.top_k is not None:
        logits = top_k_filter(logits, config.top_k)
    return min_p_filter(top_p_filter(logits, config.top_p), config.min_p)


def draw(logits: Row, uniform: float) -> int:
    """The token at `uniform` in [0, 1) of the cumulative distribution softmax(`logits`)."""
    tokens = np.flatnonzero(logits > -np.inf)
    values = logits[tokens].astype(np.float64)
    cumulative = np.cumsum(np.exp(values - values.max()))
    index = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return int(tokens[min(index, len(tokens) - 1)])


def uniform(seed: int, row: int, step: int) -> float:
    """The random number in [0, 1) of a step of a row: a function of its arguments alone, so that a row's draws do
    not depend on its neighbours (Philox 4x64, Salmon et al., SC 2011)."""
    generator = np.random.Philox(key=np.array([seed, row], np.uint64), counter=np.array([step, 0, 0, 0], np.uint64))
    return float(int(generator.random_raw()) >> 11) * 2.0**-53


def next_token(logits: Row, seen: Iterable[int], config: GenerationConfig, seed: int, row: int, step: int) -> int:
    """Choose the token to follow.

    Args:
        logits: of the last position, (V,).
        seen: the tokens of the prompt and of the text so far, for the repetition penalty.
        seed, row, step: which random number to use; unused when greedy.

    Raises:
        DeviceError: a logit is NaN, or the largest is infinite.
    """
    if not np.isfinite(logits.max()):  # NaN carries through max
        raise DeviceError(
            "the model computed NaN or infinite logits: it does not work on this device; "
            "run `edgelm verify`, or use a bundle of another precision"
        )
    if config.repetition_penalty != 1:
        logits = penalize_repetition(logits, np.fromiter(set(seen), np.int64), config.repetition_penalty)
    if not config.do_sample:
        return int(np.argmax(logits))
    return draw(sampling_logits(logits, config), uniform(seed, row, step))


def _keep(logits: Row, mask: npt.NDArray[np.bool_]) -> Row:
    return np.where(mask, logits, np.float32(-np.inf))
