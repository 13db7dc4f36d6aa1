"""One text that grows by a token at a time: its ids, what is chosen next, and when it ends."""

import numpy as np

from edgelm.decoding.generation_config import GenerationConfig
from edgelm.decoding.logits_processors import Ids, Row
from edgelm.decoding.logprobs import with_alternatives
from edgelm.decoding.request import FinishReason, Request, Step
from edgelm.decoding.sampling import (
    candidates,
    draw,
    exclude_top_choices,
    filters_of,
    mirostat_filter,
    narrowed,
    uniform,
    xtc_excludes,
)

_FIRST_BUFFER = 1024
"""Room for new tokens to begin with: a window may go on for ever."""


class DecodingRow:
    """Row `row` of a request: logits go in, tokens come out; who computes the logits is the caller's affair."""

    def __init__(self, request: Request, row: int) -> None:
        self.new_tokens = 0
        """How many tokens the prompt has got."""
        self._request = request
        self._choose = TokenChoice(request.config, request.seed, row)
        room = np.empty(min(request.most_new_tokens, _FIRST_BUFFER), np.int64)
        self._buffer: Ids = np.concatenate([request.prompt, room])
        self._end = len(request.prompt)

    @property
    def ids(self) -> Ids:
        """The prompt and what follows it so far, int64 (T,)."""
        return self._buffer[: self._end]

    @property
    def tokens_left(self) -> int:
        """How many more tokens may follow."""
        return self._request.most_new_tokens - self.new_tokens

    def reason_to_end(self) -> FinishReason | None:
        """Why no token follows, known before any logits are."""
        if not self.tokens_left:
            return self._request.last_reason
        reason = self._request.interruption
        return reason if self.new_tokens or reason == "cancelled" else None

    def take(self, logits: Row) -> Step:
        """Choose the next token, given the logits (V,) after `ids`.

        Raises: as `Request.processed`.
        """
        token = self._choose(self._request.processed(self.ids, logits), self.new_tokens)
        if token in self._request.config.eos_token_id:
            return Step(None, "eos")
        if self._end == len(self._buffer):
            self._buffer = np.concatenate([self._buffer, np.empty_like(self._buffer)])
        self._buffer[self._end] = token
        self._end += 1
        self.new_tokens += 1
        wanted = self._request.config.logprobs
        return Step(token, None, None if wanted is None else with_alternatives(logits, token, wanted))


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
