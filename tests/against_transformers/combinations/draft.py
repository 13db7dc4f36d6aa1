"""A checkpoint in the making: what its files will contain. Oddities change a draft, layouts write it."""

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

Choice = TypeVar("Choice")

GENERATION = "generation_config.json"
TOKENIZER = "tokenizer_config.json"


@dataclass
class Draft:
    """The content of a checkpoint's files, by the name of the file."""

    config: dict[str, Any]
    """Of config.json."""
    weights: dict[str, torch.Tensor]
    json_files: dict[str, Any] = field(default_factory=dict)
    """Objects of other JSON files."""
    other_files: dict[str, bytes] = field(default_factory=dict)
    vocab_size: int = 0
    """The rows of the model's token table."""

    def copy(self) -> "Draft":
        """A draft that can be changed on its own."""
        config, files = json.loads(json.dumps([self.config, self.json_files]))
        return Draft(config, dict(self.weights), files, dict(self.other_files), self.vocab_size)


@dataclass(frozen=True)
class Oddity:
    """One peculiarity of a checkpoint."""

    name: str
    change: Callable[[Draft, random.Random], None]
    only_edgelm: bool = False
    """Whether transformers gets the checkpoint without this oddity, because edgelm loads it and transformers cannot."""
    refused: str | None = None
    """A part of the sentence with which edgelm may refuse it by docs/compatibility.md, whatever transformers does."""


def some(rng: random.Random, choices: Iterable[Choice], low: int, high: int) -> list[Choice]:
    """From `low` to `high` different choices, in an order of their own."""
    listed = list(choices)
    return rng.sample(listed, min(len(listed), rng.randint(low, high)))
