"""The decoding loop: token ids in, token ids out. It knows no text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from edgelm.errors import ContextError
from edgelm.generation_config import GenerationConfig
from edgelm.logprobs import IdLogprob, with_alternatives
from edgelm.sampling import Row, next_token

FinishReason = Literal["eos", "stop", "length", "context", "time", "cancelled"]


class DecodingSession(Protocol):
    """What the loop needs of a session; `edgelm.session.Session` is one, a test's fake is another."""

    @property
    def context_length(self) -> int: ...

    @property
    def position(self) -> int: ...

    def step(self, ids: Sequence[int]) -> Row: ...

    def rewind(self, count: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Step:
    """One turn of the loop: a new token, or, as a row's last step, the reason why there is none."""

    token_id: int | None
    finish_reason: FinishReason | None
    logprobs: tuple[IdLogprob, ...] | None = None
    """Of the token and, after it, of the likeliest ones, where `GenerationConfig.logprobs` asks for them."""


def generate(
    session: DecodingSession, prompt_ids: Sequence[int], config: GenerationConfig, seed: int
) -> Iterator[Iterator[Step]]:
    """Continue `prompt_ids`: an iterator of steps for each of `num_return_sequences` rows, one row after another.

    The prompt is computed once and kept for all rows. A row may be left early; its iterator is dead once the next
    row begins. A context of C tokens takes C + 1 - len(prompt_ids) new ones, for the last one is never fed.

    Raises:
        ContextError: the prompt is longer than the context.
        ConfigError: `max_length` is not more than the prompt has.
    """
    if len(prompt_ids) > session.context_length:
        raise ContextError(
            f"the prompt has {len(prompt_ids)} tokens, but this model's context holds {session.context_length}: "
            "shorten the prompt"
        )
    limit = config.new_token_limit(len(prompt_ids))
    prompt_logits = session.step(prompt_ids)  # (V,)
    prompt_end = session.position
    for row in range(config.num_return_sequences):
        session.rewind(session.position - prompt_end)
        yield _generate_row(session, prompt_ids, prompt_logits, limit, config, seed, row)


def _generate_row(
    session: DecodingSession,
    prompt_ids: Sequence[int],
    logits: Row,
    limit: int,
    config: GenerationConfig,
    seed: int,
    row: int,
) -> Iterator[Step]:
    tokens = list(prompt_ids)
    for count in range(limit):
        if count:
            if session.position == session.context_length:
                yield Step(None, "context")
                return
            logits = session.step(tokens[-1:])  # (V,)
        token = next_token(logits, tokens, config, seed, row, count)
        if token in config.eos_token_id:
            yield Step(None, "eos")
            return
        tokens.append(token)
        wanted = config.logprobs
        yield Step(token, None, None if wanted is None else with_alternatives(logits, token, wanted))
    yield Step(None, "length")
