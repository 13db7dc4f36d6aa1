"""Texts longer than the context: a prompt cut to fit, and a session that goes on past the context's end."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from edgelm.decoding.generation_config import GenerationConfig
from edgelm.decoding.logits_processors import Ids, Row
from edgelm.decoding.request import DecodingBatch, DecodingSession
from edgelm.engine.call import DraftCost
from edgelm.errors import ConfigError

ENDLESS = 2**31 - 1
"""The context length of a window: more tokens than anybody generates."""


def fitted(prompt: list[int], config: GenerationConfig, context_length: int) -> tuple[list[int], GenerationConfig]:
    """A prompt without its oldest tokens, where it and its new tokens do not fit and `context_overflow` allows it.

    As many go as the new tokens need ("hole" of transformers' text-generation pipeline), but half the context is
    always left to the prompt, and a quarter to its newest tokens; the first `pinned_tokens` stay. Where tokens go,
    `max_length` becomes the number of new tokens it meant for the whole prompt.

    Raises:
        ConfigError: `pinned_tokens` are more than half the context.
    """
    half = context_length // 2
    if config.pinned_tokens > half:
        raise ConfigError(
            f"pinned_tokens must be at most {half}, half of this model's context, got {config.pinned_tokens}"
        )
    if config.context_overflow == "stop":
        return prompt, config
    wanted = config.new_token_limit(len(prompt))
    # A window makes room when it needs some: there the prompt itself has to fit, no more.
    least = max(half, config.pinned_tokens + max(1, half // 2))
    most = context_length if config.context_overflow == "window" else max(least, context_length + 1 - wanted)
    most = min(most, context_length)
    if len(prompt) <= most:
        return prompt, config
    pinned = config.pinned_tokens
    if config.max_length is not None:
        config = config.updated({"max_new_tokens": wanted})
    return prompt[:pinned] + prompt[len(prompt) - (most - pinned) :], config


def behind_prefix(config: GenerationConfig, tokens: int) -> GenerationConfig:
    """A configuration of a prompt that fits, for the ids that have `tokens` of a prefix before it: lengths count those
    too, and a window keeps them."""
    return replace(
        config,
        max_length=None if config.max_length is None else config.max_length + tokens,
        min_length=config.min_length + tokens if config.min_length else 0,
        pinned_tokens=config.pinned_tokens + tokens if config.context_overflow == "window" else 0,
        context_overflow="window" if config.context_overflow == "window" else "stop",
    )


class WindowSession:
    """A session without an end: when its context is full it forgets the oldest tokens but the first `pinned_tokens`,
    and computes the others anew, for their positions are others now (GPT-2 has learned ones).

    What is kept fills half of the context behind the pinned tokens, so a new token costs about one computed anew.
    Where the window begins depends on the length of the text alone, not on how it came there.
    """

    def __init__(self, session: DecodingSession, pinned_tokens: int, held: Sequence[int] = ()) -> None:
        """Args: a session, how many tokens at the front never to forget, less than its context holds, and what the
        session holds already."""
        self._session = session
        self._pinned = pinned_tokens
        room = session.context_length - pinned_tokens
        self._shift = max(1, room // 2)
        self._kept = room - self._shift
        self._ids = list(held)  # all of them
        self._begin = pinned_tokens  # the session holds the pinned ones and those from here on
        self.reencoded_tokens = 0
        """How many tokens were computed again."""
        self.reencode_seconds = 0.0

    @property
    def context_length(self) -> int:
        """More tokens than anybody generates."""
        return ENDLESS

    @property
    def vocab_size(self) -> int:
        """V."""
        return self._session.vocab_size

    @property
    def draft_cost(self) -> DraftCost:
        """The session's."""
        return self._session.draft_cost

    @property
    def position(self) -> int:
        """How many tokens the text has, forgotten ones included."""
        return len(self._ids)

    def step(self, ids: Sequence[int] | Ids) -> Row:
        """Append `ids`, (T,); returns the last position's logits, float32 (V,)."""
        logits: Row | None = None
        for piece in self._pieces(ids):
            logits = self._session.step(piece)
        assert logits is not None
        return logits

    def step_all(self, ids: Sequence[int] | Ids) -> Row:
        """As `step`, with the logits of all of `ids`, float32 (T, V)."""
        return np.concatenate([self._session.step_all(piece).copy() for piece in self._pieces(ids)])

    def step_hidden(self, ids: Sequence[int] | Ids) -> tuple[Row, Row]:
        """As `step`, with the hidden states of all of `ids`, float32 (T, D)."""
        found = [self._session.step_hidden(piece) for piece in self._pieces(ids)]
        return found[-1][0], np.concatenate([hidden for _, hidden in found])

    def rewind(self, count: int) -> None:
        """Forget the last `count` tokens; what the window has left behind meanwhile is computed again."""
        del self._ids[len(self._ids) - count :]
        begin = self._begin_for(len(self._ids) - 1)
        if begin == self._begin:
            self._session.rewind(count)
        else:
            self._reencode(begin)

    def batch(self, rows: int, capacity: int) -> DecodingBatch:
        """Raises ConfigError: searches have no window."""
        raise ConfigError("context_overflow='window' works with greedy decoding and sampling only")

    def _pieces(self, ids: Sequence[int] | Ids) -> Iterator[Ids]:
        """`ids` in runs that one window holds; the session is at that window when a run comes."""
        array = np.asarray(ids, np.int64)
        begins = [self._begin_for(len(self._ids) + i) for i in range(len(array))]
        start = 0
        while start < len(array):
            begin = begins[start]
            stop = start + begins[start:].count(begin)  # they only grow
            if begin != self._begin:
                self._reencode(begin)
            self._ids += array[start:stop].tolist()
            yield array[start:stop]
            start = stop

    def _begin_for(self, place: int) -> int:
        """Where the window that holds the token at `place` begins."""
        beyond = place - self._session.context_length
        if beyond < 0:
            return self._pinned
        return self._session.context_length - self._kept + beyond // self._shift * self._shift

    def _reencode(self, begin: int) -> None:
        started = time.perf_counter()
        kept = self._ids[begin:]
        pinned = min(self._pinned, len(self._ids))  # fewer where the text was rewound to before their end
        self._session.rewind(max(0, self._session.position - pinned))
        if kept:
            self._session.step(np.asarray(kept, np.int64))
        self._begin = begin
        self.reencoded_tokens += len(kept)
        self.reencode_seconds += time.perf_counter() - started
