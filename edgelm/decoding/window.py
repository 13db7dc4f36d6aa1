"""A session without an end: when the context is full, it forgets the oldest tokens and continues."""

import time
from collections.abc import Iterator, Sequence

import numpy as np

from edgelm.decoding.request import DecodingBatch, DecodingSession
from edgelm.errors import ConfigError
from edgelm.ids import Hidden, IdArray, Logits

ENDLESS = 2**31 - 1
"""The context length of a window: more tokens than anybody generates."""


class WindowSession:
    """A session that forgets its oldest tokens, except the first `pinned_tokens`, whenever its context is full.

    It then computes the tokens it keeps again, because their positions change, learned or rotary. These tokens
    fill half of the context behind the pinned ones, so a new token costs about one token that is computed again.
    Where the window begins depends only on the length of the text, not on the calls that made it.

    `session` has computed exactly the tokens `held`; its context is longer than `pinned_tokens`.
    """

    def __init__(self, session: DecodingSession, pinned_tokens: int, held: Sequence[int] = ()) -> None:
        self._session = session
        self._pinned = pinned_tokens
        room = session.context_length - pinned_tokens
        self._shift = max(1, room // 2)
        self._kept = room - self._shift
        self._ids = list(held)  # the whole text, forgotten tokens included
        self._begin = pinned_tokens  # the session holds the pinned tokens and those from this index on
        self.reencoded_tokens = 0
        """Number of tokens that were computed again."""
        self.reencode_seconds = 0.0
        self.context_length, self.vocab_size, self.draft_cost = ENDLESS, session.vocab_size, session.draft_cost
        self.batch_invariant = session.batch_invariant

    @property
    def position(self) -> int:
        """Length of the text in tokens, forgotten ones included."""
        return len(self._ids)

    def step(self, ids: Sequence[int] | IdArray) -> Logits:
        """Append `ids`, (T,); returns the logits after the last one, float32 (V,)."""
        logits: Logits | None = None
        for piece in self._pieces(ids):
            logits = self._session.step(piece)
        assert logits is not None
        return logits

    def step_all(self, ids: Sequence[int] | IdArray) -> Logits:
        """Append `ids`, (T,); returns the logits after every one, float32 (T, V)."""
        return np.concatenate([self._session.step_all(piece).copy() for piece in self._pieces(ids)])

    def rewind(self, count: int) -> None:
        """Forget the last `count` tokens; tokens that the window had forgotten are computed again where needed."""
        del self._ids[len(self._ids) - count :]
        begin = self._begin_for(len(self._ids) - 1)
        if begin == self._begin:
            self._session.rewind(count)
        else:
            self._reencode(begin)

    def step_hidden(self, ids: Sequence[int] | IdArray) -> tuple[Logits, Hidden]:
        """Raise ConfigError: only contrastive search asks, and `GenerationConfig` refuses it with a window."""
        raise ConfigError("context_overflow='window' does not work with contrastive search")

    def batch(self, rows: int, capacity: int) -> DecodingBatch:
        """Raise ConfigError: only searches ask, and `GenerationConfig` refuses them with a window."""
        raise ConfigError("context_overflow='window' does not work with searches")

    def _pieces(self, ids: Sequence[int] | IdArray) -> Iterator[IdArray]:
        """`ids` in runs that fit into one window; when a run is yielded, the session is at its window."""
        array = np.asarray(ids, np.int64)
        begins = [self._begin_for(len(self._ids) + i) for i in range(len(array))]
        start = 0
        while start < len(array):
            begin = begins[start]
            stop = start + begins[start:].count(begin)  # because `begins` ascend
            if begin != self._begin:
                self._reencode(begin)
            self._ids += array[start:stop].tolist()
            yield array[start:stop]
            start = stop

    def _begin_for(self, index: int) -> int:
        """The begin of the window that holds the token at `index`."""
        beyond = index - self._session.context_length
        if beyond < 0:
            return self._pinned
        return self._session.context_length - self._kept + beyond // self._shift * self._shift

    def _reencode(self, begin: int) -> None:
        started = time.perf_counter()
        kept = self._ids[begin:]
        pinned = min(self._pinned, len(self._ids))  # the text may have been rewound into the pinned tokens
        self._session.rewind(max(0, self._session.position - pinned))
        if kept:
            self._session.step(np.asarray(kept, np.int64))
        self._begin = begin
        self.reencoded_tokens += len(kept)
        self.reencode_seconds += time.perf_counter() - started
