"""Prompt-lookup decoding: what followed the same few tokens before is drafted, and checked in one call of the model.

Source: Saxena, "Prompt Lookup Decoding", 2023 (github.com/apoorvumang/prompt-lookup-decoding), which is speculative
decoding (Leviathan et al., arXiv 2211.17192) with the text itself for a draft model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from edgelm.decoding.logits_processors import Ids, Row
from edgelm.decoding.request import DecodingSession, Step
from edgelm.decoding.row import DecodingRow
from edgelm.engine.call import DraftCost

NGRAM_SIZES = (3, 2)
"""How many last tokens must have appeared before, the longest first."""
MOST_RIGHT_GUESSES = 16

FIRST_CREDIT = 2.0
"""What drafts may lose at first, in steps of one token."""
LOSS_SHARE = 0.01
"""The share of all steps that drafts may lose in the long run, beside the first credit."""
MOST_CREDIT = 4.0
"""How much of what drafts gained may be lost again."""


def decode_with_drafts(session: DecodingSession, text: DecodingRow, logits: Row, most: int) -> Iterator[Step]:
    """Continue `text`, whose prompt the session holds and whose next logits (V,) are given.

    Every token is chosen from the model's logits, with the random number of its place, as without drafts: a drafted
    token counts where the choice falls on it. So the result is that of plain decoding, but for what computing several
    tokens at once changes in the last bits (docs/quality.md).

    Args:
        most: how many tokens to draft at once.
    """
    drafts = PromptLookup(most, session.draft_cost)
    draft: list[int] = []
    rows = logits[None]  # (T, V), of the last token and of the drafted ones after it
    while (reason := text.reason_to_end()) is None:
        if text.new_tokens:
            draft = drafts.draft(text.ids, text.tokens_left - 1)
            last = int(text.ids[-1])
            rows = session.step_all([last, *draft]) if draft else session.step([last])[None]
        accepted, chosen = 0, list[int]()
        for place, row in enumerate(rows):
            step = text.take(row)
            right = place < len(draft) and step.token_id == draft[place]
            accepted += right
            yield replace(step, drafted=0 if place else len(draft), was_drafted=right)
            if step.token_id is None:
                return
            chosen.append(step.token_id)
            if not right:
                break
        session.rewind(len(draft) - accepted)
        drafts.learn(chosen)
    yield Step(None, reason)


class PromptLookup:
    """Drafts of one text, made only while guesses come true and where they can be paid for.

    A guess costs nothing, a draft costs computing. A draft is made after a run of right guesses. That run gets longer
    with each draft of which nothing comes true, up to MOST_RIGHT_GUESSES, and shorter again with one that does. The
    width is doubled when all of a draft came true. An account of steps bounds what is lost: every draft is paid from
    it, every drafted token that comes true and LOSS_SHARE of every token go into it. It counts tokens, not time, so
    that the same request always makes the same drafts.
    """

    def __init__(self, most: int, cost: DraftCost) -> None:
        """Args: the widest draft, and what drafts cost."""
        self._most = most
        self._cost = cost
        self._width = min(2, most)
        self._guess: list[int] = []
        self._drafted = False
        self._right = 0  # guesses in a row
        self._wanted = 1
        self._credit = FIRST_CREDIT  # in steps

    def draft(self, ids: Ids, room: int) -> list[int]:
        """Up to `room` tokens that may follow `ids` (T,), the text so far; none where they are not worth a try."""
        width = min(self._width, room, self._cost.affordable(self._credit)) if self._right >= self._wanted else 0
        self._guess = continuation(ids, max(1, width))
        self._drafted = width > 0 and bool(self._guess)
        return self._guess if self._drafted else []

    def learn(self, chosen: Sequence[int]) -> None:
        """What followed instead, one token at least, up to the first that differs from the draft."""
        self._credit = min(self._credit + LOSS_SHARE * len(chosen), MOST_CREDIT)
        if not self._guess:
            return
        right = sum(guess == token for guess, token in zip(self._guess, chosen, strict=False))
        self._right = self._right + 1 if right else 0
        if not self._drafted:
            return
        self._credit = min(self._credit + right - self._cost.of(len(self._guess)), MOST_CREDIT)
        if right:
            self._wanted = 1
            self._width = min(2 * self._width, self._most) if right == len(self._guess) else right
        else:
            self._wanted = min(2 * self._wanted, MOST_RIGHT_GUESSES)
            self._width = min(2, self._most)


def continuation(ids: Ids, count: int) -> list[int]:
    """What followed the last tokens of `ids` (T,) where they appeared last before, `count` tokens or none.

    A text that repeats itself goes on repeating itself: beyond the end of `ids` comes what has just been drafted.
    """
    if count < 1:
        return []
    for size in NGRAM_SIZES:
        starts = len(ids) - size  # of earlier runs of that size
        if starts < 1:
            continue
        same = ids[:starts] == ids[-size]
        for offset in range(1, size):
            same &= ids[offset : offset + starts] == ids[len(ids) - size + offset]
        found = np.flatnonzero(same)
        if len(found):
            period = starts - int(found[-1])
            return [int(ids[len(ids) - period + place % period]) for place in range(count)]
    return []
