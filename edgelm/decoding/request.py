"""Shared by all decoding methods: the session they need, a request, its rows, and their steps. No text."""

import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeVar

import numpy as np

from edgelm.decoding.constraint import RowConstraint, TokenMatcher
from edgelm.decoding.generation_config import GenerationConfig, LogitsProcessor
from edgelm.decoding.logits_processors import MASKED, process, processors_of
from edgelm.decoding.logprobs import BROKEN_LOGITS, IdLogprob, with_alternatives
from edgelm.decoding.sampling import TokenChoice
from edgelm.engine.call import DraftCost
from edgelm.errors import ConfigError, ContextError, DeviceError
from edgelm.ids import Hidden, IdArray, Logits, prompt_chunks

FinishReason = Literal["eos", "stop", "length", "context", "time", "cancelled"]
Computed = TypeVar("Computed")

PIECE_TOKENS = 64
"""A prompt's computation can be cancelled, and is reported, between pieces of this size. A piece takes as long as a few
steps."""
_FIRST_BUFFER = 1024
"""Room for new tokens at first, because a text with a window may be endless."""


class DecodingBatch(Protocol):
    """Several continuations of one text, all of the same length; each is a row with a cache of its own."""

    def step(self, ids: Sequence[int] | IdArray) -> Logits:
        """Append one token to each row, (B,); returns the logits, float32 (B, V), valid until the next step."""

    def step_hidden(self, ids: Sequence[int] | IdArray) -> tuple[Logits, Hidden]:
        """As `step`, and the last hidden states, float32 (B, D)."""

    def reorder(self, rows: Sequence[int] | IdArray) -> None:
        """Row i becomes a copy of row `rows[i]`, (B,)."""


class DecodingSession(Protocol):
    """The part of a session that decoding needs; `edgelm.engine.session.Session` is one, a test's fake is another."""

    context_length: int
    batch_invariant: bool
    """Whether tokens must be computed one at a time, as in a batch."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def position(self) -> int: ...

    @property
    def draft_cost(self) -> DraftCost: ...

    def step(self, ids: Sequence[int] | IdArray) -> Logits:
        """Append ids (T,); returns the logits after the last one, float32 (V,)."""

    def rewind(self, count: int) -> None:
        """Forget the last `count` tokens."""

    def step_all(self, ids: Sequence[int] | IdArray) -> Logits:
        """Append a few ids (T,); returns the logits after every one, float32 (T, V), valid until the next call."""

    def step_hidden(self, ids: Sequence[int] | IdArray) -> tuple[Logits, Hidden]:
        """Append ids (T,); returns the logits after the last one, (V,), and all hidden states, float32 (T, D)."""

    def batch(self, rows: int, capacity: int) -> DecodingBatch:
        """`rows` copies of this session's text, with room for `capacity` tokens in each."""


@dataclass(frozen=True, slots=True)
class Step:
    """One turn of the loop: a new token or, as the last step of a row, the reason why there is no token."""

    token_id: int | None
    finish_reason: FinishReason | None
    logprobs: tuple[IdLogprob, ...] | None = None
    """Of the token and, after it, of the likeliest tokens, if `GenerationConfig.logprobs` asks for them.

    The last step of a row that ends with "eos" has those of the end token.
    """
    drafted: int = 0
    """Number of drafted tokens that were computed together with the logits of this step."""
    was_drafted: bool = False
    """Whether the draft predicted this token."""


