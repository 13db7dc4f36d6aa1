"""Filters on hand-made vectors, and draws against their distribution."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.errors import DeviceError
from edgelm.generation_config import GenerationConfig
from edgelm.sampling import (
    draw,
    min_p_filter,
    next_token,
    penalize_repetition,
    sampling_logits,
    top_k_filter,
    top_p_filter,
    uniform,
)

Row = npt.NDArray[np.float32]


def row(*values: float) -> Row:
    return np.array(values, np.float32)


def from_probabilities(*values: float) -> Row:
    return np.log(np.array(values, np.float32))


def kept(logits: Row) -> list[int]:
    return np.flatnonzero(np.isfinite(logits)).tolist()


def test_repetition_penalty_divides_positive_and_multiplies_negative() -> None:
    before = row(2, -2, 4)
    after = penalize_repetition(before, np.array([0, 1]), 2.0)
    assert after.tolist() == [1, -4, 4]
    assert before.tolist() == [2, -2, 4]


def test_top_k_keeps_ties() -> None:
    assert kept(top_k_filter(row(1, 3, 2, 3), 1)) == [1, 3]
    assert kept(top_k_filter(row(1, 3, 2, 3), 3)) == [1, 2, 3]
    assert kept(top_k_filter(row(1, 3), 5)) == [0, 1]


def test_top_p_includes_the_token_that_reaches_the_mass() -> None:
    logits = from_probabilities(0.1, 0.5, 0.25, 0.15)
    assert kept(top_p_filter(logits, 0.3)) == [1]
    assert kept(top_p_filter(logits, 0.6)) == [1, 2]
    assert kept(top_p_filter(logits, 0.76)) == [1, 2, 3]
    assert kept(top_p_filter(logits, 1.0)) == [0, 1, 2, 3]
    assert kept(top_p_filter(logits, 1e-9)) == [1]


def test_top_p_on_a_flat_vocabulary_larger_than_its_first_try() -> None:
    assert len(kept(top_p_filter(np.zeros(10_000, np.float32), 0.5))) == 5000


def test_min_p_is_relative_to_the_likeliest() -> None:
    logits = from_probabilities(0.5, 0.3, 0.2)
    assert kept(min_p_filter(logits, 0.5)) == [0, 1]
    assert kept(min_p_filter(logits, 1.0)) == [0]
    assert kept(min_p_filter(logits, 0.0)) == [0, 1, 2]


@given(st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=60), st.floats(0.01, 1), st.integers(1, 70))
def test_filters_always_keep_the_likeliest(values: list[float], p: float, k: int) -> None:
    logits = np.array(values, np.float32)
    best = float(logits.max())
    for filtered in (top_k_filter(logits, k), top_p_filter(logits, p), min_p_filter(logits, p)):
        assert float(filtered.max()) == best
        assert filtered.dtype == np.float32


def test_draw_takes_each_token_for_its_share() -> None:
    logits = from_probabilities(0.25, 0.5, 0.25)
    assert [draw(logits, u) for u in (0.0, 0.2, 0.3, 0.7, 0.8, 0.999999)] == [0, 0, 1, 1, 2, 2]


def test_draw_never_takes_a_masked_token() -> None:
    logits = row(-np.inf, 0, -np.inf, 0, -np.inf)
    assert {draw(logits, u) for u in np.linspace(0, 1, 1001)[:-1]} == {1, 3}


def test_draws_follow_the_distribution() -> None:
    """Chi-square over 20,000 draws, at p > 0.001 for 9 degrees of freedom."""
    config = GenerationConfig(do_sample=True, temperature=0.7, top_k=10)
    logits = sampling_logits(np.random.default_rng(0).normal(size=50).astype(np.float32) * 2, config)
    counts = np.bincount([draw(logits, uniform(1, 0, step)) for step in range(20_000)], minlength=50)
    weights = np.exp(logits.astype(np.float64))
    expected = 20_000 * weights / weights.sum()
    assert counts[expected == 0].sum() == 0
    seen = expected > 0
    chi_square = float(np.sum((counts[seen] - expected[seen]) ** 2 / expected[seen]))
    assert chi_square < 27.88


def test_random_numbers_are_fixed_for_ever() -> None:
    """A seed must mean the same on every machine and in every release: these are Philox 4x64's own numbers."""
    assert [uniform(7, 0, 0), uniform(7, 0, 1), uniform(7, 1, 0), uniform(2**64 - 1, 3, 5)] == pytest.approx(
        FIXED_UNIFORMS, abs=0
    )


FIXED_UNIFORMS = [0.8720734548204873, 0.0828426870273763, 0.8824668302545412, 0.7726108401251883]


@given(st.integers(0, 2**64 - 1), st.integers(0, 1023), st.integers(0, 10**6))
def test_uniform_is_in_range_and_a_function(seed: int, row_: int, step: int) -> None:
    value = uniform(seed, row_, step)
    assert 0 <= value < 1
    assert value == uniform(seed, row_, step)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("config", [GenerationConfig(), GenerationConfig(do_sample=True, top_p=0.9)])
def test_logits_that_are_no_numbers_are_an_error(bad: float, config: GenerationConfig) -> None:
    with pytest.raises(DeviceError, match="NaN or infinite logits"):
        next_token(row(1, bad, 2), [], config, 0, 0, 0)


def test_next_token_greedy_and_penalized() -> None:
    logits = row(1, 3, 2.9)
    assert next_token(logits, [1], GenerationConfig(), 0, 0, 0) == 1
    assert next_token(logits, [1], GenerationConfig(repetition_penalty=1.5), 0, 0, 0) == 2
