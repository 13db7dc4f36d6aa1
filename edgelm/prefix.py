"""How much of a prompt is there already."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

LEAST_TOKENS = 2
"""One token alone has another kernel, which differs in the last bits: a prompt is cut into pieces of two and more."""


Ids = Sequence[int] | npt.NDArray[np.integer[Any]]


def common_prefix(first: Ids, second: Ids) -> int:
    """How many tokens two texts begin with alike."""
    most = min(len(first), len(second))
    differing = np.flatnonzero(np.asarray(first[:most]) != np.asarray(second[:most]))
    return int(differing[0]) if len(differing) else most


def shared_tokens(held: Ids, prompt: Ids) -> int:
    """How many tokens of `prompt` need not be computed, where `held` begins like it.

    The last two always are: their logits are wanted. What was computed from a prompt of one token is never used.
    """
    most = min(len(held), len(prompt) - LEAST_TOKENS)
    if most < LEAST_TOKENS:
        return 0
    same = common_prefix(held[:most], prompt[:most])
    return same if same >= LEAST_TOKENS else 0
