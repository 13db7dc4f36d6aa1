"""One row's choice of its next token: greedy, drawn, or drawn under mirostat's feedback."""

import numpy as np

from edgelm.generation_config import GenerationConfig
from edgelm.logits_processors import Row
from edgelm.sampling import (
    candidates,
    draw,
    exclude_top_choices,
    filters_of,
    mirostat_filter,
    narrowed,
    uniform,
    xtc_excludes,
)


class TokenChoice:
    """Chooses the tokens of one row; the only state is mirostat's.

    Args:
        seed, row: which random numbers the row gets, one for each step.
    """

    def __init__(self, config: GenerationConfig, seed: int, row: int) -> None:
        self._config, self._seed, self._row = config, seed, row
        self._filters = filters_of(config)
        self._mu = 2 * (config.mirostat_tau or 0.0)  # bits of surprise allowed, mirostat 2

    def __call__(self, logits: Row, step: int) -> int:
        """The token to follow, given processed logits (V,)."""
        config = self._config
        if not config.do_sample:
            return int(np.argmax(logits))
        tokens, left = candidates(logits, config.temperature, self._filters)
        if xtc_excludes(self._seed, self._row, step, config.xtc_probability):
            left = exclude_top_choices(left, config.xtc_threshold)
        if config.mirostat_tau is not None:
            tokens, left = narrowed(tokens, left, mirostat_filter(left, self._mu))
        place = draw(left, uniform(self._seed, self._row, step))
        if config.mirostat_tau is not None:
            weights = np.exp(left - left.max(), dtype=np.float64)
            surprise = -float(np.log2(weights[place] / weights.sum()))
            self._mu -= config.mirostat_eta * (surprise - config.mirostat_tau)
        return place if tokens is None else int(tokens[place])
