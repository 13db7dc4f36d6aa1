"""A prompt is a text or a list of token ids; the model gets token ids."""

from collections.abc import Sequence

from edgelm.errors import PromptError
from edgelm.ids import as_ids
from edgelm.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt, name: str = "prompt", *, begins_text: bool = True) -> list[int]:
    """Return the token ids of a prompt: of a text, or of a list of ids after a check.

    Args:
        tokenizer: encodes a text, and bounds the ids of a list by its `vocab_size`.
        prompt: a text or token ids.
        name: what an error message calls the prompt.
        begins_text: whether the model reads nothing before `prompt`. A text then gets the special tokens (BOS) that
            the tokenizer puts in front of a text; a continuation must not get them.

    Raises:
        PromptError: the prompt is empty, is neither a text nor token ids, or holds an unknown id.
    """
    if not isinstance(prompt, str):
        if isinstance(prompt, bytes) or not hasattr(prompt, "__len__"):
            raise PromptError(f"the {name} must be a text or a list of token ids, got {type(prompt).__name__}")
        return [int(i) for i in as_ids(prompt, tokenizer.vocab_size)]
    if not prompt:
        raise PromptError(f"the {name} is empty: give some text")
    ids = tokenizer.encode_prompt(prompt) if begins_text else tokenizer.encode(prompt, add_special_tokens=False)
    if not ids:
        raise PromptError(f"the {name} has no tokens in this model's vocabulary: give some other text")
    return ids
