"""How often a small model's guess is the large model's token: by hand, and against draws with shared random numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm_train.run.guesses import guesses_in_windows, guesses_right
from tests.export.checkpoints import Shape, TorchModel, save_checkpoint

pytestmark = pytest.mark.export


def test_by_hand() -> None:
    small = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.9, 0.0]]).log()
    large = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.9, 0.0]]).log()
    greedy, sampled = guesses_right(small, large)
    assert greedy.tolist() == [False, True]
    # The lines are 0-0.5-0.8-1 and 0-0.2-0.7-1: 0.2 of the first token, 0.5 to 0.7 of the second, 0.2 of the third.
    assert sampled.tolist() == pytest.approx([0.2 + 0.2 + 0.2, 1.0], abs=1e-6)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), size=st.integers(2, 30))
def test_as_draws_with_the_same_random_numbers(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(2, size)) * 2
    ends = np.exp(logits).cumsum(axis=1) / np.exp(logits).sum(axis=1, keepdims=True)
    numbers = rng.random(20_000)
    drawn = [np.searchsorted(line, numbers, side="right") for line in ends]
    _, sampled = guesses_right(*torch.from_numpy(logits))
    assert float(sampled) == pytest.approx((drawn[0] == drawn[1]).mean(), abs=0.02)


def test_every_token_of_the_whole_windows_counts(tmp_path: Path) -> None:
    one, other = (
        TorchModel(save_checkpoint(tmp_path / str(seed), Shape(layers=1, vocab=60, context=16, seed=seed)))
        for seed in (0, 1)
    )
    ids = np.random.default_rng(0).integers(0, 60, 5 * 16 + 3, np.int32)
    same = guesses_in_windows(one.model, one.model, ids, 16)
    assert (same.greedy, same.sampled) == pytest.approx((1, 1), abs=1e-5)
    greedy, sampled = [], []
    for window in np.split(ids[:80], 5):
        found = guesses_right(*(torch.from_numpy(model.logits(window)) for model in (one, other)))
        greedy += found[0].tolist()
        sampled += found[1].tolist()
    different = guesses_in_windows(one.model, other.model, ids, 16)
    assert (different.greedy, different.sampled) == pytest.approx((np.mean(greedy), np.mean(sampled)), abs=1e-5)
