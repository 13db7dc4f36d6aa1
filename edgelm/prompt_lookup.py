"""Prompt-lookup decoding: what followed the same few tokens before is drafted, and checked in one call of the model.

Source: Saxena, "Prompt Lookup Decoding", 2023 (github.com/apoorvumang/prompt-lookup-decoding), which is speculative
decoding (Leviathan et al., arXiv 2211.17192) with the text itself for a draft model.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from edgelm.decoding import DecodingSession, Step
from edgelm.decoding_row import DecodingRow
from edgelm.logits_processors import Ids, Row

NGRAM_SIZES = (3, 2)
"""How many last tokens must have appeared before, the longest first."""
MOST_PAUSED_STEPS = 64


def decode_with_drafts(session: DecodingSession, text: DecodingRow, logits: Row, most: int) -> Iterator[Step]:
    """Continue `text`, whose prompt the session holds and whose next logits (V,) are given.

    Every token is chosen from the model's logits, with the random number of its place, as without drafts: a drafted
    token counts where the choice falls on it. So the result is that of plain decoding, but for what computing several
    tokens at once changes in the last bits (docs/quality.md).

    Args:
        most: how many tokens to draft at once.
    """
    drafts = PromptLookup(most)
    draft: list[int] = []
    rows = logits[None]  # (T, V), of the last token and of the drafted ones after it
    while (reason := text.reason_to_end()) is None:
        if text.new_tokens:
            draft = drafts.draft(text.ids, text.tokens_left - 1)
            last = int(text.ids[-1])
            rows = session.step_all([last, *draft]) if draft else session.step([last])[None]
        accepted = 0
        for place, row in enumerate(rows):
            step = text.take(row)
            right = place < len(draft) and step.token_id == draft[place]
            accepted += right
            yield replace(step, drafted=0 if place else len(draft), was_drafted=right)
            if step.finish_reason is not None:
                return
            if not right:
                break
        session.rewind(len(draft) - accepted)
        drafts.learn(len(draft), accepted)
    yield Step(None, reason)


class PromptLookup:
    """Drafts of one text. Their width follows their success: doubled when all of a draft came true, halved when
    nothing did; then drafting pauses, for twice as long after each further failure."""

    def __init__(self, most: int) -> None:
        """Args: the widest draft."""
        self._most = most
        self._width = min(2, most)
        self._pause = 0  # steps without a draft after the next failure
        self._paused = 0

    def draft(self, ids: Ids, room: int) -> list[int]:
        """Up to `room` tokens that may follow `ids` (T,); none where nothing like their end appeared before."""
        if self._paused:
            self._paused -= 1
            return []
        return continuation(ids, min(self._width, room))

    def learn(self, drafted: int, accepted: int) -> None:
        """How many tokens of the last draft came true."""
        if not drafted:
            return
        if accepted:
            self._pause = 0
            self._width = min(2 * self._width, self._most) if accepted == drafted else max(1, accepted)
            return
        self._width = max(1, self._width // 2)
        self._pause = min(2 * self._pause + 1, MOST_PAUSED_STEPS)
        self._paused = self._pause


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
