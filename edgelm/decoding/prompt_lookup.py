"""Prompt-lookup decoding: the tokens that followed the same few tokens earlier are drafted.

Source: Saxena, "Prompt Lookup Decoding", 2023 (github.com/apoorvumang/prompt-lookup-decoding), which is speculative
decoding with the text itself as the draft model.
"""

from collections.abc import Sequence

import numpy as np

from edgelm.decoding.drafts import DraftAccount
from edgelm.engine.call import DraftCost
from edgelm.ids import IdArray

NGRAM_SIZES = (3, 2)
"""Number of last tokens that must have appeared earlier, the largest first."""
MAX_RIGHT_GUESSES = 16
"""Maximum number of right guesses in a row that a draft is made conditional on."""


class PromptLookup:
    """Drafts for one text, made only while guesses come true and while they can be paid for.

    A guess costs nothing, because it is only compared with the next token; a draft costs computing. A draft is made
    after a run of right guesses. The required length of the run doubles with each draft of which no token comes true,
    up to MAX_RIGHT_GUESSES, and is one again after a draft of which some token does. The width of drafts doubles when
    all of a draft came true, up to `max_width` tokens. An account bounds what the drafts may lose.
    """

    def __init__(self, max_width: int, cost: DraftCost) -> None:
        self._max_width, self._cost = max_width, cost
        self._width = min(2, max_width)
        self._guess: list[int] = []
        self._drafted = False
        self._right_guesses = 0  # in a row
        self._required_guesses = 1
        self._account = DraftAccount()

    def draft(self, ids: IdArray, room: int) -> list[int]:
        """Up to `room` tokens that may follow `ids` (T,), the text so far; empty if a draft is not worth its cost."""
        width = 0
        if self._right_guesses >= self._required_guesses:
            width = min(self._width, room, self._cost.affordable(self._account.credit))
        self._guess = continuation(ids, max(1, width))
        self._drafted = width > 0 and bool(self._guess)
        return self._guess if self._drafted else []

    def learn(self, chosen: Sequence[int]) -> None:
        """Note the tokens that were chosen: at least one, up to the first that differs from the draft."""
        right = sum(guess == token for guess, token in zip(self._guess, chosen, strict=False))
        drafted = self._drafted
        self._account.settle(len(chosen), right if drafted else 0, self._cost.of(len(self._guess)) if drafted else 0)
        if self._guess:
            self._right_guesses = self._right_guesses + 1 if right else 0
        if not drafted:
            return
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
