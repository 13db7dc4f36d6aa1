"""A latent vector in front of a generation: its keys and values, and the token that begins every text behind it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from edgelm.engine.session import Session
from edgelm.ids import KeysValues
from edgelm.text.prompts import Prompt, prompt_ids
from edgelm.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, eq=False)
class LatentPrefix:
    """What a latent vector puts before a text."""

    content: KeysValues
    """(2·layers, H, N, D)"""
    begin_token_id: int

    @property
    def tokens(self) -> int:
        """N: number of positions of the context that it takes."""
        return int(self.content.shape[2])

    def ids(self, tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
        """The ids of a prompt behind the vector: the token before every text, then the prompt, which may be empty.

        A prompt of token ids stays as it is. Raises PromptError as `prompt_ids`.
        """
        if not isinstance(prompt, str):
            return prompt_ids(tokenizer, prompt)
        return [self.begin_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]


class LatentSessions:
    """Lends a scheduler one session, which begins behind the vector that belongs to a prompt's key."""

    def __init__(self, session: Session, prefixes: Mapping[str, LatentPrefix]) -> None:
        self._session, self._prefixes = session, prefixes

    @contextmanager
    def borrowed(self, prompt: Sequence[int], *, key: str) -> Iterator[tuple[Session, int]]:
        """Lend the session behind the vector of `key`, without a token of `prompt`."""
        self._session.begin_after(self._prefixes[key].content)
        yield self._session, 0
