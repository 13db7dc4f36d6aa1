"""Drafted tokens, which the model checks several at a time: one call instead of a step for each.

Source: speculative decoding (Leviathan et al., arXiv 2211.17192). The drafts come from the text itself
(`edgelm.decoding.prompt_lookup`) or from a small model (`edgelm.decoding.draft_model`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from edgelm.decoding.request import DecodingRow, DecodingSession, Step, logits_after
from edgelm.ids import IdArray, Logits

FIRST_CREDIT = 2.0
"""The loss that drafts may make at first, in steps of one token."""
LOSS_SHARE = 0.01
"""The share of all steps that drafts may lose in the long run, beside the first credit."""
MAX_CREDIT = 4.0
"""Maximum loss that drafts may make after they gained, in steps."""


class Drafts(Protocol):
    """Guesses how one text goes on, and learns from what was chosen."""

    def draft(self, ids: IdArray, room: int) -> list[int]:
        """Up to `room` tokens that may follow `ids` (T,), the text so far; empty if a draft is not worth its cost."""

    def learn(self, chosen: Sequence[int]) -> None:
        """Note the tokens that were chosen: at least one, up to the first that differs from the draft."""


class DraftAccount:
    """What drafts gained and lost for one text, in steps of one token. It bounds what they may lose.

    The cost of every draft is paid from the account, and every drafted token that comes true and LOSS_SHARE of every
    token go into it. It counts tokens, not time, so the same request always makes the same drafts.
    """

    def __init__(self) -> None:
        self.credit = FIRST_CREDIT
        """What drafts may cost now, in steps."""

    def settle(self, tokens: int, right: int, cost: float) -> None:
        """Note that `tokens` were chosen, of which a draft that cost `cost` predicted `right`."""
        self.credit = min(self.credit + LOSS_SHARE * tokens, MAX_CREDIT)
        self.credit = min(self.credit + right - cost, MAX_CREDIT)


def decode_with_drafts(session: DecodingSession, text: DecodingRow, logits: Logits, drafts: Drafts) -> Iterator[Step]:
    """Continue `text`, whose prompt the session holds and whose next logits (V,) are given.

    Every token is chosen from the model's logits, with the random number of its place, as without drafts. A drafted
    token counts if the choice falls on it. So the result is that of plain decoding, except that computing several
    tokens at once can change the last bits of the logits (docs/quality.md).
    """
    draft: list[int] = []
    rows = logits[None]  # (T, V), after the last token and after the drafted ones that follow it
    computed = len(text.ids)
    while (reason := text.reason_to_end()) is None:
        if (forced := text.take_forced()) is not None:
            yield forced
            continue
        new, guesses = text.ids[computed:], False
        if len(new) > 1:  # tokens that a constraint forced
            draft, rows = [], logits_after(session, new)[None]
        elif len(new):
            draft, guesses = drafts.draft(text.ids, text.tokens_left - 1), True
            last = int(text.ids[-1])
            rows = session.step_all([last, *draft]) if draft else session.step([last])[None]
        accepted, chosen = 0, list[int]()
        for step in checked_draft(text, rows, draft):
            yield step
            if step.token_id is None:
                return
            accepted += step.was_drafted
            chosen.append(step.token_id)
        session.rewind(len(draft) - accepted)
        computed = len(text.ids) - 1
        if guesses:
            drafts.learn(chosen)
    yield Step(None, reason)


def checked_draft(text: DecodingRow, rows: Logits, draft: Sequence[int]) -> Iterator[Step]:
    """Choose the next tokens of `text`, given the logits `rows` (T, V) after its last token and after those of `draft`.

    The last step is the end of the text, or the first token that the draft did not predict.
    """
    for index, row in enumerate(rows):
        step = text.take(row)
        right = index < len(draft) and step.token_id == draft[index]
        yield replace(step, drafted=0 if index else len(draft), was_drafted=right) if draft else step
        if not right or text.is_finished:
            return
