"""One text that grows by a token at a time: its ids, what is chosen next, and when it ends."""

import numpy as np

from edgelm.decoding import FinishReason, Request, Step
from edgelm.logits_processors import Ids, Row
from edgelm.logprobs import with_alternatives
from edgelm.token_choice import TokenChoice

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
