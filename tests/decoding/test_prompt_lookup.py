"""Drafts from the text itself change the speed, but no chosen token."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import edgelm
from edgelm import ConfigError, GenerationConfig, Model
from edgelm.decoding.drafts import FIRST_CREDIT, LOSS_SHARE, MAX_CREDIT
from edgelm.decoding.loop import generate
from edgelm.decoding.prompt_lookup import PromptLookup, continuation
from edgelm.decoding.request import Step
from edgelm.engine.call import FOUR_BIT_DRAFTS, OTHER_DRAFTS, DraftCost, draft_cost
from tests.conftest import TINY_BUNDLE, FakeSession, counting_rows, flat_rows


@pytest.fixture(scope="module")
def model() -> Model:
    return edgelm.load(TINY_BUNDLE, device="cpu", threads=1)


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int64)


def steps(session: FakeSession, prompt: list[int], **options: Any) -> list[Step]:
    """All steps of the one row."""
    (row,) = (list(steps) for steps in generate(session, prompt, GenerationConfig().updated(options), seed=3))
    return row


def test_a_draft_is_what_followed_the_last_tokens_earlier() -> None:
    assert continuation(ids(1, 2, 3, 4, 5, 9, 1, 2, 3), 3) == [4, 5, 9]
    assert continuation(ids(7, 2, 3, 4, 5, 9, 1, 2, 3), 2) == [4, 5], "two tokens match where three do not"
    assert continuation(ids(2, 3, 8, 2, 3, 9, 2, 3), 2) == [9, 2], "the latest place counts"
    assert continuation(ids(1, 2, 3, 4, 5), 4) == []
    assert continuation(ids(1), 4) == continuation(ids(5, 5, 5), 0) == []


def test_a_draft_beyond_the_text_repeats_itself() -> None:
    assert continuation(ids(5, 5, 5), 4) == [5, 5, 5, 5]
    assert continuation(ids(1, 2, 1, 2, 1), 5) == [2, 1, 2, 1, 2]


def widths(drafts: PromptLookup, comes_true: list[int]) -> list[int]:
    """The width of each draft, given the number of right tokens in each guess."""
    draft_widths = []
    for right in comes_true:
        draft = drafts.draft(ids(*[5] * 9), 100)
        draft_widths.append(len(draft))
        most = len(draft) or 1
        drafts.learn([5] * min(right, most) + [6] * (right <= len(draft)))
    return draft_widths


def test_the_width_follows_success() -> None:
    """The first draft follows one right guess, which costs nothing."""
    assert widths(PromptLookup(8, FOUR_BIT_DRAFTS), [9, 9, 9, 9, 3, 9, 9]) == [0, 2, 4, 8, 8, 3, 6]
    assert widths(PromptLookup(1, FOUR_BIT_DRAFTS), [9, 9, 9]) == [0, 1, 1]
    assert PromptLookup(8, FOUR_BIT_DRAFTS).draft(ids(5, 5, 5), 0) == []


def test_guesses_that_are_wrong_cost_nothing() -> None:
    assert widths(PromptLookup(8, FOUR_BIT_DRAFTS), [0] * 50) == [0] * 50


def test_drafts_that_fail_become_rare() -> None:
    """The worst case: every guess is right and every draft is wrong."""
    drafts, tried = PromptLookup(8, FOUR_BIT_DRAFTS), []
    for step in range(1000):
        draft = drafts.draft(ids(*[5] * 9), 100)
        drafts.learn([6] if draft else [5])
        tried += [step] if draft else []
    assert tried[:4] == [1, 4, 9, 35]
    assert len(tried) <= (FIRST_CREDIT + 1000 * LOSS_SHARE) / FOUR_BIT_DRAFTS.of(1)


def test_a_draft_costs_most_where_weights_have_four_bits() -> None:
    recipe = edgelm.Bundle.read(TINY_BUNDLE).manifest.recipe
    assert draft_cost(recipe) == OTHER_DRAFTS
    some = replace(recipe, matrices=(*recipe.matrices, replace(recipe.matrices[0], bits=4)))
    assert draft_cost(some) == FOUR_BIT_DRAFTS
    assert [FOUR_BIT_DRAFTS.affordable(credit) for credit in (0, 0.39, 0.4, 0.64, 0.65, 4)] == [0, 0, 1, 1, 2, 15]
    assert all(FOUR_BIT_DRAFTS.affordable(FOUR_BIT_DRAFTS.of(n)) == n for n in range(1, 65))


@given(
    most=st.integers(1, 64),
    cost=st.sampled_from([FOUR_BIT_DRAFTS, OTHER_DRAFTS]),
    turns=st.lists(st.tuples(st.booleans(), st.integers(0, 64)), min_size=1, max_size=300),
)
def test_what_drafts_lose_is_bounded(most: int, cost: DraftCost, turns: list[tuple[bool, int]]) -> None:
    """The loss is counted from the start, and from any step after which the drafts had gained most."""
    drafts, gained, best, tokens, tokens_at_best = PromptLookup(most, cost), 0.0, 0.0, 0, 0
    for guess_is_right, right in turns:
        width = len(drafts.draft(ids(*[5] * 9), 100))
        true = min(right, width) if width else 0
        drafts.learn([5] * true + [6] if width else [5 if guess_is_right else 6])
        tokens += true + 1
        gained += true - (cost.of(width) if width else 0)
        assert gained >= -FIRST_CREDIT - LOSS_SHARE * tokens - 1e-6
        assert gained >= best - max(FIRST_CREDIT, MAX_CREDIT) - LOSS_SHARE * (tokens - tokens_at_best) - 1e-6
        if gained > best:
            best, tokens_at_best = gained, tokens


@given(
    prompt=st.lists(st.integers(0, 5), min_size=1, max_size=20),
    most=st.integers(1, 9),
    sampling=st.sampled_from([{}, {"temperature": 0.7}, {"mirostat_tau": 1.0}, {"do_sample": True, "top_p": 0.9}]),
    penalty=st.sampled_from([1.0, 1.3]),
    context=st.integers(20, 40),
    eos=st.sampled_from([(), (4,)]),
)
def test_tokens_and_reasons_are_those_of_plain_decoding(
    prompt: list[int], most: int, sampling: dict[str, Any], penalty: float, context: int, eos: tuple[int, ...]
) -> None:
    options = {**sampling, "repetition_penalty": penalty, "max_new_tokens": 30, "eos_token_id": eos}
    rows = counting_rows(6) if not sampling else flat_rows(6)
    plain = steps(FakeSession(rows, context), prompt, **options)
    session = FakeSession(rows, context)
    fast = steps(session, prompt, **options, prompt_lookup_num_tokens=most)
    assert [(step.token_id, step.finish_reason) for step in fast] == [(s.token_id, s.finish_reason) for s in plain]


def test_what_is_fed_is_the_text_alone() -> None:
    session = FakeSession(counting_rows(6))
    steps_of_row = steps(session, [0, 1], max_new_tokens=40, prompt_lookup_num_tokens=8)
    text = [0, 1, *(step.token_id for step in steps_of_row if step.token_id is not None)]
    assert session.fed == text[:-1]
    assert sum(step.was_drafted for step in steps_of_row) > 25


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "temperature": 0.5, "seed": 5}, {"top_k": 5, "seed": 1, "logprobs": 2}]
)
def test_drafts_do_not_change_the_ids_of_the_tiny_model(
    model: Model, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafts may be right, wrong, or right up to a token."""
    prompt = list(range(20, 45))
    plain = model.generate(prompt, max_new_tokens=80, eos_token_id=(), **options)
    answer = [*prompt, *plain.choices[0].token_ids, *[7] * 20]
    rng = np.random.default_rng(0)

    def oracle(ids: np.ndarray, count: int) -> list[int]:
        draft = answer[len(ids) : len(ids) + count]
        if count and rng.random() < 0.4:
            draft[rng.integers(count)] = 8
        return draft

    monkeypatch.setattr("edgelm.decoding.prompt_lookup.continuation", oracle)
    fast = model.generate(prompt, max_new_tokens=80, eos_token_id=(), **options, prompt_lookup_num_tokens=8)
    assert fast.choices[0].token_ids == plain.choices[0].token_ids
    assert fast.choices[0].finish_reason == "context"
    assert 10 < fast.stats.accepted_tokens < fast.stats.drafted_tokens
    assert plain.stats.drafted_tokens == 0


