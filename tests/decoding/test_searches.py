"""Searches on the tiny bundle equal the last transformers that has them; beams keep their own rules."""

import itertools
import json
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgelm import Bundle, ConfigError, Session
from edgelm.decoding.beams import _divisor_of_best
from edgelm.decoding.generation_config import GenerationConfig
from edgelm.decoding.loop import generate
from edgelm.decoding.request import Request
from edgelm.engine.graph import Graph
from tests.conftest import DATA, TINY_BUNDLE, FakeBatch, FakeSession

GOLDEN = json.loads((DATA / "tiny-gpt2-searches.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tiny() -> Session:
    return Graph.open(Bundle.read(TINY_BUNDLE), device="cpu", threads=1).session()


def rows(session: Session, prompt: list[int], options: dict[str, Any]) -> list[list[int]]:
    session.reset()
    returned = generate(session, prompt, GenerationConfig().updated(options), 0)
    return [[step.token_id for step in steps if step.token_id is not None] for steps in returned]


@pytest.mark.parametrize("kind", ["groups", "contrastive"])
def test_ids_are_those_of_the_last_transformers_that_had_the_method(tiny: Session, kind: str) -> None:
    for case in GOLDEN[kind]["cases"]:
        assert rows(tiny, case["prompt"], case["options"]) == case["rows"], case


VOCAB = 12


def likely_rows(seed: int) -> npt.NDArray[np.float32]:
    return (np.random.default_rng(seed).normal(size=(VOCAB, VOCAB)) * 2).astype(np.float32)


def run(options: dict[str, Any], seed: int = 0, context: int = 100, **more: Any) -> list[tuple[list[int], str]]:
    """Every row's tokens and reason, on a fake session."""
    session = FakeSession(likely_rows(seed), context_length=context)
    rows: list[tuple[list[int], str]] = []
    for steps in generate(session, [1, 2, 3], GenerationConfig().updated(options), seed, **more):
        *tokens, last = list(steps)
        assert last.token_id is None and last.finish_reason is not None
        rows.append(([step.token_id for step in tokens if step.token_id is not None], last.finish_reason))
    return rows


METHODS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 3},
    "filters": {"top_k": 9, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.99, "eta_cutoff": 1e-3, "top_n_sigma": 3.0},
    "mirostat": {"mirostat_tau": 2.0},
    "xtc": {"xtc_probability": 0.7},
    "beams": {"num_beams": 4, "num_return_sequences": 4},
    "beam sampling": {"num_beams": 4, "num_return_sequences": 2, "do_sample": True},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5, "num_return_sequences": 3},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(6))
