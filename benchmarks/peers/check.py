"""Whether every engine says what transformers says: none may be measured in a broken form.

Random weights cannot show it, their logits are all alike; so every engine continues a text with a *trained* checkpoint.
Rounding moves some tokens, a broken engine moves nearly all.
"""

from collections.abc import Sequence
from pathlib import Path

TEXT = (
    "Once upon a time there was a little girl who lived with her mother near a big forest. One day she wanted to go "
    "outside and play with her dog. Her mother said that she could go, but she had to come back before it was dark. "
    "The girl was happy and ran to the old tree. She looked up and saw a small bird that could not fly. The bird was "
    "sad because it had lost its friends. The girl wanted to help, so she took the bird home and gave it some food."
)
NEW_TOKENS = 8
SHORTEST_TOKENS, STEP_TOKENS = 4, 5
LEAST_AGREEMENT = {32: 1.0, 8: 0.8, 4: 0.6}
"""By bits: the least share of tokens that must agree. A broken engine has about 0."""


def check_prompts(checkpoint: Path) -> list[list[int]]:
    """Beginnings of `TEXT` of many lengths, as the checkpoint's tokenizer reads it."""
    from tokenizers import Tokenizer

    ids: list[int] = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(TEXT).ids
    return [ids[:length] for length in range(SHORTEST_TOKENS, len(ids), STEP_TOKENS)]


def agreement(own: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> float:
    """The share of tokens up to the first difference in each continuation: what comes after one is another text."""
    agreeing = total = 0
    for ids, wanted in zip(own, expected, strict=True):
        total += len(wanted)
        pairs = zip(ids, wanted, strict=True)
        agreeing += next((index for index, (a, b) in enumerate(pairs) if a != b), len(wanted))
    return agreeing / total