def test_drafts_come_true_where_a_story_repeats_itself() -> None:
    story = edgelm.load(device="cpu", threads=1)
    prompt = "One, two, three. One, two, three. One, two, three. One,"
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": [], "max_new_tokens": 100}
    stats = story.generate(prompt, **options, prompt_lookup_num_tokens=8).stats
    assert stats.accepted_tokens > 30


def test_many_rows_of_one_prompt(model: Model) -> None:
    options: dict[str, Any] = {"num_return_sequences": 3, "do_sample": True, "temperature": 0.3, "seed": 2}
    plain = model.generate([5, 6, 7, 5, 6], max_new_tokens=30, **options)
    fast = model.generate([5, 6, 7, 5, 6], max_new_tokens=30, **options, prompt_lookup_num_tokens=4)
    assert [choice.token_ids for choice in fast.choices] == [choice.token_ids for choice in plain.choices]


def test_searches_take_no_drafts() -> None:
    with pytest.raises(ConfigError, match="prompt_lookup_num_tokens works with greedy decoding and sampling only"):
        GenerationConfig().updated({"num_beams": 2, "prompt_lookup_num_tokens": 4})
    default = GenerationConfig(prompt_lookup_num_tokens=4)
    assert default.updated({"num_beams": 2}).prompt_lookup_num_tokens is None
    with pytest.raises(ConfigError, match="from 1 to 64"):
        GenerationConfig(prompt_lookup_num_tokens=0)