def test_masked_tokens_never_appear(method: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    banned = {int(i) for i in rng.choice(VOCAB, 5, replace=False)}
    pair = [int(i) for i in rng.choice(sorted(set(range(VOCAB)) - banned), 2)]
    options = {"suppress_tokens": sorted(banned), "bad_words_ids": [pair], "max_new_tokens": 15}
    for tokens, _ in run(METHODS[method] | options, seed):
        assert len(tokens) == 15 and not banned & set(tokens)
        assert all(two != tuple(pair) for two in itertools.pairwise([3, *tokens]))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_ends_for_the_right_reason(method: str) -> None:
    common = METHODS[method]
    assert {why for _, why in run(common | {"max_new_tokens": 5})} == {"length"}
    assert {(len(t), why) for t, why in run(common | {"max_new_tokens": 50}, context=9)} == {(7, "context")}
    assert {(len(t), why) for t, why in run(common | {"max_new_tokens": 0})} == {(0, "length")}
    assert {(len(t), why) for t, why in run(common | {"max_new_tokens": 1})} == {(1, "length")}
    everything = run(common | {"max_new_tokens": 60, "eos_token_id": [0, 4, 7]})
    assert {why for _, why in everything} <= ({"eos", "length"} if method == "groups" else {"eos"})
    assert all(not {0, 4, 7} & set(tokens) for tokens, _ in everything)
    hours = iter(range(0, 10**6, 3600))
    late = run(common | {"max_new_tokens": 50, "max_time": 7200.0}, clock=lambda: next(hours))
    assert {why for _, why in late} == {"time"}
    assert all(1 <= len(tokens) <= 3 for tokens, _ in late)


@pytest.mark.parametrize("method", METHODS)
def test_max_time_counts_after_the_first_token_even_where_a_prompt_can_be_cancelled(method: str) -> None:
    """A prompt with `cancel` is computed in pieces of 64 tokens; time that passes between them cancels nothing."""
    hours = iter(range(0, 10**6, 3600))
    options = METHODS[method] | {"max_new_tokens": 50, "max_time": 60.0, "cancel": threading.Event()}
    session = FakeSession(likely_rows(0))
    returned = generate(session, [1, 2, 3] * 70, GenerationConfig().updated(options), 0, clock=lambda: next(hours))
    rows = [list(steps) for steps in returned]
    assert {steps[-1].finish_reason for steps in rows} == {"time"}
    assert {len(steps) for steps in rows} == {2}


@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_tells_how_far_it_is(method: str) -> None:
    told: list[tuple[int, int]] = []
    options = METHODS[method] | {"max_new_tokens": 3, "prompt_progress": lambda *numbers: told.append(numbers)}
    prompt = [1, 2, 3] * 70
    with_progress = generate(FakeSession(likely_rows(0)), prompt, GenerationConfig().updated(options), 0)
    tokens = [[step.token_id for step in steps] for steps in with_progress]
    assert told == [(64, 210), (128, 210), (192, 210), (210, 210)]
    without = generate(
        FakeSession(likely_rows(0)), prompt, GenerationConfig().updated(METHODS[method] | {"max_new_tokens": 3}), 0
    )
    assert tokens == [[step.token_id for step in steps] for steps in without]


def test_a_reused_part_of_a_prompt_counts_as_computed() -> None:
    told: list[tuple[int, int]] = []
    config = GenerationConfig().updated({"max_new_tokens": 1, "prompt_progress": lambda *numbers: told.append(numbers)})
    session = FakeSession(likely_rows(0))
    session.step([1, 2, 3] * 40)
    list(next(generate(session, [1, 2, 3] * 70, config, 0, reused=120)))
    assert told == [(184, 210), (210, 210)]


@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_is_cancelled_between_its_pieces(method: str) -> None:
    class Cancel:
        asked = 0

        def is_set(self) -> bool:
            self.asked += 1
            return self.asked > 2

    session = FakeSession(likely_rows(0))
    config = GenerationConfig().updated(METHODS[method] | {"max_new_tokens": 50, "cancel": Cancel()})
    rows = [list(steps) for steps in generate(session, [1, 2, 3] * 70, config, 0)]
    assert [[(step.token_id, step.finish_reason) for step in steps] for steps in rows] == [
        [(None, "cancelled")]
    ] * config.num_return_sequences
    assert session.position == 128


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_gives_the_same_rows_again(method: str) -> None:
    assert run(METHODS[method] | {"max_new_tokens": 12}, 3) == run(METHODS[method] | {"max_new_tokens": 12}, 3)


def test_a_beam_ends_at_a_stop_string() -> None:
    def ends(new: Sequence[int]) -> bool:
        return list(new)[-2:] == [5, 5] or 6 in new

    rows = run({"num_beams": 5, "num_return_sequences": 5, "max_new_tokens": 30}, ends_text=ends)
    assert any(why == "stop" for _, why in rows)
    for tokens, why in rows:
        assert why == ("stop" if ends(tokens) else "length")
        assert not ends(tokens[:-1])


def test_beams_find_likelier_texts() -> None:
    """Beams find a text at least as likely as greedy decoding's, on these seeds."""
    for seed in range(5):
        rows = likely_rows(seed)
        logs = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))

        def likelihood(tokens: list[int], logs: npt.NDArray[np.float32] = logs) -> float:
            return float(sum(logs[a, b] for a, b in itertools.pairwise([3, *tokens])))

        greedy = run({"max_new_tokens": 8}, seed)[0][0]
        best = run({"max_new_tokens": 8, "num_beams": 12}, seed)[0][0]
        assert likelihood(best) >= likelihood(greedy) - 1e-5


