"""The check that no broken engine is measured: its greedy text is compared with that of transformers.

Random weights cannot show it, because their logits are nearly equal. So every engine continues a text with a *trained*
checkpoint. Rounding changes some tokens, and a broken engine changes nearly all.
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
MIN_AGREEMENT = {32: 1.0, 8: 0.8, 4: 0.6}
"""Minimum share of tokens that must agree, by bits. A broken engine has about 0."""


def check_prompts(checkpoint: Path) -> list[list[int]]:
    """Beginnings of `TEXT` with many lengths, as token ids of the checkpoint's tokenizer."""
    from tokenizers import Tokenizer

    ids: list[int] = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(TEXT).ids
    return [ids[:length] for length in range(SHORTEST_TOKENS, len(ids), STEP_TOKENS)]


def agreement(own: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> float:
    """Share of tokens before the first difference of each continuation. Tokens after it belong to another text."""
    agreeing = total = 0
    for ids, expected_ids in zip(own, expected, strict=True):
        total += len(expected_ids)
        pairs = zip(ids, expected_ids, strict=True)
        agreeing += next((index for index, (a, b) in enumerate(pairs) if a != b), len(expected_ids))
    return agreeing / total
