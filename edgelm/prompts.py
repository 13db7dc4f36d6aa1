"""What a caller may give as a text: a str, or token ids."""

from collections.abc import Sequence

from edgelm.errors import PromptError
from edgelm.session import as_ids
from edgelm.tokenizer import Tokenizer

Prompt = str | Sequence[int]


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt, name: str = "prompt") -> list[int]:
    """The token ids of a text, or of a list of them after a check.

    Raises:
        PromptError: it is empty, neither text nor ids, or holds an unknown id; `name` is what it is called.
    """
    if not isinstance(prompt, str):
        if isinstance(prompt, bytes) or not hasattr(prompt, "__len__"):
            raise PromptError(f"the {name} must be a text or a list of token ids, got {type(prompt).__name__}")
        return [int(i) for i in as_ids(prompt, tokenizer.vocab_size)]
    if not prompt:
        raise PromptError(f"the {name} is empty: give some text")
    ids = tokenizer.encode_prompt(prompt)
    if not ids:
        raise PromptError(f"the {name} has no tokens in this model's vocabulary: give some other text")
    return ids
