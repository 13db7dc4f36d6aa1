"""The decoding loop: token ids in, token ids out. It knows no text."""

import time
from collections.abc import Callable, Iterator, Sequence

from edgelm.decoding.beams import Finished, beam_search, group_beam_search
from edgelm.decoding.contrastive_search import contrastive_search
from edgelm.decoding.generation_config import GenerationConfig
from edgelm.decoding.logits_processors import Row
from edgelm.decoding.prompt_lookup import decode_with_drafts
from edgelm.decoding.request import DecodingSession, EndsText, FinishReason, Request, Step
from edgelm.decoding.row import DecodingRow

__all__ = ["DecodingSession", "FinishReason", "Step", "generate"]


def generate(
    session: DecodingSession,
    prompt_ids: Sequence[int],
    config: GenerationConfig,
    seed: int,
    *,
    reused: int = 0,
    ends_text: EndsText | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Iterator[Step]]:
    """Continue `prompt_ids`: an iterator of steps for each of `num_return_sequences` rows, one row after another.

    The prompt is computed once and kept for all rows. A row may be left early; its iterator is dead once the next
    row begins. A context of C tokens takes C + 1 - len(prompt_ids) new ones, for the last one is never fed.

    Args:
        session: holding the prompt's first `reused` tokens and nothing else.
        reused: 0 for contrastive search, which needs the hidden states of the whole prompt.
        ends_text: whether new tokens complete a stop string; beam search asks, elsewhere the caller just stops.
        clock: seconds, for `max_time`.

    Raises:
        ContextError: the prompt is longer than the context.
        ConfigError: `max_length` is not more than the prompt has, an option names an unknown token, or the
            processors leave no token to choose.
        DeviceError: the model computes NaN.
    """
    request = Request.of(session, prompt_ids, config, seed, ends_text=ends_text, clock=clock)
    if config.penalty_alpha is not None:
        yield contrastive_search(session, request)
        return
    logits = request.prompt_logits(session, request.prompt[reused:])  # (V,)
    if logits is None:
        yield from (iter([Step(None, "cancelled")]) for _ in range(config.num_return_sequences))
        return
    if config.num_beams > 1:
        search = group_beam_search if config.num_beam_groups > 1 else beam_search
        found = search(session, request, logits)
        for _ in range(config.num_return_sequences):
            yield _steps_of_next(found)
        return
    prompt_end = session.position
    for row in range(config.num_return_sequences):
        session.rewind(session.position - prompt_end)
        yield _generate_row(session, request, logits, row)


def _generate_row(session: DecodingSession, request: Request, logits: Row, row: int) -> Iterator[Step]:
    text = DecodingRow(request, row)
    if request.config.prompt_lookup_num_tokens is not None:
        yield from decode_with_drafts(session, text, logits, request.config.prompt_lookup_num_tokens)
        return
    while (reason := text.reason_to_end()) is None:
        if text.new_tokens:
            logits = session.step_all(text.ids[-1:])[0]  # (V,)
        step = text.take(logits)
        yield step
        if step.finish_reason is not None:
            return
    yield Step(None, reason)


def _steps_of_next(found: Iterator[Finished]) -> Iterator[Step]:
    """The next of the texts a search finds; the search runs when the first is asked for."""
    tokens, reason = next(found)
    for token in tokens:
        yield Step(token, None)
    yield Step(None, reason)
