"""Tokens that only a template may write: what a message says is encoded as text, even where it spells one of them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import islice

from edgelm.errors import PromptError
from edgelm.text.tokenizer import Tokenizer

# Private use, one of which stands for each character of a message that could begin a control token.
_PRIVATE = range(0xF0000, 0xFFFFE)


class ControlTokens:
    """Control tokens of a tokenizer, by their texts."""

    def __init__(self, tokenizer: Tokenizer, tokens: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        ids = {token: tokenizer.token_id(token) for token in tokens if token}
        self._ids = {token: token_id for token, token_id in ids.items() if token_id is not None}

    @property
    def tokens(self) -> Iterable[str]:
        """Their texts."""
        return self._ids

    def encode(self, text: str) -> list[int]:
        """The ids of what a template wrote."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def openings(self, text: str) -> list[str]:
        """Characters of `text` with which a control token begins, as it is or normalized."""
        firsts = self._first_characters
        return sorted(c for c in set(text) if c in firsts or firsts.intersection(self._tokenizer.normalized(c)))

    def are_in(self, text: str) -> bool:
        """Whether a control token is in `text`, as it is or normalized."""
        texts = (text, self._tokenizer.normalized(text))
        return any(token in one for token in self._spellings for one in texts)

    def among(self, ids: Sequence[int], unused: str) -> list[int]:
        """Those of `ids` that are control tokens; without the one for characters that the tokenizer does not know.

        `unused` is a character that the tokenizer hardly knows.
        """
        control = set(self._ids.values()).difference(self.encode(unused))
        return [token_id for token_id in ids if token_id in control]

    def encode_as_text(self, plain: str, openings: Mapping[str, str]) -> list[int]:
        """Encode `plain` with the `openings` that stand in for characters put back, as text.

        Text is cut behind the first character of what would be a control token, so the tokenizer cannot see it. A
        tokenizer that begins each text with a space has one more there.
        """
        text = "".join(openings.get(c, c) for c in plain)
        begins_token = re.compile(f"(?={'|'.join(map(re.escape, self._ids))})")
        cuts = [found.start() + 1 for found in begins_token.finditer(text) if plain[found.start()] in openings]
        pieces = [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        return [token_id for piece in pieces for token_id in self.encode(piece)]

    @cached_property
    def _spellings(self) -> frozenset[str]:
        normalized = {self._tokenizer.normalized(token) for token in self._ids}
        return frozenset(token for token in {*self._ids, *normalized} if token)

    @cached_property
    def _first_characters(self) -> frozenset[str]:
        return frozenset(token[0] for token in self._spellings)


def unused_characters(count: int, text: str) -> list[str]:
    """Characters for private use that are not in `text`. Raises PromptError if there are fewer than `count`."""
    used = set(text)
    found = list(islice((chr(code) for code in _PRIVATE if chr(code) not in used), count))
    if len(found) < count:
        raise PromptError("the messages use all characters for private use: leave some of them out")
    return found
