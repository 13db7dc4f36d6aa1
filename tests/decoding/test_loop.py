"""The loop, with a session that counts: ids in, ids out."""

import pytest

from edgelm import ConfigError, ContextError, GenerationConfig
from edgelm.decoding.loop import FinishReason, generate
from tests.conftest import FakeSession, counting_rows, flat_rows

VOCAB = 10


def run(
    session: FakeSession, prompt: list[int], config: GenerationConfig, seed: int = 0
) -> list[tuple[list[int], FinishReason]]:
    """All rows: their tokens and their finish reason."""
    rows = []
    for steps in generate(session, prompt, config, seed):
        *tokens, last = list(steps)
        assert last.token_id is None and last.finish_reason is not None
        assert all(step.finish_reason is None for step in tokens)
        rows.append(([step.token_id for step in tokens if step.token_id is not None], last.finish_reason))
    return rows


@pytest.fixture
def session() -> FakeSession:
    return FakeSession(counting_rows(VOCAB))


def test_greedy_counts(session: FakeSession) -> None:
    assert run(session, [3, 4], GenerationConfig(max_new_tokens=4)) == [([5, 6, 7, 8], "length")]


def test_the_last_token_is_never_fed(session: FakeSession) -> None:
    run(session, [1], GenerationConfig(max_new_tokens=3))
    assert session.fed == [1, 2, 3]


def test_nothing_to_add(session: FakeSession) -> None:
    assert run(session, [1], GenerationConfig(max_new_tokens=0)) == [([], "length")]


def test_eos_is_not_in_the_result(session: FakeSession) -> None:
    assert run(session, [3], GenerationConfig(eos_token_id=(6, 9))) == [([4, 5], "eos")]


def test_max_length_counts_the_prompt(session: FakeSession) -> None:
    assert run(session, [1, 2, 3], GenerationConfig(max_length=5)) == [([4, 5], "length")]
    with pytest.raises(ConfigError, match="max_length is 3"):
        run(session, [1, 2, 3], GenerationConfig(max_length=3))


def test_context_ends_cleanly_one_token_past_the_cache() -> None:
    session = FakeSession(counting_rows(VOCAB), context_length=5)
    assert run(session, [1, 2], GenerationConfig(max_new_tokens=100)) == [([3, 4, 5, 6], "context")]
    assert session.position == 5


def test_a_prompt_that_fills_the_context_gets_one_token() -> None:
    session = FakeSession(counting_rows(VOCAB), context_length=3)
    assert run(session, [1, 2, 3], GenerationConfig(max_new_tokens=9)) == [([4], "context")]


def test_length_wins_over_context() -> None:
    session = FakeSession(counting_rows(VOCAB), context_length=3)
    assert run(session, [1, 2], GenerationConfig(max_new_tokens=2)) == [([3, 4], "length")]


def test_too_long_a_prompt_names_both_numbers() -> None:
    session = FakeSession(counting_rows(VOCAB), context_length=3)
    with pytest.raises(ContextError, match="the prompt has 4 tokens, but this model's context holds 3"):
        run(session, [1, 2, 3, 4], GenerationConfig())
    assert session.fed == []


def test_rows_share_the_prompt_and_differ_in_their_draws(session: FakeSession) -> None:
    flat = FakeSession(flat_rows(VOCAB))
    config = GenerationConfig(do_sample=True, num_return_sequences=3, max_new_tokens=8)
    rows = run(flat, [1, 2], config, seed=5)
    assert len({tuple(tokens) for tokens, _ in rows}) == 3
    assert flat.fed[:2] == [1, 2]


def test_a_rows_draws_do_not_depend_on_its_neighbours() -> None:
    config = GenerationConfig(do_sample=True, max_new_tokens=8)
    alone = run(FakeSession(flat_rows(VOCAB)), [1, 2], config, seed=5)
    three = GenerationConfig(do_sample=True, max_new_tokens=8, num_return_sequences=3)
    together = run(FakeSession(flat_rows(VOCAB)), [1, 2], three, seed=5)
    assert together[0] == alone[0]


def test_leaving_a_row_early_leaves_the_next_one_right() -> None:
    config = GenerationConfig(do_sample=True, max_new_tokens=8, num_return_sequences=2)
    whole = run(FakeSession(flat_rows(VOCAB)), [1], config, seed=2)
    rows = generate(FakeSession(flat_rows(VOCAB)), [1], config, 2)
    next(next(rows))
    assert [step.token_id for step in next(rows)][:-1] == whole[1][0]


def test_same_seed_same_tokens_other_seed_other_tokens() -> None:
    config = GenerationConfig(do_sample=True, max_new_tokens=20)
    first, again, other = (run(FakeSession(flat_rows(VOCAB)), [1], config, seed) for seed in (1, 1, 2))
    assert first == again != other
