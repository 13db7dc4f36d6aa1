"""What a caller may give as a text, a str or token ids, and the tokens it becomes behind a prefix's text."""

from collections.abc import Sequence

from edgelm.engine.session import Session
from edgelm.ids import LEAST_TOKENS, common_prefix
from edgelm.reuse.prefix import Prefix
from edgelm.text.prompts import Prompt, prompt_ids
from edgelm.text.tokenizer import Tokenizer


class PromptEncoder:
    """Token ids of prompts. Where the prefix is a text, a prompt is tokenized as the one text they make together, and
    its ids begin with the prefix's. A learned prefix has no ids: sessions begin behind it by themselves."""

    def __init__(self, tokenizer: Tokenizer, prefix: Prefix | None = None) -> None:
        self.tokenizer = tokenizer
        self._prefix = prefix if prefix is not None and prefix.text is not None else None
        self.learned_tokens = 0 if prefix is None or prefix.text is not None else prefix.tokens
        """How many virtual tokens stand before every prompt, in no list of ids."""

    def ids(self, prompt: Prompt, name: str = "prompt") -> list[int]:
        """The token ids of a text, or of a list of them after a check, behind the prefix's.

        Raises:
            PromptError: it is empty, neither text nor ids, or holds an unknown id; `name` is what it is called.
        """
        alone = prompt_ids(self.tokenizer, prompt, name)
        if self._prefix is None:
            return alone
        if isinstance(prompt, str):
            return self.tokenizer.encode_prompt(f"{self._prefix.text}{prompt}")
        return [*self._prefix.ids, *alone]

    def prefix_tokens(self, ids: Sequence[int]) -> int:
        """How many of `ids` are the prefix's; one at least is not."""
        if self._prefix is None:
            return 0
        return min(common_prefix(self._prefix.ids, ids), len(ids) - 1)

    def begin(self, session: Session, ids: list[int], least_left: int = LEAST_TOKENS) -> list[int]:
        """Have `session` begin behind as much of the prefix's text as `ids` do; returns the ids that are left.

        Args:
            least_left: how many ids are left at least.
        """
        if self._prefix is None:
            session.reset()
            return ids
        count = min(common_prefix(self._prefix.ids, ids), len(ids) - least_left)
        if count < LEAST_TOKENS:
            session.begin_after(None)
            return ids
        session.begin_after(self._prefix.content[:, :, :count])
        return ids[count:]
