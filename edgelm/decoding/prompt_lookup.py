"""Prompt-lookup decoding: the tokens that followed the same few tokens earlier are drafted, and checked in one call.

Source: Saxena, "Prompt Lookup Decoding", 2023 (github.com/apoorvumang/prompt-lookup-decoding), which is speculative
decoding (Leviathan et al., arXiv 2211.17192) with the text itself as the draft model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from edgelm.decoding.request import DecodingRow, DecodingSession, Step, logits_after
from edgelm.engine.call import DraftCost
from edgelm.ids import IdArray, Logits

NGRAM_SIZES = (3, 2)
"""Number of last tokens that must have appeared earlier, the largest first."""
MAX_RIGHT_GUESSES = 16
"""Maximum number of right guesses in a row that a draft is made conditional on."""

FIRST_CREDIT = 2.0
"""The loss that drafts may make at first, in steps of one token."""
LOSS_SHARE = 0.01
"""The share of all steps that drafts may lose in the long run, beside the first credit."""
MAX_CREDIT = 4.0
"""Maximum loss that drafts may make after they gained, in steps."""


def decode_with_drafts(session: DecodingSession, text: DecodingRow, logits: Logits, max_draft: int) -> Iterator[Step]:
    """Continue `text`, whose prompt the session holds and whose next logits (V,) are given.

    Every token is chosen from the model's logits, with the random number of its place, as without drafts. A drafted
    token counts if the choice falls on it. So the result is that of plain decoding, except that computing several
    tokens at once can change the last bits of the logits (docs/quality.md). At most `max_draft` tokens are drafted at
    once.
    """
    drafts = PromptLookup(max_draft, session.draft_cost)
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
        for index, row in enumerate(rows):
            step = text.take(row)
            right = index < len(draft) and step.token_id == draft[index]
            accepted += right
            yield replace(step, drafted=0 if index else len(draft), was_drafted=right)
            if step.token_id is None:
                return
            chosen.append(step.token_id)
            if not right or text.is_finished:
                break
        session.rewind(len(draft) - accepted)
        computed = len(text.ids) - 1
        if guesses:
            drafts.learn(chosen)
    yield Step(None, reason)


class PromptLookup:
    """Drafts for one text, made only while guesses come true and while they can be paid for.

    A guess costs nothing, because it is only compared with the next token; a draft costs computing. A draft is made
    after a run of right guesses. The required length of the run doubles with each draft of which no token comes true,
    up to MAX_RIGHT_GUESSES, and is one again after a draft of which some token does. The width of drafts doubles when
    all of a draft came true, up to `max_width` tokens. An account of steps bounds the loss: the `cost` of every draft
    is paid from it, and every drafted token that comes true and LOSS_SHARE of every token go into it. The account
    counts tokens, not time, so the same request always makes the same drafts.
    """

    def __init__(self, max_width: int, cost: DraftCost) -> None:
        self._max_width, self._cost = max_width, cost
        self._width = min(2, max_width)
        self._guess: list[int] = []
        self._drafted = False
        self._right_guesses = 0  # in a row
        self._required_guesses = 1
        self._credit = FIRST_CREDIT  # in steps

    def draft(self, ids: IdArray, room: int) -> list[int]:
        """Up to `room` tokens that may follow `ids` (T,), the text so far; empty if a draft is not worth its cost."""
        width = 0
        if self._right_guesses >= self._required_guesses:
            width = min(self._width, room, self._cost.affordable(self._credit))
        self._guess = continuation(ids, max(1, width))
        self._drafted = width > 0 and bool(self._guess)
        return self._guess if self._drafted else []

    def learn(self, chosen: Sequence[int]) -> None:
        """Note the tokens that were chosen: at least one, up to the first that differs from the draft."""
        self._credit = min(self._credit + LOSS_SHARE * len(chosen), MAX_CREDIT)
        if not self._guess:
            return
        right = sum(guess == token for guess, token in zip(self._guess, chosen, strict=False))
        self._right_guesses = self._right_guesses + 1 if right else 0
        if not self._drafted:
            return
        self._credit = min(self._credit + right - self._cost.of(len(self._guess)), MAX_CREDIT)
        if right:
            self._required_guesses = 1
            self._width = min(2 * self._width, self._max_width) if right == len(self._guess) else right
        else:
            self._required_guesses = min(2 * self._required_guesses, MAX_RIGHT_GUESSES)
            self._width = min(2, self._max_width)


def continuation(ids: IdArray, count: int) -> list[int]:
    """The `count` tokens that followed the latest earlier appearance of the last tokens of `ids` (T,), or none.

    A text that repeats itself is expected to continue to do so: where the tokens to copy reach the end of `ids`,
    they continue with the copied ones.
    """
    if count < 1:
        return []
    for size in NGRAM_SIZES:
        starts = len(ids) - size  # number of earlier runs of that size
        if starts < 1:
            continue
        same = ids[:starts] == ids[-size]
        for offset in range(1, size):
            same &= ids[offset : offset + starts] == ids[len(ids) - size + offset]
        matches = np.flatnonzero(same)
        if len(matches):
            period = starts - int(matches[-1])
            return [int(ids[len(ids) - period + index % period]) for index in range(count)]
    return []
