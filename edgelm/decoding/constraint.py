"""A constraint on a text, as decoding sees it: which token ids may come next. The text behind it is not known here."""

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgelm.decoding.generation_config import GenerationConfig
from edgelm.decoding.logits_processors import MASKED
from edgelm.errors import ConfigError
from edgelm.ids import Logits

Mask = npt.NDArray[np.bool_]

STEERING_OPTIONS = (
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "no_repeat_ngram_size",
    "logit_bias",
    "sequence_bias",
    "logits_processor",
)
"""Options about single tokens: with them, a forced text is spelled by the model, because they may exclude a token."""


class TokenMatcher(Protocol):
    """Follows one text, token by token; `edgelm.text.token_matcher` makes them."""

    @property
    def accepts(self) -> bool:
        """Whether the text may end here."""

    @property
    def is_finished(self) -> bool:
        """Whether the text must end here, because nothing can follow."""

    def mask(self) -> Mask | None:
        """Which tokens may come next, (V,); a token that only ends a text is never among them.

        None once the text may go on and end as it likes. Raises ConfigError if there is no way on, or finding it takes
        too much work.
        """

    def forced(self) -> list[int]:
        """The tokens that spell the only way on, as the tokenizer would; empty where there are several ways."""

    def take(self, token: int) -> None:
        """Append a token that `mask` allows. Raises ConfigError if it does not, or takes too much work."""

    def copy(self) -> "TokenMatcher":
        """A matcher of the same text, which grows by itself."""


class RowConstraint:
    """The constraint of one text: it masks logits, and knows the tokens that need no logits.

    `matcher` is at the text's beginning, and is copied.
    """

    def __init__(self, matcher: TokenMatcher, config: GenerationConfig, *, forces: bool = True) -> None:
        self._matcher = matcher.copy()
        self._ends = np.array(config.eos_token_id, np.int64)
        self._forces = forces and not any(getattr(config, name) for name in STEERING_OPTIONS)
        self._forced = deque[int]()
        self._look_ahead()

    @property
    def is_finished(self) -> bool:
        """Whether the text must end, because it is complete and nothing can follow."""
        return self._matcher.is_finished

    @property
    def forced_token(self) -> int | None:
        """The next token, if it is certain without logits."""
        return self._forced[0] if self._forced else None

    def masked(self, logits: Logits, *, may_rule_out_all: bool = False) -> Logits:
        """Processed logits (V,) with -inf for all tokens that may not come next.

        Raises ConfigError if no token is left, unless `may_rule_out_all`.
        """
        allowed = self._matcher.mask()
        if allowed is None:
            return logits
        allowed[self._ends] = self._matcher.accepts
        result: Logits = np.where(allowed, logits, MASKED)
        if not may_rule_out_all and result.max() == MASKED:
            raise ConfigError(
                "no token is left to choose: other options, such as bad_words_ids, suppress_tokens or min_new_tokens, "
                "rule out every token that the constraint (or token_healing) allows here"
            )
        return result

    def take(self, token: int) -> None:
        """Append a token that does not end the text."""
        self._matcher.take(token)
        if self._forced:
            self._forced.popleft()
        if not self._forced:
            self._look_ahead()

    def copy(self) -> "RowConstraint":
        """The same text, which grows by itself."""
        other = object.__new__(RowConstraint)
        other._matcher, other._ends = self._matcher.copy(), self._ends
        other._forces, other._forced = self._forces, deque(self._forced)
        return other

    def _look_ahead(self) -> None:
        if self._forces and not self._matcher.is_finished:
            self._forced.extend(self._matcher.forced())


class BeamConstraints:
    """The constraints of the beams of a search, by their new tokens. Beams take no forced tokens: all are compared."""

    def __init__(self, matcher: TokenMatcher, config: GenerationConfig) -> None:
        self._known: dict[tuple[int, ...], RowConstraint] = {(): RowConstraint(matcher, config, forces=False)}

    def of(self, new_tokens: Sequence[int]) -> RowConstraint | None:
        """The constraint of a beam; None if the beam has ended, or was never allowed to come so far."""
        known = self._known.get(tuple(new_tokens))
        return None if known is None or known.is_finished else known

    def is_finished(self, new_tokens: Sequence[int], token: int) -> bool:
        """Whether a beam must end with `token`, which is allowed and does not itself end the text."""
        parent = self.of(new_tokens)
        if parent is None:
            return False
        text = parent.copy()
        text.take(token)
        self._known[*new_tokens, token] = text
        return text.is_finished

    def forget_shorter(self, length: int) -> None:
        """Forget beams with fewer tokens."""
        self._known = {key: known for key, known in self._known.items() if len(key) >= length}
