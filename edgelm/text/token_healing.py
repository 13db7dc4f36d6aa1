"""Token healing: the end of a prompt is taken back, and the new text begins by spelling it again.

A prompt may end where a model's text would not have a border between two tokens: "http:" ends inside "://". The model
has hardly seen what follows such a border. So the last tokens are taken back, and only tokens that spell the same text,
or go on with it, may be chosen until it is complete. Source: guidance (github.com/guidance-ai/guidance); transformers
has an option of this name, and docs/generation.md says how it differs.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgelm.errors import ConfigError, TokenizerError
from edgelm.text.tokenizer import Tokenizer

Ids = npt.NDArray[np.int64]


class TextTakenBack:
    """A `TokenMatcher` of `edgelm.decoding.constraint`: a text begins with some bytes, and then goes on freely."""

    def __init__(self, ways: Sequence[tuple[Ids, Ids]], vocab_size: int, place: int = 0) -> None:
        """Begin a text.

        Args:
            ways: for each place in the bytes, the tokens (N,) that may come there, and how many bytes each spells.
            vocab_size: V.
            place: how many bytes are spelled.
        """
        self._ways, self._vocab_size, self._place = ways, vocab_size, place

    @property
    def accepts(self) -> bool:
        """Whether the bytes are spelled, so that the text may end."""
        return self._place >= len(self._ways)

    @property
    def is_finished(self) -> bool:
        """False: anything may follow."""
        return False

    def mask(self) -> npt.NDArray[np.bool_] | None:
        """Which tokens may come next, (V,); None once all may."""
        if self.accepts:
            return None
        allowed = np.zeros(self._vocab_size, np.bool_)
        allowed[self._ways[self._place][0]] = True
        return allowed

    def forced(self) -> list[int]:
        """No tokens: the model chooses all of them."""
        return []

    def take(self, token: int) -> None:
        """Append a token that `mask` allows."""
        if not self.accepts:
            ids, lengths = self._ways[self._place]
            self._place += int(lengths[np.flatnonzero(ids == token)[0]])

    def copy(self) -> "TextTakenBack":
        """A matcher of the same text, which grows by itself."""
        return TextTakenBack(self._ways, self._vocab_size, self._place)


@dataclass(frozen=True, slots=True)
class HealedPrompt:
    """A prompt without its end."""

    ids: list[int]
    """The tokens that are left, at least one."""
    matcher: TextTakenBack | None
    """What new text must begin with; None if nothing was taken back."""
    characters: int
    """Length of the text that was taken back."""


class TokenHealer:
    """Takes back the ends of prompts of one tokenizer. Several threads may call it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Read the vocabulary. Raises ConfigError if token healing does not know this kind of tokenizer."""
        try:
            self._spellings = tokenizer.spellings()
        except TokenizerError as error:
            raise ConfigError(f"token_healing does not work with this model: {error}") from None
        self._tokenizer = tokenizer
        self._longest = max(map(len, self._spellings), default=0)
        order = sorted((spelling, token) for token, spelling in enumerate(self._spellings) if spelling)
        self._sorted = [spelling for spelling, _ in order]
        self._ids = np.array([token for _, token in order], np.int64)

    def heal(self, ids: list[int], fixed: int, empty: Sequence[int]) -> HealedPrompt:
        """Take back the fewest tokens that cover every ending of the prompt with which a longer token begins.

        Args:
            ids: the prompt's tokens, at least one.
            fixed: how many of them stay in any case: those of a prefix.
            empty: the tokens of an empty prompt, for a prompt that is taken back as a whole; if there are none, the
                first token stays.
        """
        special = (place for place in range(len(ids) - 1, fixed - 1, -1) if not self._spellings[ids[place]])
        fixed = next(special, fixed - 1) + 1  # texts spell no special tokens
        if fixed == 0 and not empty:
            fixed = 1
        count = self._tokens_to_take(ids[fixed:])
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        while 0 < count <= len(ids) - fixed:
            kept = ids[: len(ids) - count] or list(empty)
            before = self._tokenizer.decode(kept, skip_special_tokens=True)
            if text.startswith(before):
                taken = b"".join(self._spellings[token] for token in ids[len(ids) - count :])
                matcher = TextTakenBack(self._ways(taken), self._tokenizer.vocab_size)
                return HealedPrompt(kept, matcher, len(text) - len(before))
            count += 1  # the border is inside a character
        return HealedPrompt(ids, None, 0)

    def _tokens_to_take(self, ids: Sequence[int]) -> int:
        lengths = np.cumsum([len(self._spellings[token]) for token in reversed(ids)])
        count = int(np.searchsorted(lengths, self._longest)) + 1
        ending = b"".join(self._spellings[token] for token in ids[-count:])
        for start in range(max(0, len(ending) - self._longest + 1), len(ending)):
            if len(self._longer(ending[start:])):
                return int(np.searchsorted(lengths, len(ending) - start)) + 1
        return 0

    def _ways(self, text: bytes) -> list[tuple[Ids, Ids]]:
        """For each place in `text`, the tokens that spell a part of it from there on, or all of it and more.

        A token after which no token could come is left out.
        """
        ways: list[tuple[Ids, Ids]] = []
        for start in range(len(text) - 1, -1, -1):
            rest = text[start:]
            longer = self._longer(rest)
            found, lengths = [longer], [np.full(len(longer), len(rest))]
            for end in range(1, min(len(rest), self._longest) + 1):
                if end == len(rest) or len(ways[len(rest) - end - 1][0]):
                    equal = self._equal(rest[:end])
                    found.append(equal)
                    lengths.append(np.full(len(equal), end))
            ways.append((np.concatenate(found), np.concatenate(lengths)))
        return ways[::-1]

    def _equal(self, spelling: bytes) -> Ids:
        """The tokens that spell exactly this."""
        return self._ids[bisect_left(self._sorted, spelling) : bisect_left(self._sorted, spelling + b"\0")]

    def _longer(self, beginning: bytes) -> Ids:
        """The tokens that begin with these bytes, and are longer."""
        after = bytearray(beginning)  # the first bytes that are greater than all that begin so
        while after and after[-1] == 255:
            after.pop()
        if after:
            after[-1] += 1
        end = bisect_left(self._sorted, bytes(after)) if after else len(self._sorted)
        return self._ids[bisect_left(self._sorted, beginning + b"\0") : end]
