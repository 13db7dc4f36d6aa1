"""Data augmentation: examples with slightly changed inputs beside the examples themselves.

The two operations are those of EDA (Wei and Zou 2019, arXiv 1901.11196) that need no list of synonyms. Answers are
never changed.
"""

import random
from typing import Literal

Augmentation = Literal["swap", "drop"]
"""Exchange two words, once for every ten words of a text; or leave each word out with the probability 0.1."""

_SHARE = 0.1


def augmented(text: str, how: Augmentation, seed: str) -> str:
    """`text` with some words exchanged or left out, line by line; equal arguments give equal texts."""
    numbers = random.Random(seed)
    change = _swapped if how == "swap" else _dropped
    return "\n".join(" ".join(change(line.split(), numbers)) for line in text.split("\n"))


def _swapped(words: list[str], numbers: random.Random) -> list[str]:
    words = list(words)
    for _ in range(max(1, int(_SHARE * len(words))) if len(words) > 1 else 0):
        first, second = numbers.sample(range(len(words)), 2)
        words[first], words[second] = words[second], words[first]
    return words


def _dropped(words: list[str], numbers: random.Random) -> list[str]:
    kept = [word for word in words if numbers.random() >= _SHARE]
    return kept or ([numbers.choice(words)] if words else [])
