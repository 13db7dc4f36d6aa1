"""Filters on hand-made vectors, and draws against their distribution."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.decoding.generation_config import GenerationConfig
from edgelm.decoding.sampling import (
    Filter,
    TokenChoice,
    beam_uniforms,
    candidates,
    draw,
    draw_without_replacement,
    epsilon_filter,
    eta_filter,
    exclude_top_choices,
    filters_of,
    kth_largest,
    largest,
    min_p_filter,
    mirostat_filter,
    top_k_filter,
    top_n_sigma_filter,
    top_p_filter,
    typical_filter,
    uniform,
)
from edgelm.ids import Logits

V = 50_257


def row(*values: float) -> Logits:
    return np.array(values, np.float32)


def from_probabilities(*values: float) -> Logits:
    return np.log(np.array(values, np.float32))


def softmax(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    weights = np.exp(logits.astype(np.float64) - float(logits.max()))
    result: npt.NDArray[np.float64] = weights / weights.sum()
    return result


def test_top_k_keeps_ties() -> None:
    assert top_k_filter(row(1, 3, 2, 3), 1).tolist() == [1, 3]
    assert top_k_filter(row(1, 3, 2, 3), 3).tolist() == [1, 2, 3]
    assert top_k_filter(row(1, 3), 5).tolist() == [0, 1]


def test_top_p_includes_the_token_that_reaches_the_mass() -> None:
    logits = from_probabilities(0.1, 0.5, 0.25, 0.15)
    for p, kept in [(0.3, [1]), (0.6, [1, 2]), (0.76, [1, 2, 3]), (1.0, [0, 1, 2, 3]), (1e-9, [1])]:
        assert top_p_filter(logits, p).tolist() == kept


@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 4.0])
@pytest.mark.parametrize("p", [0.001, 0.5, 0.95, 0.999999])
def test_top_p_equals_a_whole_sort(spread: float, p: float) -> None:
    logits = (np.random.default_rng(0).normal(size=V) * spread).astype(np.float32)
    weights = softmax(logits)
    order = np.argsort(-logits, kind="stable")
    expected = order[: int(np.searchsorted(np.cumsum(weights[order]), p)) + 1]
    kept = top_p_filter(logits, p)
    assert abs(len(kept) - len(expected)) <= max(1, len(expected) * 1e-4)
    assert abs(weights[kept].sum() - weights[expected].sum()) <= 1e-6


def test_min_p_is_relative_to_the_likeliest() -> None:
    logits = from_probabilities(0.5, 0.3, 0.2)
    assert min_p_filter(logits, 0.5).tolist() == [0, 1]
    assert min_p_filter(logits, 1.0).tolist() == [0]


def test_epsilon_and_eta_cut_by_probability() -> None:
    logits = from_probabilities(0.6, 0.3, 0.09, 0.01)
    assert epsilon_filter(logits, 0.05).tolist() == [0, 1, 2]
    assert epsilon_filter(logits, 0.9).tolist() == [0]
    assert eta_filter(logits, 0.05).tolist() == [0, 1, 2]  # sqrt(0.05) · exp(-0.92) = 0.089


def test_typical_prefers_the_expected_surprise() -> None:
    logits = from_probabilities(0.7, 0.1, 0.1, 0.1)  # entropy 0.94 nats: nearer to -log 0.7 = 0.36 than to 2.3
    assert typical_filter(logits, 0.5).tolist() == [0]
    assert typical_filter(logits, 0.75).tolist() == [0, 1]
    logits = from_probabilities(0.5, *[0.05] * 10)  # entropy 1.84: -log 0.05 = 3.0, -log 0.5 = 0.69
    assert typical_filter(logits, 0.4).tolist() == [0]


def test_top_n_sigma_counts_deviations_from_the_largest() -> None:
    logits = row(10, 9, 0, 0, 0, 0, 0, 0, 0, 0)  # deviation 3.8
    assert top_n_sigma_filter(logits, 1.0).tolist() == [0, 1]
    assert top_n_sigma_filter(logits, 3.0).tolist() == list(range(10))
    assert top_n_sigma_filter(row(1, 0.999, -np.inf), 0.5).tolist() == [0]


def test_xtc_leaves_the_least_likely_of_the_likely() -> None:
    logits = from_probabilities(0.4, 0.3, 0.2, 0.06, 0.04)
    assert np.flatnonzero(np.isfinite(exclude_top_choices(logits, 0.1))).tolist() == [2, 3, 4]
    assert np.isfinite(exclude_top_choices(logits, 0.35)).all()


def test_mirostat_cuts_by_surprise_in_bits() -> None:
    logits = from_probabilities(0.5, 0.25, 0.125, 0.125)
    assert mirostat_filter(logits, 1.01).tolist() == [0]
    assert mirostat_filter(logits, 2.9).tolist() == [0, 1]  # a surprise of 2.9 nats would be all four
    assert mirostat_filter(logits, 3.01).tolist() == [0, 1, 2, 3]
    assert mirostat_filter(logits, -5.0).tolist() == [0]


def test_mirostat_aims_at_its_surprise() -> None:
    logits = (np.random.default_rng(0).normal(size=2000) * 2).astype(np.float32)
    means = []
    for tau in (2.0, 4.0, 6.0):
        choose = TokenChoice(GenerationConfig(do_sample=True, mirostat_tau=tau), 1, 0)
        bits = -np.log2(softmax(logits)[[choose(logits, step) for step in range(600)]])
        means.append(bits[100:].mean())
    assert means == sorted(means)
    assert means[2] - means[0] > 1


@pytest.mark.parametrize(
    ("option", "keep"),
    [
        ({"top_n_sigma": 0.5}, lambda x: top_n_sigma_filter(x, 0.5)),
        ({"top_k": 7}, lambda x: top_k_filter(x, 7)),
        ({"top_p": 0.5}, lambda x: top_p_filter(x, 0.5)),
        ({"min_p": 0.1}, lambda x: min_p_filter(x, 0.1)),
        ({"typical_p": 0.4}, lambda x: typical_filter(x, 0.4)),
        ({"epsilon_cutoff": 0.02}, lambda x: epsilon_filter(x, 0.02)),
        ({"eta_cutoff": 0.02}, lambda x: eta_filter(x, 0.02)),
    ],
)
def test_every_option_has_its_filter(option: dict[str, Any], keep: Filter) -> None:
    logits = (np.random.default_rng(3).normal(size=50) * 2).astype(np.float32)
    tokens, left = candidates(logits, 1.0, filters_of(GenerationConfig().updated(option)))
    expected = keep(logits)
    assert 1 <= len(expected) < 50
    assert tokens is not None and np.array_equal(tokens, expected) and np.array_equal(left, logits[expected])


def test_mirostat_is_its_definition() -> None:
    """Algorithm of mirostat 2 (Basu et al., arXiv 2007.14966): the surprise allowed, in bits, follows the surprises."""
    logits = (np.random.default_rng(0).normal(size=300) * 2).astype(np.float32)
    tau, eta, allowed_bits = 3.0, 0.25, 6.0
    choose = TokenChoice(GenerationConfig(do_sample=True, mirostat_tau=tau, mirostat_eta=eta), 7, 0)
    chosen = []
    for step in range(100):
        bits = -np.log2(softmax(logits))
        kept = np.flatnonzero(bits <= max(allowed_bits, bits.min()))
        place = draw(logits[kept], uniform(7, 0, step))
        allowed_bits -= eta * (-np.log2(softmax(logits[kept])[place]) - tau)
        chosen.append((choose(logits, step), kept[place]))
    assert [ours for ours, _ in chosen] == [expected for _, expected in chosen]


ALL_FILTERS: list[Filter] = [
    lambda x: top_k_filter(x, 3),
    lambda x: top_p_filter(x, 0.5),
    lambda x: min_p_filter(x, 0.3),
    lambda x: epsilon_filter(x, 0.3),
    lambda x: eta_filter(x, 0.3),
    lambda x: top_n_sigma_filter(x, 0.5),
    lambda x: mirostat_filter(x, 1.0),
]


@given(
    st.lists(st.floats(-30, 30, width=32) | st.just(-np.inf), min_size=1, max_size=60).filter(lambda v: max(v) > -30)
)
def test_filters_keep_the_likeliest_and_nothing_masked(values: list[float]) -> None:
    logits = np.array(values, np.float32)
    for keep in ALL_FILTERS:
        kept = keep(logits)
        assert logits[kept].max() == logits.max()
        assert kept.tolist() == sorted(set(kept.tolist()))
    for kept in (top_p_filter(logits, 0.5), epsilon_filter(logits, 0.3), typical_filter(logits, 0.5)):
        assert np.isfinite(logits[kept]).all()


@given(st.integers(1, 400), st.integers(0, 2**32 - 1), st.integers(1, 500))
def test_kth_largest_and_largest(size: int, seed: int, k: int) -> None:
    values = np.random.default_rng(seed).integers(-9, 9, size * 17).astype(np.float32)
    k = min(k, len(values))
    assert kth_largest(values, k) == np.sort(values)[-k]
    assert largest(values, k).tolist() == np.argsort(-values, kind="stable")[:k].tolist()


@pytest.mark.parametrize("at_least", [1, 2, 3])
def test_beams_need_more_than_one_token(at_least: int) -> None:
    logits = from_probabilities(0.9, 0.05, 0.03, 0.02)
    config = GenerationConfig().updated(
        {"top_k": 1, "top_p": 0.1, "min_p": 0.9, "typical_p": 0.1, "epsilon_cutoff": 0.5, "eta_cutoff": 0.5}
    )
    tokens, _ = candidates(logits, 1.0, filters_of(config, at_least))
    assert tokens is not None and tokens.tolist() == list(range(at_least))


def test_draw_takes_each_token_for_its_share() -> None:
    logits = from_probabilities(0.25, 0.5, 0.25)
    assert [draw(logits, u) for u in (0.0, 0.2, 0.3, 0.7, 0.8, 0.999999)] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    "pattern", [[-np.inf, 0, -np.inf, 0, -np.inf], [-np.inf] * 9000 + [0, -np.inf, 0] + [-np.inf] * 500]
)
def test_draw_never_takes_a_masked_token(pattern: list[float]) -> None:
    logits = row(*pattern)
    allowed = np.flatnonzero(np.isfinite(logits)).tolist()
    ends = [0.0, np.nextafter(0.5, 0), 0.5, np.nextafter(1, 0)]
    assert {draw(logits, float(u)) for u in [*np.linspace(0, 1, 101)[:-1], *ends]} == set(allowed)


def test_drawing_from_blocks_equals_drawing_from_the_whole() -> None:
    logits = np.random.default_rng(0).normal(size=V).astype(np.float32)
    ends = np.cumsum(softmax(logits))
    for u in np.random.default_rng(1).random(200):
        place = draw(logits, float(u))
        assert (ends[place - 1] if place else 0) - 1e-6 <= u <= ends[place] + 1e-6


def chi_square_limit(freedom: int) -> float:
    """The value that chi-square exceeds with a probability of 0.001 (Wilson and Hilferty)."""
    return float(freedom * (1 - 2 / (9 * freedom) + 3.0902 * (2 / (9 * freedom)) ** 0.5) ** 3)


@pytest.mark.parametrize(
    ("options", "draws"),
    [
        ({"temperature": 0.7, "top_k": 10, "top_p": 0.97}, 100_000),
        ({"temperature": 1.3}, 20_000),
        ({"min_p": 0.05}, 20_000),
        ({"typical_p": 0.8}, 20_000),
        ({"eta_cutoff": 0.01}, 20_000),
    ],
)
def test_draws_follow_the_distribution(options: dict[str, Any], draws: int) -> None:
    logits = (np.random.default_rng(0).normal(size=50) * 2).astype(np.float32)
    config = GenerationConfig().updated(options)
    choose = TokenChoice(config, 1, 0)
    counts = np.bincount([choose(logits, step) for step in range(draws)], minlength=50)
    tokens, left = candidates(logits, config.temperature, filters_of(config))
    expected = np.zeros(50)
    expected[slice(None) if tokens is None else tokens] = draws * softmax(left)
    assert counts[expected == 0].sum() == 0
    likely = expected >= 5
    chi_square = float(np.sum((counts[likely] - expected[likely]) ** 2 / expected[likely]))
    assert chi_square < chi_square_limit(int(likely.sum()) - 1)


def test_drawing_without_replacement_is_drawing_one_after_another() -> None:
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    logits, counts = from_probabilities(*probabilities), np.zeros((4, 4))
    for step in range(20_000):
        first, second = draw_without_replacement(logits, 2, beam_uniforms(3, step, 4))
        counts[first, second] += 1
    expected = 20_000 * probabilities[:, None] * probabilities / (1 - probabilities[:, None])
    np.fill_diagonal(expected, 0)
    off = expected > 0
    assert counts[~off].sum() == 0
    assert float(np.sum((counts[off] - expected[off]) ** 2 / expected[off])) < chi_square_limit(int(off.sum()) - 1)


def test_xtc_works_as_often_as_told() -> None:
    logits = from_probabilities(0.6, 0.4)
    choose = TokenChoice(GenerationConfig(do_sample=True, xtc_probability=0.5, top_k=2), 0, 0)
    share = np.mean([choose(logits, step) for step in range(4000)])
    assert abs(share - (0.5 * 0.4 + 0.5 * 1.0)) < 0.03


def test_random_numbers_are_fixed_for_ever() -> None:
    """A seed must give the same numbers on every machine and in every release: these are those of Philox 4x64."""
    assert [uniform(7, 0, 0), uniform(7, 0, 1), uniform(7, 1, 0), uniform(2**64 - 1, 3, 5)] == pytest.approx(
        FIXED_UNIFORMS, abs=0
    )


FIXED_UNIFORMS = [0.8720734548204873, 0.0828426870273763, 0.8824668302545412, 0.7726108401251883]


@given(st.integers(0, 2**64 - 1), st.integers(0, 1023), st.integers(0, 10**6))
def test_uniform_is_in_range_and_a_function(seed: int, row_: int, step: int) -> None:
    value = uniform(seed, row_, step)
    assert 0 <= value < 1
    assert value == uniform(seed, row_, step)


def test_greedy_takes_the_likeliest() -> None:
    assert TokenChoice(GenerationConfig(), 0, 0)(row(1, 3, 2.9), 0) == 1
