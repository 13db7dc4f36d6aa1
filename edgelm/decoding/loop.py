"""The decoding loop: token ids in, token ids out. It knows no text."""

import time
from collections.abc import Callable, Iterator, Sequence

from edgelm.decoding.beams import Hypothesis, beam_search, group_beam_search
from edgelm.decoding.constraint import TokenMatcher
from edgelm.decoding.contrastive_search import contrastive_search
from edgelm.decoding.draft_model import DraftModel, ModelDrafts
from edgelm.decoding.drafts import Drafts, decode_with_drafts
from edgelm.decoding.generation_config import GenerationConfig
from edgelm.decoding.prompt_lookup import PromptLookup
from edgelm.decoding.request import (
    DecodingRow,
    DecodingSession,
    EndsText,
    FinishReason,
    Request,
    Step,
    logits_after,
)
from edgelm.ids import Logits

__all__ = ["DecodingSession", "FinishReason", "Step", "generate"]


def generate(
    session: DecodingSession,
    prompt_ids: Sequence[int],
    config: GenerationConfig,
    seed: int,
    *,
    reused: int = 0,
    ends_text: EndsText | None = None,
    matcher: TokenMatcher | None = None,
    draft_model: DraftModel | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Iterator[Step]]:
    """Continue a prompt: an iterator of steps for each of `num_return_sequences` rows, one row after another.

    The prompt is computed once, for all rows. A row may be left early; do not use its iterator once the next row
    begins. A context of C tokens takes C + 1 - len(prompt_ids) new tokens, because the last one is never fed.

    Args:
        session: holds the first `reused` tokens of the prompt and nothing else.
        prompt_ids: the whole prompt, (T,).
        config: the options.
        seed: seed of the random numbers.
        reused: must be 0 for contrastive search, which needs the hidden states of the whole prompt.
        ends_text: whether new tokens complete a stop string. Only beam search asks; with other methods the caller
            leaves the row.
        matcher: what every text must obey.
        draft_model: guesses tokens where one text is decoded at a time, and no draft comes from the text itself.
        clock: the time in seconds, for `max_time`.

    Raises:
        ContextError: the prompt is longer than the context.
        ConfigError: `max_length` is not more than the prompt has, an option names an unknown token, or the
            processors leave no token to choose.
        DeviceError: the model computes NaN.
    """
    request = Request.of(session, prompt_ids, config, seed, ends_text=ends_text, matcher=matcher, clock=clock)
    if config.penalty_alpha is not None:
        yield contrastive_search(session, request)
        return
    pieces = request.in_pieces(session.step, request.prompt[reused:])
    if pieces is None:
        yield from (iter([Step(None, "cancelled")]) for _ in range(config.num_return_sequences))
        return
    logits = pieces[-1]  # (V,)
    if config.num_beams > 1:
        search = group_beam_search if config.num_beam_groups > 1 else beam_search
        texts = search(session, request, logits)
        for _ in range(config.num_return_sequences):
            yield _steps_of_next(texts)
        return
    prompt_end = session.position
    for row in range(config.num_return_sequences):
        session.rewind(session.position - prompt_end)
        text = DecodingRow(request, row)
        drafts: Drafts | None = None
        if config.prompt_lookup_num_tokens is not None:
            drafts = PromptLookup(config.prompt_lookup_num_tokens, session.draft_cost)
        elif draft_model is not None:
            drafts = ModelDrafts(draft_model, text.guess, session.draft_cost)
        yield _decode(session, text, logits) if drafts is None else decode_with_drafts(session, text, logits, drafts)


def _decode(session: DecodingSession, text: DecodingRow, logits: Logits) -> Iterator[Step]:
    """Continue `text`, whose prompt the session holds and whose next logits (V,) are given."""
    computed = len(text.ids)
    while (reason := text.reason_to_end()) is None:
        step = text.take_forced()
        if step is None:
            if computed < len(text.ids):
                logits = logits_after(session, text.ids[computed:])
                computed = len(text.ids)
            step = text.take(logits)
        yield step
        if step.finish_reason is not None:
            return
    yield Step(None, reason)


def _steps_of_next(texts: Iterator[Hypothesis]) -> Iterator[Step]:
    """The steps of a search's next text; the search runs when its first step is requested."""
    text = next(texts)
    for token in text.tokens:
        yield Step(token, None)
    yield Step(None, text.reason)
