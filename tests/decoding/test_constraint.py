"""Constraints in the decoding loop, by a matcher of ids that no text stands behind."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from edgelm.decoding.constraint import Mask, RowConstraint
from edgelm.decoding.generation_config import GenerationConfig
from edgelm.decoding.loop import generate
from edgelm.decoding.request import Step
from edgelm.errors import ConfigError
from edgelm.ids import IdArray, Logits
from tests.conftest import FakeSession, counting_rows, flat_rows

VOCAB = 12
END = 11


@dataclass
class OneOf:
    """Allows one of some lists of ids; what all lists that are left have in common is forced."""

    texts: tuple[tuple[int, ...], ...]
    done: tuple[int, ...] = ()
    taken_back: bool = False

    @property
    def left(self) -> list[tuple[int, ...]]:
        return [text for text in self.texts if text[: len(self.done)] == self.done]

    @property
    def accepts(self) -> bool:
        return self.done in self.texts

    @property
    def is_finished(self) -> bool:
        return self.left == [self.done]

    def mask(self) -> Mask:
        allowed = np.zeros(VOCAB, np.bool_)
        allowed[[text[len(self.done)] for text in self.left if len(text) > len(self.done)]] = True
        return allowed

    def forced(self) -> list[int]:
        if self.accepts:
            return []
        tails = [text[len(self.done) :] for text in self.left]
        common = 0
        while all(len(tail) > common for tail in tails) and len({tail[common] for tail in tails}) == 1:
            common += 1
        return list(tails[0][:common])

    def take(self, token: int) -> None:
        assert self.mask()[token], "the loop took a token that is not allowed"
        self.done = (*self.done, token)

    def copy(self) -> "OneOf":
        return OneOf(self.texts, self.done)


@dataclass
class CountingSession(FakeSession):
    """Notes how many tokens each call computes."""

    calls: list[int] = field(default_factory=list)

    def step(self, ids: Sequence[int] | IdArray) -> Logits:
        self.calls.append(len(ids))
        return super().step(ids)

    def step_all(self, ids: Sequence[int] | IdArray) -> Logits:
        self.calls.append(len(ids))
        return np.stack([super(CountingSession, self).step([int(token)]) for token in ids])


def texts_of(
    session: FakeSession, texts: Sequence[Sequence[int]], prompt: Sequence[int] = (0, 1), **options: Any
) -> list[list[Step]]:
    config = GenerationConfig().updated({"eos_token_id": END, "max_new_tokens": 8, **options})
    matcher = OneOf(tuple(map(tuple, texts)))
    return [list(row) for row in generate(session, list(prompt), config, 0, matcher=matcher)]


def ids(steps: list[Step]) -> list[int]:
    return [step.token_id for step in steps if step.token_id is not None]


def test_the_likeliest_allowed_text_wins_and_a_complete_one_ends_by_stop() -> None:
    """After 1 the model wants 2; it must take 5 or 7, which are equally likely, and the lower id wins."""
    (steps,) = texts_of(FakeSession(counting_rows(VOCAB)), [[5, 6, 7], [7, 3]])
    assert ids(steps) == [5, 6, 7]
    assert steps[-1] == Step(None, "stop")


def test_the_end_is_allowed_only_where_a_text_is_complete() -> None:
    """After 10 the model wants END, which [10] allows and [10, 2, 3] does not yet."""
    session = FakeSession(counting_rows(VOCAB))
    (steps,) = texts_of(session, [[10], [10, 2, 3]])
    assert (ids(steps), steps[-1].finish_reason) == ([10], "eos")
    session = FakeSession(counting_rows(VOCAB))
    (steps,) = texts_of(session, [[10, 2, 3], [10, 2, 4]])
    assert (ids(steps), steps[-1].finish_reason) == ([10, 2, 3], "stop")


def test_without_an_end_token_a_text_goes_on_while_it_can() -> None:
    (steps,) = texts_of(FakeSession(counting_rows(VOCAB)), [[10], [10, 2, 3]], eos_token_id=None)
    assert ids(steps) == [10, 2, 3]


def test_the_limit_cuts_off_and_says_so_but_a_text_complete_at_the_limit_is_complete() -> None:
    (steps,) = texts_of(FakeSession(counting_rows(VOCAB)), [[5, 6, 7, 8]], max_new_tokens=3)
    assert (ids(steps), steps[-1].finish_reason) == ([5, 6, 7], "length")
    (steps,) = texts_of(FakeSession(counting_rows(VOCAB)), [[5, 6, 7]], max_new_tokens=3)
    assert (ids(steps), steps[-1].finish_reason) == ([5, 6, 7], "stop")


def test_an_empty_text_needs_no_token() -> None:
    cases: list[dict[str, Any]] = [{}, {"num_beams": 2, "num_return_sequences": 2}]
    for options in cases:
        for steps in texts_of(FakeSession(counting_rows(VOCAB)), [[]], **options):
            assert steps == [Step(None, "stop")]


def test_forced_tokens_are_computed_in_one_call() -> None:
    """The prompt, then the five forced tokens together, then nothing: the last token is never fed."""
    session = CountingSession(counting_rows(VOCAB))
    (steps,) = texts_of(session, [[3, 4, 5, 6, 7, 9], [3, 4, 5, 6, 7, 2]])
    assert ids(steps) == [3, 4, 5, 6, 7, 2] or ids(steps) == [3, 4, 5, 6, 7, 9]
    assert session.calls == [2, 5]


def test_batch_invariant_sessions_compute_forced_tokens_one_by_one() -> None:
    session = CountingSession(counting_rows(VOCAB), batch_invariant=True)
    texts_of(session, [[3, 4, 5, 6, 7, 9], [3, 4, 5, 6, 7, 2]])
    assert session.calls == [2, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("options", [{"logprobs": 2}, {"prompt_lookup_num_tokens": 3}, {"repetition_penalty": 1.3}])
def test_forced_tokens_are_the_same_with_other_options(options: dict[str, Any]) -> None:
    texts = [[3, 4, 5, 6], [3, 4, 5, 2, 3, 4, 5, 2]]
    plain = texts_of(FakeSession(flat_rows(VOCAB)), texts, do_sample=True)
    other = texts_of(FakeSession(flat_rows(VOCAB)), texts, do_sample=True, **options)
    assert [ids(steps) for steps in other] == [ids(steps) for steps in plain]
    if "logprobs" in options:
        assert all(step.logprobs is not None for step in other[0] if step.token_id is not None)


def test_drafts_stop_at_a_complete_text() -> None:
    """The prompt repeats 3 4 5, so 4 5 are drafted after 3 while the text must end with 3 4."""
    prompt = [3, 4, 5, 3, 4, 5, 3, 4, 5]
    texts = [[3, 4], [3, 6]]
    plain = texts_of(FakeSession(counting_rows(VOCAB)), texts, prompt)
    drafted = texts_of(FakeSession(counting_rows(VOCAB)), texts, prompt, prompt_lookup_num_tokens=8)
    assert [ids(steps) for steps in drafted] == [ids(steps) for steps in plain] == [[3, 4]]
    assert drafted[0][-1].finish_reason == "stop"


def test_rows_obey_one_by_one() -> None:
    texts = [[a, b] for a in range(2, 9) for b in range(2, 9)]
    rows = texts_of(FakeSession(flat_rows(VOCAB)), texts, do_sample=True, num_return_sequences=6)
    assert all(ids(steps) in texts for steps in rows)
    assert len({tuple(ids(steps)) for steps in rows}) > 1


def test_beams_obey_and_whole_texts_come_before_cut_ones() -> None:
    texts = [[5, 6, 7], [2, 9], [2, 8, 4]]
    rows = texts_of(FakeSession(counting_rows(VOCAB)), texts, num_beams=3, num_return_sequences=3)
    assert sorted(ids(steps) for steps in rows) == sorted(texts)
    assert {steps[-1].finish_reason for steps in rows} == {"stop"}
    # [2, 3, 4, 5] is far likelier, and cut off at 3 tokens.
    texts = [[2, 3, 4, 5], [7, 9, 8]]
    best, other = texts_of(
        FakeSession(counting_rows(VOCAB)), texts, num_beams=2, num_return_sequences=2, max_new_tokens=3
    )
    assert (ids(best), best[-1].finish_reason) == ([7, 9, 8], "stop")
    assert (ids(other), other[-1].finish_reason) == ([2, 3, 4], "length")


def test_beams_end_by_the_end_token_where_a_text_is_complete() -> None:
    texts = [[10], [10, 2, 3]]
    rows = texts_of(FakeSession(counting_rows(VOCAB)), texts, num_beams=2, num_return_sequences=2)
    assert [(ids(steps), steps[-1].finish_reason) for steps in rows] == [([10], "eos"), ([10, 2, 3], "stop")]


def test_what_other_options_rule_out_stays_ruled_out() -> None:
    (steps,) = texts_of(FakeSession(counting_rows(VOCAB)), [[2, 3], [5, 6]], suppress_tokens=[2])
    assert ids(steps) == [5, 6]
    (steps,) = texts_of(FakeSession(counting_rows(VOCAB)), [[2, 3], [5, 6]], bad_words_ids=[[2]])
    assert ids(steps) == [5, 6]


@pytest.mark.parametrize(
    "options",
    [
        {"suppress_tokens": [2, 5]},
        {"min_new_tokens": 4, "bad_words_ids": [[2, 3], [2, 4]]},
        {"suppress_tokens": [6, 3]},
    ],
)
def test_when_nothing_is_left_a_sentence_says_so(options: dict[str, Any]) -> None:
    texts = [[2], [2, 3], [2, 4]] if "min_new_tokens" in options else [[2, 3], [5, 6]]
    with pytest.raises(ConfigError, match="no token is left to choose"):
        texts_of(FakeSession(counting_rows(VOCAB)), texts, **options)


def test_a_copy_grows_by_itself() -> None:
    row = RowConstraint(OneOf(((3, 4, 5), (3, 4, 6))), GenerationConfig())
    assert row.forced_token == 3
    copy = row.copy()
    copy.take(3)
    copy.take(4)
    assert (row.forced_token, copy.forced_token) == (3, None)
