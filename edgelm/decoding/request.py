"""What all ways of decoding share: the session they need, the request they serve, the steps they give. No text."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

import numpy as np

from edgelm.decoding.generation_config import GenerationConfig
from edgelm.decoding.logits_processors import Ids, LogitsProcessor, Row, process, processors_of
from edgelm.decoding.logprobs import IdLogprob
from edgelm.engine.call import DraftCost
from edgelm.errors import ContextError, DeviceError
from edgelm.ids import cut

FinishReason = Literal["eos", "stop", "length", "context", "time", "cancelled"]
Computed = TypeVar("Computed")

CANCEL_PIECE_TOKENS = 64
"""A prompt's computation can be cancelled between pieces of this size, which take about as long as some new tokens."""


class DecodingBatch(Protocol):
    """Several continuations of one text, each a row with a cache of its own, all of the same length."""

    def step(self, ids: Sequence[int] | Ids) -> Row:
        """Append one token to each row, (B,); returns the logits, float32 (B, V), valid until the next step."""

    def step_hidden(self, ids: Sequence[int] | Ids) -> tuple[Row, Row]:
        """The same, with the last hidden states, float32 (B, D)."""

    def reorder(self, rows: Sequence[int] | Ids) -> None:
        """Row i becomes a copy of row `rows[i]`, (B,)."""


class DecodingSession(Protocol):
    """What decoding needs of a session; `edgelm.engine.session.Session` is one, a test's fake is another."""

    @property
    def context_length(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def position(self) -> int: ...

    @property
    def draft_cost(self) -> DraftCost: ...

    def step(self, ids: Sequence[int] | Ids) -> Row: ...

    def rewind(self, count: int) -> None: ...

    def step_all(self, ids: Sequence[int] | Ids) -> Row:
        """Append a few ids (T,); returns the logits of every one, float32 (T, V), valid until the next call."""

    def step_hidden(self, ids: Sequence[int] | Ids) -> tuple[Row, Row]:
        """Append ids (T,); returns the last position's logits (V,) and the hidden states of all, float32 (T, D)."""

    def batch(self, rows: int, capacity: int) -> DecodingBatch:
        """That many rows which continue what this session holds, with room for `capacity` tokens in all."""


@dataclass(frozen=True, slots=True)
class Step:
    """One turn of the loop: a new token, or, as a row's last step, the reason why there is none."""

    token_id: int | None
    finish_reason: FinishReason | None
    logprobs: tuple[IdLogprob, ...] | None = None
    """Of the token and, after it, of the likeliest ones, where `GenerationConfig.logprobs` asks for them."""
    drafted: int = 0
    """How many drafted tokens were computed with the logits of this step, and are checked by it and those after it."""
    was_drafted: bool = False
    """Whether the draft had this token."""


EndsText = Callable[[Sequence[int]], bool]
"""Whether new tokens complete a stop string."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and how to continue it, checked against a model."""

    prompt: Ids
    config: GenerationConfig
    seed: int
    vocab_size: int
    most_new_tokens: int
    """As many as the configuration wants and the context holds; the last one is never fed."""
    last_reason: FinishReason
    """Why a row ends that has so many: "length" or "context"."""
    ends_text: EndsText | None
    processors: tuple[LogitsProcessor, ...] = ()
    clock: Callable[[], float] = time.monotonic
    started: float = field(default=0.0)

    @classmethod
    def of(
        cls,
        session: DecodingSession,
        prompt_ids: Sequence[int],
        config: GenerationConfig,
        seed: int,
        *,
        ends_text: EndsText | None = None,
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
        wanted, room = config.new_token_limit(count), context + 1 - count
        return cls(
            prompt=np.asarray(prompt_ids, np.int64),
            config=config,
            seed=seed,
            vocab_size=session.vocab_size,
            most_new_tokens=min(wanted, room),
            last_reason="length" if wanted <= room else "context",
            ends_text=ends_text,
            processors=processors_of(config, count, session.vocab_size),
            clock=clock,
            started=clock(),
        )

    @property
    def out_of_time(self) -> bool:
        """Whether `max_time` has passed."""
        return self.config.max_time is not None and self.clock() - self.started >= self.config.max_time

    @property
    def interruption(self) -> FinishReason | None:
        """Why to stop before the text's own end: "cancelled", or "time" once there is a first token; None to go on."""
        if self.config.cancel is not None and self.config.cancel.is_set():
            return "cancelled"
        return "time" if self.out_of_time else None

    def prompt_logits(self, session: DecodingSession, ids: Ids) -> Row | None:
        """Compute `ids`, the prompt or what is left of it; returns the last logits (V,), None where cancelled."""
        found = self.in_pieces(session.step, ids)
        return None if found is None else found[-1]

    def in_pieces(self, compute: Callable[[Ids], Computed], ids: Ids) -> list[Computed] | None:
        """What `compute` makes of `ids`, of the prompt, piece by piece; None where cancelled before the last one.

        Only a prompt that may be cancelled is cut here.
        """
        if self.config.cancel is None:
            return [compute(ids)]
        found = []
        for piece in cut(ids, CANCEL_PIECE_TOKENS):
            if self.interruption == "cancelled":
                return None
            found.append(compute(piece))
        return found

    def text_buffer(self, rows: int = 1) -> Ids:
        """The prompt with room for all new tokens, (rows, T)."""
        buffer = np.empty((rows, len(self.prompt) + self.most_new_tokens), np.int64)
        buffer[:, : len(self.prompt)] = self.prompt
        return buffer

    def processed(self, ids: Ids, logits: Row, *, required: bool = True) -> Row:
        """Logits (V,) after all processors, given the ids so far (T,).

        Args:
            required: whether a token must be left to choose.

        Raises:
            DeviceError: a logit is NaN, or the largest is infinite.
            ConfigError: no token is left to choose.
        """
        return process(self.processors, ids, self.finite(logits), required=required)

    def finite(self, logits: Row) -> Row:
        """The same logits, (V,) or (B, V).

        Raises:
            DeviceError: one is NaN, or the largest is infinite.
        """
        if not np.isfinite(logits.max()):  # NaN carries through max
            raise DeviceError(
                "the model computed NaN or infinite logits: it does not work on this device; "
                "run `edgelm verify`, or use a bundle of another precision"
            )
        return logits
