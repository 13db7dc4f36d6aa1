"""Drafts of a small model with the same vocabulary: it guesses a few tokens, and the large model checks them at once.

Source: speculative decoding (Leviathan et al., arXiv 2211.17192). There a random number decides whether a drafted token
counts. Here both models choose with the random number of the token's place, and the draft counts where they agree, so
the text is that of the large model alone.
"""

from collections.abc import Callable, Sequence

import numpy as np

from edgelm.decoding.drafts import DraftAccount
from edgelm.decoding.logits_processors import MASKED
from edgelm.decoding.request import DecodingSession
from edgelm.engine.call import DraftCost
from edgelm.ids import IdArray, Logits, common_prefix

MAX_DRAFT = 8
"""The most tokens of a draft."""
LEAST_READ = 16
"""The small model reads at least this many of a text's last tokens, or the whole text if it is shorter."""
_MOST_TRUST = 2.0
_FEW_TOKENS = MAX_DRAFT + 1
"""The largest number of tokens in a call whose buffers are kept."""
_FURTHER_TOKEN, _TOKEN_OF_MANY = 0.3, 0.12
"""What each further token of a call costs, in steps of the same model: among the first _FEW_TOKENS, and after them."""


def _reading_steps(tokens: int) -> float:
    """What a call of `tokens` tokens costs, in steps of the same model."""
    few = min(tokens, _FEW_TOKENS)
    return 1 + _FURTHER_TOKEN * (few - 1) + _TOKEN_OF_MANY * (tokens - few)


def _readable(steps: float) -> int:
    """How many tokens can be read for `steps` steps."""
    few = min(_FEW_TOKENS, 1 + int((steps - 1) / _FURTHER_TOKEN))
    return few + max(0, int((steps - _reading_steps(_FEW_TOKENS)) / _TOKEN_OF_MANY))


class DraftModel:
    """The small model's session, which follows the texts that the large model writes.

    It reads no more of a text than the last tokens that a draft can pay for: a long prompt is not read twice, and a
    text may be longer than the small model's context.

    Args:
        session: of the small model. It holds no tokens.
        step_cost: of a step of the small model, in steps of the large one.
        vocab_size: V of the large model. Models with one tokenizer may pad their tables to different sizes.
    """

    def __init__(self, session: DecodingSession, step_cost: float, vocab_size: int) -> None:
        self._session, self.step_cost, self._vocab_size = session, step_cost, vocab_size
        self._start = 0  # of what is read, in the text
        self._held: IdArray = np.empty(0, np.int64)  # what the session holds of the text, from `_start` on

    def follow(self, ids: IdArray, credit: float) -> float:
        """What `logits` behind `ids` (T,) will cost, in steps of the large model.

        If `credit` steps do not pay for all that the small model has not read, it begins anew with as many of the last
        tokens as they pay for, unless these are too few. The cost is infinite if nothing else is possible.
        """
        kept = self._kept(ids)
        cost = self.step_cost * _reading_steps(len(ids) - self._start - kept) if kept and self.room(ids) else np.inf
        if cost <= credit:
            return cost
        tokens = min(len(ids), max(1, self._session.context_length // 2), _readable(credit / self.step_cost))
        if tokens < min(len(ids), LEAST_READ):
            return cost
        self._session.rewind(len(self._held))
        self._start, self._held = len(ids) - tokens, ids[:0]
        return self.step_cost * _reading_steps(tokens)

    def room(self, ids: IdArray) -> int:
        """How many tokens the small model can guess behind `ids` (T,) in its context; 0 if it lacks one of them."""
        read = ids[self._start :]
        known = len(read) and int(read.max()) < self._session.vocab_size
        return max(0, self._session.context_length + 1 - len(read)) if known else 0

    def logits(self, ids: IdArray) -> Logits:
        """The small model's logits (V,) behind `ids` (T,), which it follows; it computes what it does not hold."""
        kept = self._kept(ids)
        self._session.rewind(len(self._held) - kept)
        read = ids[self._start :]
        self._held, new = read[:kept], read[kept:]
        logits = self._session.step_all(new)[-1] if len(new) <= _FEW_TOKENS else self._session.step(new)
        self._held = read  # a text only grows, so its first tokens stay as they are
        missing = max(0, self._vocab_size - len(logits))
        if missing:
            logits = np.pad(logits, (0, missing), constant_values=MASKED)
        return logits[: self._vocab_size]

    def _kept(self, ids: IdArray) -> int:
        """How many tokens of `ids` the session holds and keeps; the last one is always computed."""
        return max(0, min(common_prefix(self._held, ids[self._start :]), len(ids) - self._start - 1))


class ModelDrafts:
    """Drafts of one text by a small model, as long as they are worth their cost.

    The small model's own probabilities tell how likely a draft comes true up to each token. A token is drafted while
    that is more than it costs to guess and check. How much these probabilities are trusted follows from the drafts so
    far: what came true, divided by what they promised. An account bounds what the drafts may lose.
    """

    def __init__(self, model: DraftModel, guess: Callable[[IdArray, Logits], int], check_cost: DraftCost) -> None:
        """Draft for a text of which `guess` chooses the next token; checking costs the large model `check_cost`."""
        self._model, self._guess, self._check_cost = model, guess, check_cost
        self._account = DraftAccount()
        self._draft: list[int] = []
        self._cost = self._promised = 0.0  # of the last draft
        self._sums = [1.0, 1.0]  # what came true, and what was promised

    @property
    def _trust(self) -> float:
        came_true, promised = self._sums
        return min(came_true / promised, _MOST_TRUST)

    def draft(self, ids: IdArray, room: int) -> list[int]:
        """Up to `room` tokens that may follow `ids` (T,), the text so far; empty if a draft is not worth its cost."""
        self._draft, self._cost, self._promised = [], 0.0, 0.0
        token_cost = self._check_cost.token + self._model.step_cost
        if room < 1 or self._account.credit < self._check_cost.call + token_cost:
            return []
        first_cost = self._model.follow(ids, self._account.credit / 2)  # the other half is left for drafts
        credit = self._account.credit - first_cost + self._model.step_cost
        if credit < 0:
            return []
        width = min(MAX_DRAFT, room, self._model.room(ids))
        width = min(width, DraftCost(self._check_cost.call, token_cost).affordable(credit))
        text, likely, promised = ids, 1.0, 0.0
        while len(self._draft) < width:
            self._cost += self._model.step_cost if self._draft else first_cost
            logits = self._model.logits(text)
            token = self._guess(text, logits)
            likely *= _probability(logits, token)
            if min(1.0, likely * self._trust) < token_cost:
                break
            promised += likely
            self._draft.append(token)
            text = np.append(text, token)
        if promised * self._trust <= self._check_cost.of(len(self._draft)):
            self._draft = []  # the call that checks it would cost more than it saves
        if self._draft:
            self._cost += self._check_cost.of(len(self._draft))
            self._promised = promised
        return self._draft

    def learn(self, chosen: Sequence[int]) -> None:
        """Note the tokens that were chosen: at least one, up to the first that differs from the draft."""
        right = sum(guess == token for guess, token in zip(self._draft, chosen, strict=False))
        self._account.settle(len(chosen), right, self._cost)
        if self._draft:
            self._sums = [self._sums[0] + right, self._sums[1] + self._promised]


def _probability(logits: Logits, token: int) -> float:
    """The probability of `token` under softmax(`logits`), (V,)."""
    largest = logits.max()
    return float(np.exp(logits[token] - largest) / np.exp(logits - largest).sum())
