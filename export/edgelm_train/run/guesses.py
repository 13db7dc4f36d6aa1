"""How often the token that a small model guesses is the one that a large model chooses, on held-out text."""

from dataclasses import dataclass
from typing import Any

import torch

from edgelm_train.data.packing import Ids
from edgelm_train.run.held_out import measuring, whole_windows


@dataclass(frozen=True)
class GuessesRight:
    """The share of a small model's guesses that a large model makes true, as drafts count it (docs/batches.md)."""

    greedy: float
    sampled: float
    """At temperature 1. Both models choose with the same random number."""


def guesses_in_windows(small: Any, large: Any, ids: Ids, window: int) -> GuessesRight:
    """Measure `small` against `large` on the whole windows of a packed stream.

    `ids` (T,) fills at least one window of `window` tokens. A guess follows every token.
    """
    right, tokens = torch.zeros(2, dtype=torch.float64), 0
    with measuring(small), measuring(large):
        for batch in whole_windows(ids, window, small.device):
            logits = [model(input_ids=batch.to(model.device)).logits.float() for model in (small, large)]  # (B, T, V)
            right += torch.stack([guessed.sum().double().cpu() for guessed in guesses_right(*logits)])
            tokens += batch.numel()
    greedy, sampled = (right / tokens).tolist()
    return GuessesRight(greedy, sampled)


def guesses_right(small: torch.Tensor, large: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether the likeliest tokens are the same, and how likely the chosen tokens are the same, at each position.

    A random number u chooses the token at which the running sum of the probabilities passes u. So two models choose the
    same token where its two pieces of the line from 0 to 1 overlap.

    Args:
        small: logits (..., V).
        large: logits (..., V).

    Returns:
        A bool and a probability for each position, both (...).
    """
    p, q = small.softmax(dim=-1), large.softmax(dim=-1)
    p_ends, q_ends = p.cumsum(dim=-1), q.cumsum(dim=-1)
    overlaps = torch.minimum(p_ends, q_ends) - torch.maximum(p_ends - p, q_ends - q)
    return small.argmax(dim=-1) == large.argmax(dim=-1), overlaps.clamp_min(0).sum(dim=-1)