EndsText = Callable[[Sequence[int]], bool]
"""Whether new tokens complete a stop string."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and how to continue it, checked against a model."""

    prompt: IdArray
    """(T,)"""
    config: GenerationConfig
    seed: int
    vocab_size: int
    new_token_limit: int
    """Maximum number of new tokens, under the configuration and in the context. The last one is never fed."""
    limit_reason: Literal["length", "context"]
    """Why a row ends that reaches `new_token_limit`."""
    ends_text: EndsText | None
    matcher: TokenMatcher | None
    """At the beginning of a text that obeys a constraint; each row copies it."""
    processors: tuple[LogitsProcessor, ...]
    clock: Callable[[], float]
    started: float

    @classmethod
    def of(
        cls,
        session: DecodingSession,
        prompt_ids: Sequence[int],
        config: GenerationConfig,
        seed: int,
        *,
        ends_text: EndsText | None = None,
        matcher: TokenMatcher | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> "Request":
        """Check a prompt and a configuration; a context of C tokens takes C + 1 - len(prompt_ids) new ones.

        Raises:
            ContextError: the prompt is longer than the context.
            ConfigError: `max_length` is not more than the prompt has, or an option names an unknown token.
        """
        count, context = len(prompt_ids), session.context_length
        if count > context:
            raise ContextError(
                f"the prompt has {count} tokens, but this model's context holds {context}: shorten the prompt, or "
                "give context_overflow='truncate' or context_overflow='window'"
            )
        requested, room = config.new_token_limit(count), context + 1 - count
        return cls(
            prompt=np.asarray(prompt_ids, np.int64),
            config=config,
            seed=seed,
            vocab_size=session.vocab_size,
            new_token_limit=min(requested, room),
            limit_reason="length" if requested <= room else "context",
            ends_text=ends_text,
            matcher=matcher,
            processors=processors_of(config, count, session.vocab_size),
            clock=clock,
            started=clock(),
        )

    @property
    def interruption(self) -> Literal["cancelled", "time"] | None:
        """Why to stop now: `cancel` is set, or `max_time` has passed (which counts only after a first token)."""
        config = self.config
        if config.cancel is not None and config.cancel.is_set():
            return "cancelled"
        if config.max_time is not None and self.clock() - self.started >= config.max_time:
            return "time"
        return None

    def in_pieces(self, compute: Callable[[IdArray], Computed], ids: IdArray) -> list[Computed] | None:
        """The results of `compute`, a method of the session, for pieces of `ids` (T,); None if cancelled in between.

        Only a request with `cancel` or `prompt_progress` has more than one piece.
        """
        tell = self.config.prompt_progress
        if self.config.cancel is None and tell is None:
            return [compute(ids)]
        results = []
        left = len(ids)
        for piece in prompt_chunks(ids, PIECE_TOKENS):
            if self.interruption == "cancelled":
                return None
            results.append(compute(piece))
            left -= len(piece)
            if tell is not None:
                tell(len(self.prompt) - left, len(self.prompt))
        return results

    def text_buffer(self, rows: int = 1) -> IdArray:
        """The prompt in every row, with room for all new tokens, (rows, T)."""
        buffer = np.empty((rows, len(self.prompt) + self.new_token_limit), np.int64)
        buffer[:, : len(self.prompt)] = self.prompt
        return buffer

    def processed(self, ids: IdArray, logits: Logits) -> Logits:
        """Logits (V,) after all processors, given the ids so far (T,).

        Raises DeviceError if a logit is NaN or the largest is infinite, and ConfigError if the processors leave no
        token to choose.
        """
        if not np.isfinite(logits.max()):  # NaN carries through max
            raise DeviceError(BROKEN_LOGITS)
        return process(self.processors, ids, logits) if self.processors else logits


class DecodingRow:
    """A row of a request, which grows by a token at a time: it takes logits and gives steps.

    The number `row` determines its random numbers.
    """

    def __init__(self, request: Request, row: int) -> None:
        self.new_tokens = 0
        """Number of tokens after the prompt."""
        self._request = request
        self._choose = TokenChoice(request.config, request.seed, row)
        room = np.empty(min(request.new_token_limit, _FIRST_BUFFER), np.int64)
        self._buffer: IdArray = np.concatenate([request.prompt, room])
        self._end = len(request.prompt)
        self._constraint = None if request.matcher is None else RowConstraint(request.matcher, request.config)

    @property
    def ids(self) -> IdArray:
        """The prompt and the new tokens, int64 (T,)."""
        return self._buffer[: self._end]

    @property
    def tokens_left(self) -> int:
        """Maximum number of further tokens."""
        return self._request.new_token_limit - self.new_tokens

    @property
    def is_finished(self) -> bool:
        """Whether the text obeys its constraint and nothing can follow."""
        return self._constraint is not None and self._constraint.is_finished

    def reason_to_end(self) -> FinishReason | None:
        """Why no token follows, if this is known before the logits are."""
        if self.is_finished:
            return "stop"
        if self.new_tokens == self._request.new_token_limit:
            return self._request.limit_reason
        reason = self._request.interruption
        return reason if self.new_tokens or reason == "cancelled" else None

    def take(self, logits: Logits) -> Step:
        """Choose the next token, given the logits (V,) after `ids`.

        Raises as `Request.processed`, and ConfigError if a constraint leaves no token to choose.
        """
        request, constraint = self._request, self._constraint
        processed = request.processed(self.ids, logits)
        token = forced = None if constraint is None else constraint.forced_token
        if token is None:
            token = self._choose(processed if constraint is None else constraint.masked(processed), self.new_tokens)
        count = request.config.logprobs
        logprobs = None if count is None else with_alternatives(logits, token, count)
        if forced is None and token in request.config.eos_token_id:
            return Step(None, "eos", logprobs)
        self._append(token)
        return Step(token, None, logprobs)

    def guess(self, ids: IdArray, logits: Logits) -> int:
        """The token that would follow `ids` (T,), the text and some guesses, if `logits` (V,) were the model's.

        It is chosen with the random number of its place, as `take` chooses, so that two similar models choose alike.
        Nothing is taken. Neither a constraint nor a caller's own `logits_processor` is asked, because these may count
        their calls. Raises DeviceError if a logit is NaN or the largest is infinite.
        """
        request, processed = self._request, logits
        if not np.isfinite(logits.max()):
            raise DeviceError(BROKEN_LOGITS)
        if request.processors and not request.config.logits_processor:
            processed = process(request.processors, ids, logits, may_rule_out_all=True)
            if processed.max() == MASKED:
                processed = logits
        return copy(self._choose)(processed, len(ids) - len(request.prompt))

    def take_forced(self) -> Step | None:
        """Take the next token, if it is certain without logits; None if `take` must choose it."""
        constraint = self._constraint
        if constraint is None or constraint.forced_token is None or self._request.config.logprobs is not None:
            return None
        token = constraint.forced_token
        self._append(token)
        return Step(token, None)

    def _append(self, token: int) -> None:
        if self._constraint is not None:
            self._constraint.take(token)
        if self._end == len(self._buffer):
            self._buffer = np.concatenate([self._buffer, np.empty_like(self._buffer)])
        self._buffer[self._end] = token
        self._end += 1
        self.new_tokens += 1


def logits_after(session: DecodingSession, ids: IdArray) -> Logits:
    """Append new tokens `ids` (T,), more than one if some were forced; returns the logits (V,) after the last one.

    They are valid until the next call. Several tokens take about as long as one, but the last bits may differ.
    """
    if len(ids) > 1 and not session.batch_invariant:
        return session.step(ids)
    for token in ids[:-1]:
        session.step_all([token])
    logits: Logits = session.step_all(ids[-1:])[0]
    return logits


def fitted(prompt: list[int], config: GenerationConfig, context_length: int) -> tuple[list[int], GenerationConfig]:
    """The prompt without its oldest tokens, if it does not fit with its new tokens and `context_overflow` allows it.

    The new tokens get the room they need ("hole" of transformers' text-generation pipeline), but at least half the
    context stays for the prompt, and at least a quarter for its newest tokens. The first `pinned_tokens` stay. If
    tokens are dropped, `max_length` is replaced by the number of new tokens it means for the whole prompt. Raises
    ConfigError if `pinned_tokens` is more than half the context.
    """
    half, pinned = context_length // 2, config.pinned_tokens
    if pinned > half:
        raise ConfigError(f"pinned_tokens must be at most {half}, half of this model's context, got {pinned}")
    if config.context_overflow == "stop":
        return prompt, config
    requested = config.new_token_limit(len(prompt))
    limit = context_length
    if config.context_overflow == "truncate":  # a window makes room by itself: only the prompt has to fit
        limit = min(limit, max(half, pinned + max(1, half // 2), context_length + 1 - requested))
    if len(prompt) <= limit:
        return prompt, config
    if config.max_length is not None:
        config = config.updated({"max_new_tokens": requested})
    return prompt[:pinned] + prompt[len(prompt) - (limit - pinned) :], config


def behind_prefix(config: GenerationConfig, prefix_tokens: int) -> GenerationConfig:
    """The configuration of a fitted prompt, adapted to ids that begin with a prefix.

    Lengths then count the prefix too, and a window keeps it.
    """
    windowed = config.context_overflow == "window"
    return replace(
        config,
        max_length=None if config.max_length is None else config.max_length + prefix_tokens,
        min_length=config.min_length + prefix_tokens if config.min_length else 0,
        pinned_tokens=config.pinned_tokens + prefix_tokens if windowed else 0,
        context_overflow="window" if windowed else "stop",
    )