@pytest.mark.parametrize(
    ("early_stopping", "length_penalty", "divisor"),
    [(False, 2.0, 9.0), (False, -1.0, 1 / 3), ("never", 2.0, 100.0), ("never", 0.0, 1.0), ("never", -1.0, 1 / 3)],
)
def test_the_best_rank_that_a_beam_may_reach(early_stopping: Any, length_penalty: float, divisor: float) -> None:
    """As transformers: "never" counts on the longest text only where length raises the rank."""
    options = {"num_beams": 2, "max_new_tokens": 10, "early_stopping": early_stopping, "length_penalty": length_penalty}
    request = Request.of(FakeSession(likely_rows(0)), [1, 2], GenerationConfig().updated(options), 0)
    assert _divisor_of_best(request, 3) == pytest.approx(divisor)


@pytest.mark.parametrize("ends", [(), (0,), (0, 4)])
def test_filters_leave_each_drawn_beam_tokens_to_go_on_with(ends: tuple[int, ...]) -> None:
    """As transformers' `min_tokens_to_keep`: one more than there are tokens that end a text, and at least two."""
    left = 1 + max(1, len(ends))
    rows, logits = likely_rows(2), likely_rows(2)
    logits[:, list(ends)] -= 100
    likeliest = np.argsort(-logits, axis=1)[:, :left]
    options = {"num_beams": 3, "num_return_sequences": 3, "do_sample": True, "top_k": 1, "max_new_tokens": 30}
    seen = set()
    session = FakeSession(rows - np.where(np.isin(np.arange(VOCAB), ends), np.float32(100), np.float32(0)))
    for seed in range(10):
        config = GenerationConfig().updated(options | {"eos_token_id": list(ends)})
        session.reset()
        for steps in generate(session, [1, 2, 3], config, seed):
            tokens = [step.token_id for step in steps if step.token_id is not None]
            for before, token in itertools.pairwise([3, *tokens]):
                place = likeliest[before].tolist().index(token)  # fails for a token that the filter rules out
                seen.add(place)
    assert seen == set(range(left))


def test_beams_stop_when_enough_of_them_are_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token 0 ends a text with a probability of 0.6, so two beams are finished after the second step."""
    logits = np.tile(np.log(np.array([0.6, 0.3, 0.07, 0.03], np.float32)), (4, 1))
    calls: list[int] = []
    step = FakeBatch.step

    def counted(batch: FakeBatch, ids: Any) -> Any:
        calls.append(len(ids))
        return step(batch, ids)

    monkeypatch.setattr(FakeBatch, "step", counted)
    options = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 20, "eos_token_id": 0}
    for early_stopping in (True, False):
        calls.clear()
        config = GenerationConfig().updated(options | {"early_stopping": early_stopping})
        rows = [[s.token_id for s in steps] for steps in generate(FakeSession(logits), [1, 2], config, 0)]
        assert rows == [[None], [1, None]]  # log 0.6 = -0.51, and log(0.3 · 0.6) / 2 = -0.86
        assert calls == [2], early_stopping


def test_contrastive_search_takes_no_token_that_is_ruled_out() -> None:
    """Even where it has more candidates than there are tokens to choose."""
    allowed = {2, 5, 7}
    banned = [token for token in range(VOCAB) if token not in allowed]
    ((tokens, _),) = run({"penalty_alpha": 0.9, "top_k": 8, "suppress_tokens": banned, "max_new_tokens": 20})
    assert len(tokens) == 20 and set(tokens) <= allowed


def test_beams_are_all_different() -> None:
    rows = run({"num_beams": 6, "num_return_sequences": 6, "max_new_tokens": 7})
    assert len({tuple(tokens) for tokens, _ in rows}) == 6


def test_too_few_texts_to_return() -> None:
    options = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 2, "suppress_tokens": list(range(1, VOCAB))}
    with pytest.raises(ConfigError, match=r"only 1 of num_return_sequences=4 continuations exist"):
        run(options)


@pytest.mark.parametrize("method", METHODS)
def test_ruling_everything_out_is_an_error_for_every_method(method: str) -> None:
    with pytest.raises(ConfigError):
        run(METHODS[method] | {"suppress_tokens": list(range(VOCAB)), "max_new_tokens": 5})


@pytest.mark.parametrize("method", METHODS)
def test_custom_processors_see_the_text_so_far(method: str) -> None:
    seen = []

    def spy(ids: npt.NDArray[np.int64], logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        seen.append(ids.tolist())
        return logits

    run(METHODS[method] | {"logits_processor": spy, "max_new_tokens": 4})
    assert all(ids[:3] == [1, 2, 3] for ids in seen)
    assert {len(ids) for ids in seen} == {3, 4, 5, 6}
