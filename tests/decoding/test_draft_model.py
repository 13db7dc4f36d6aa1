"""Drafts of a small model change the speed, but no chosen token, and lose little where they are wrong."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm import GenerationConfig
from edgelm.decoding.draft_model import LEAST_READ, MAX_DRAFT, DraftModel, ModelDrafts
from edgelm.decoding.drafts import FIRST_CREDIT, LOSS_SHARE, MAX_CREDIT
from edgelm.decoding.loop import generate
from edgelm.decoding.request import Step
from edgelm.engine.call import FOUR_BIT_DRAFTS, OTHER_DRAFTS, DraftCost
from edgelm.ids import IdArray, Logits
from tests.conftest import FakeSession, counting_rows, flat_rows

V = 6
FREE = DraftCost(0.0, 0.0)


@dataclass
class CountingSession(FakeSession):
    """A session that counts its calls."""

    calls: int = 0

    def step(self, ids: Sequence[int] | IdArray) -> Logits:
        self.calls += 1
        return super().step(ids)


def ids(*tokens: int) -> IdArray:
    return np.array(tokens, np.int64)


def likeliest(text: IdArray, logits: Logits) -> int:
    return int(logits.argmax())


def drafts_of(session: FakeSession, *, step_cost: float = 0.05, check_cost: DraftCost = OTHER_DRAFTS) -> ModelDrafts:
    return ModelDrafts(DraftModel(session, step_cost, V), likeliest, check_cost)


def rows_of(session: FakeSession, prompt: list[int], small: FakeSession | None, **options: Any) -> list[list[Step]]:
    """All steps of every row, with drafts of a `small` model if there is one."""
    model = None if small is None else DraftModel(small, 0.05, V)
    config = GenerationConfig().updated(options)
    return [list(steps) for steps in generate(session, prompt, config, seed=3, draft_model=model)]


def test_a_draft_is_what_the_small_model_would_write() -> None:
    session = FakeSession(counting_rows(V))
    drafts = drafts_of(session, check_cost=FREE)
    assert drafts.draft(ids(0, 1), 3) == [2, 3, 4]
    drafts.learn([2, 3, 4])
    assert drafts.draft(ids(0, 1, 2, 3, 4, 5), 100) == [(6 + place) % V for place in range(MAX_DRAFT)]
    assert session.fed == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0]
    drafts.learn([3])
    assert drafts.draft(ids(0, 1, 2, 3, 4, 5, 3), 1) == [4], "what was wrong is computed again"
    assert session.fed == [0, 1, 2, 3, 4, 5, 3]


def test_a_draft_ends_where_the_small_model_is_unsure() -> None:
    rows = counting_rows(V)
    rows[3] = 0  # nobody knows what follows 3
    drafts = drafts_of(FakeSession(rows))
    assert drafts.draft(ids(0), 100) == [1, 2, 3]
    assert drafts.draft(ids(3), 100) == []
    assert drafts.draft(ids(0), 0) == []


def test_a_draft_ends_with_the_small_context() -> None:
    session = FakeSession(counting_rows(V), context_length=4)
    drafts = drafts_of(session, check_cost=FREE)
    assert drafts.draft(ids(0, 1), 100) == [2, 3, 4]
    assert session.fed == [0, 1, 2, 3]


def test_a_text_longer_than_the_small_context_is_read_from_its_last_tokens_on() -> None:
    session = FakeSession(counting_rows(V), context_length=40)
    drafts = drafts_of(session, check_cost=FREE)
    text = [place % V for place in range(100)]
    for length in range(20, 100):
        assert drafts.draft(ids(*text[:length]), 1) == [text[length]]
        drafts.learn([text[length]])
    assert 20 <= session.position <= 40
    assert session.fed == text[99 - session.position : 99]


def test_what_was_not_read_meanwhile_is_left_out() -> None:
    """A text of a scheduler goes on without drafts while it has company."""
    session = FakeSession(counting_rows(V))
    drafts, text = drafts_of(session, step_cost=0.1), [place % V for place in range(600)]
    for length in (20, 24, 500, 504):
        draft = drafts.draft(ids(*text[:length]), 3)
        assert draft == text[length : length + 3]
        drafts.learn([*draft, text[length + 3]])
        kept = session.fed[: len(session.fed) - 2]  # without the drafted tokens that were fed
        assert kept == text[length - len(kept) : length]
        assert len(kept) == length if length < 100 else len(kept) < 200


def test_a_long_prompt_is_read_as_far_as_half_of_the_account_pays() -> None:
    text = ids(*(place % V for place in range(900)))
    read = []
    for step_cost in (0.02, 0.1, 0.2):
        session = CountingSession(counting_rows(V))
        drafts = drafts_of(session, step_cost=step_cost)
        assert drafts.draft(text, 100)[:1] == [0], "what follows 899 numbers in turn"
        drafts.learn([0])
        read.append(session.position - session.calls + 1)
    assert read[0] > read[1] > read[2] >= LEAST_READ
    drafts = drafts_of(FakeSession(counting_rows(V)), step_cost=0.9)
    assert drafts.draft(text, 100) == [], "too little of it can be read"
    assert drafts.draft(ids(0, 1), 100) == [], "but each token costs as much as it saves"


def test_the_tables_of_the_two_models_may_be_padded_differently() -> None:
    wider = drafts_of(FakeSession(np.pad(counting_rows(V), (0, 2), constant_values=99)), check_cost=FREE)
    assert wider.draft(ids(0, 1), 3) == [2, 3, 4]
    shorter = drafts_of(FakeSession(counting_rows(V - 1)), check_cost=FREE)
    assert shorter.draft(ids(0, 1), 4) == [2, 3, 4, 0]
    assert shorter.draft(ids(0, 5), 4) == [], "the small model lacks the token 5"


def test_a_small_model_that_is_sure_and_wrong_is_trusted_less() -> None:
    drafts = drafts_of(FakeSession(counting_rows(V)))
    widths = []
    for _ in range(500):
        widths.append(len(drafts.draft(ids(0), 100)))
        drafts.learn([3])
    assert widths[0] > 1
    lost = sum(0.05 * (width + 1) + OTHER_DRAFTS.of(width) for width in widths if width)
    assert lost < FIRST_CREDIT + 500 * LOSS_SHARE + MAX_CREDIT


@given(
    cost=st.sampled_from([FOUR_BIT_DRAFTS, OTHER_DRAFTS]),
    step_cost=st.floats(0.01, 0.5),
    rights=st.lists(st.integers(0, MAX_DRAFT), min_size=1, max_size=200),
    flat=st.floats(0.05, 1.0),
)
def test_what_drafts_lose_is_bounded(cost: DraftCost, step_cost: float, rights: list[int], flat: float) -> None:
    """Whatever the small model promises, and however many of its tokens come true."""
    session = CountingSession(counting_rows(V) * np.float32(flat))
    drafts, gained, tokens = drafts_of(session, step_cost=step_cost, check_cost=cost), 0.0, 0
    for right in rights:
        session.calls = 0
        draft = drafts.draft(ids(0), 100)
        true = min(right, len(draft))
        drafts.learn([*draft[:true], 99])
        tokens += true + 1
        gained += true - step_cost * session.calls - (cost.of(len(draft)) if draft else 0)
        assert gained >= -FIRST_CREDIT - LOSS_SHARE * tokens - 1e-6


@given(
    prompt=st.lists(st.integers(0, 5), min_size=1, max_size=20),
    sampling=st.sampled_from([{}, {"temperature": 0.7}, {"mirostat_tau": 1.0}, {"do_sample": True, "top_p": 0.9}]),
    penalty=st.sampled_from([1.0, 1.3]),
    context=st.integers(20, 40),
    small_context=st.integers(4, 60),
    agrees=st.booleans(),
    eos=st.sampled_from([(), (4,)]),
    sequences=st.integers(1, 3),
)
def test_tokens_and_reasons_are_those_of_plain_decoding(
    prompt: list[int],
    sampling: dict[str, Any],
    penalty: float,
    context: int,
    small_context: int,
    agrees: bool,
    eos: tuple[int, ...],
    sequences: int,
) -> None:
    options: dict[str, Any] = {**sampling, "repetition_penalty": penalty, "max_new_tokens": 30, "eos_token_id": eos}
    if sampling:
        options["num_return_sequences"] = sequences
    rows = counting_rows(V) if not sampling else flat_rows(V)
    others = rows if agrees else np.random.default_rng(0).normal(size=(V, V)).astype(np.float32) * 8
    plain = rows_of(FakeSession(rows, context), prompt, None, **options)
    fast = rows_of(FakeSession(rows, context), prompt, FakeSession(others, small_context), **options)
    assert [[(s.token_id, s.finish_reason) for s in row] for row in fast] == [
        [(s.token_id, s.finish_reason) for s in row] for row in plain
    ]


def test_both_models_draw_with_the_same_random_number() -> None:
    """A small model that is equal guesses every sampled token right, even of flat distributions."""
    rows = counting_rows(V) * np.float32(0.4)
    (steps,) = rows_of(FakeSession(rows), [0], FakeSession(rows), do_sample=True, max_new_tokens=200, eos_token_id=())
    drafted = sum(step.drafted for step in steps)
    assert drafted > 20
    assert sum(step.was_drafted for step in steps) == drafted


@pytest.mark.parametrize("own", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}])
def test_other_methods_take_no_drafts(own: dict[str, Any]) -> None:
    small = FakeSession(counting_rows(V))
    rows_of(FakeSession(counting_rows(V)), [0, 1], small, max_new_tokens=8, eos_token_id=(), **own)
    assert small.fed == []


def test_a_callers_processor_sees_the_text_alone() -> None:
    """It may count its calls, so guesses do not ask it."""
    seen: dict[bool, list[list[int]]] = {}
    for drafts in (False, True):
        calls = seen.setdefault(drafts, [])

        def note(ids: IdArray, logits: Logits, calls: list[list[int]] = calls) -> Logits:
            calls.append(ids.tolist())
            return logits

        small = FakeSession(counting_rows(V)) if drafts else None
        options: dict[str, Any] = {"logits_processor": note, "max_new_tokens": 20, "eos_token_id": ()}
        (steps,) = rows_of(FakeSession(counting_rows(V)), [0, 1], small, **options)
        assert bool(sum(step.drafted for step in steps)) is drafts
    assert seen[True] == seen[False]
    assert len(seen[True]) == 20
