"""Batches, reused prompts and states together with closing, cancelling, forking and long texts."""

import os
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import edgelm
from edgelm import ClosedError, ConfigError, Model
from edgelm.decoding.generation_config import GenerationConfig
from edgelm.decoding.scheduler import Scheduler
from tests.conftest import TINY_BUNDLE

PROMPT = list(range(20, 50))
PROMPTS: list[Any] = [PROMPT, [5, 6, 7], [9] * 12]


@pytest.fixture
def model() -> Iterator[Model]:
    with edgelm.load(TINY_BUNDLE, device="cpu", threads=1) as loaded:
        yield loaded


def fresh(prompt: Any, **options: Any) -> tuple[edgelm.Choice, ...]:
    with edgelm.load(TINY_BUNDLE, device="cpu", threads=1) as loaded:
        return loaded.generate(prompt, **options).choices


def test_a_closed_model_has_no_batches_and_no_states(model: Model, tmp_path: Path) -> None:
    model.save_state(tmp_path / "state", PROMPT)
    model.close()
    model.forget()
    for use in (
        lambda: model.generate_batch(["a"]),
        lambda: model.save_state(tmp_path / "other", PROMPT),
        lambda: model.load_state(tmp_path / "state"),
    ):
        with pytest.raises(ClosedError, match="the model is closed: load it again"):
            use()
    assert not (tmp_path / "other").exists()


def test_closing_ends_a_batch(model: Model) -> None:
    def closes(ids: Any, logits: Any) -> Any:
        if len(ids) > 15:
            model.close()
        return logits

    with pytest.raises(ClosedError):
        model.generate_batch(PROMPTS[1:], max_new_tokens=40, eos_token_id=(), logits_processor=closes)
    assert model._sessions._idle == []


def test_another_thread_closes_a_batch(model: Model) -> None:
    ends: list[str] = []

    def work() -> None:
        try:
            while True:
                model.generate_batch(PROMPTS, max_new_tokens=20)
        except ClosedError:
            ends.append("closed")

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    model.close()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert ends == ["closed"] * 3


class After:
    """A signal that is set after a number of calls of `is_set`."""

    def __init__(self, times: int) -> None:
        self.times = times

    def is_set(self) -> bool:
        self.times -= 1
        return self.times < 0


def test_a_cancelled_text_leaves_a_batch_and_the_others_go_on(model: Model) -> None:
    each: list[Any] = [{"cancel": After(4)}, {}, {"cancel": After(0)}]
    completions = model.generate_batch(PROMPTS, each=each, max_new_tokens=9, eos_token_id=())
    assert [completion.choices[0].finish_reason for completion in completions] == ["cancelled", "length", "cancelled"]
    assert 0 < len(completions[0].choices[0].token_ids) < 9 and completions[2].text == ""
    assert completions[1].choices == fresh(PROMPTS[1], max_new_tokens=9, eos_token_id=())


def test_a_batch_cut_by_time_or_by_one_signal_ends(model: Model) -> None:
    cancel = threading.Event()
    cancel.set()
    completions = model.generate_batch(PROMPTS, max_rows=1, cancel=cancel)
    assert [completion.choices[0].finish_reason for completion in completions] == ["cancelled"] * 3
    late = model.generate_batch(PROMPTS, max_rows=1, max_time=1e-9, max_new_tokens=30, eos_token_id=())
    assert {completion.choices[0].finish_reason for completion in late} == {"time"}


def test_long_prompts_of_a_batch_are_cut_as_alone(model: Model) -> None:
    long = [1 + i % 50 for i in range(200)]
    options: dict[str, Any] = {"context_overflow": "truncate", "pinned_tokens": 3, "max_new_tokens": 8}
    completions = model.generate_batch([long, [5, 6]], **options)
    alone = model.generate(long, **options)
    assert (
        completions[0].choices == alone.choices and completions[1].choices == model.generate([5, 6], **options).choices
    )
    assert completions[0].stats.dropped_tokens == alone.stats.dropped_tokens == 200 - 57
    assert completions[0].stats.prompt_tokens == alone.stats.prompt_tokens
    with pytest.raises(ConfigError, match="context_overflow='window' works on one prompt at a time"):
        model.generate_batch([long], context_overflow="window")


def test_a_scheduler_cuts_prompts_too(model: Model) -> None:
    scheduler = Scheduler(model.session.sibling(), max_rows=2)
    config = GenerationConfig().updated({"context_overflow": "truncate", "max_length": 210, "eos_token_id": ()})
    scheduler.submit([1 + i % 50 for i in range(200)], config, 0)
    steps = []
    while scheduler.pending:
        steps += scheduler.step()
    assert [turn.step.finish_reason for turn in steps if turn.step][-1] == "length" and len(steps) == 11


def test_a_window_reuses_what_is_there_and_leaves_nothing(model: Model, tmp_path: Path) -> None:
    options: dict[str, Any] = {"context_overflow": "window", "max_new_tokens": 100, "eos_token_id": (), "logprobs": 1}
    expected = fresh(PROMPT, **options)
    model.save_state(tmp_path / "state", PROMPT)
    model.load_state(tmp_path / "state")
    model.generate(PROMPT, max_new_tokens=3)
    completion = model.generate(PROMPT, **options)
    assert (completion.choices, completion.stats.reused_tokens) == (expected, len(PROMPT) - 2)
    model.forget()
    assert model.generate(PROMPT, max_new_tokens=3).choices == fresh(PROMPT, max_new_tokens=3)


def test_a_cut_prompt_is_reused_where_it_is_the_same(model: Model) -> None:
    options: dict[str, Any] = {"context_overflow": "truncate", "max_new_tokens": 8, "logprobs": 1}
    long = [1 + i % 47 for i in range(200)]
    model.generate(long, **options)
    again = model.generate(long, **options)
    assert again.stats.reused_tokens == 55 and again.choices == fresh(long, **options)
    other = model.generate([*long[1:], 7], **options)
    assert other.choices == fresh([*long[1:], 7], **options)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.3, "seed": 5}])
@pytest.mark.parametrize("pinned", [0, 1, 9])
def test_drafts_go_on_past_the_context(
    model: Model, monkeypatch: pytest.MonkeyPatch, pinned: int, options: dict[str, Any]
) -> None:
    """Most drafts are right, so that there are many. Some are wrong, before and after the window slides."""
    options = {**options, "context_overflow": "window", "pinned_tokens": pinned, "max_new_tokens": 400}
    options["eos_token_id"] = ()
    plain = model.generate(PROMPT, **options)
    text = [*PROMPT, *plain.choices[0].token_ids, *[0] * 10]

    def oracle(ids: Any, count: int) -> list[int]:
        places = range(len(ids), len(ids) + count)
        return [text[place] if place % 11 else (text[place] + 1) % 300 for place in places]

    monkeypatch.setattr("edgelm.decoding.prompt_lookup.continuation", oracle)
    drafted = model.generate(PROMPT, prompt_lookup_num_tokens=6, **options)
    assert drafted.choices == plain.choices
    assert drafted.stats.drafted_tokens > drafted.stats.accepted_tokens > 100


def test_drafts_end_when_cancelled(model: Model) -> None:
    completion = model.generate(
        [7, 8, 9] * 10, prompt_lookup_num_tokens=4, max_new_tokens=30, eos_token_id=(), cancel=After(5)
    )
    assert completion.choices[0].finish_reason == "cancelled"
    assert (
        completion.choices[0].token_ids
        == fresh([7, 8, 9] * 10, max_new_tokens=30, eos_token_id=())[0].token_ids[
            : len(completion.choices[0].token_ids)
        ]
    )


def test_a_prompt_cancelled_in_the_middle_is_reused_as_far_as_it_came() -> None:
    prompt = [1 + i % 200 for i in range(300)]
    with edgelm.load(threads=1) as model:
        expected = model.generate(prompt, max_new_tokens=5, do_sample=False).choices
        model.forget()
        left = model.generate(prompt, max_new_tokens=5, do_sample=False, cancel=After(2))
        assert left.choices[0].finish_reason == "cancelled"
        completion = model.generate(prompt, max_new_tokens=5, do_sample=False)
        assert completion.stats.reused_tokens == 128 and completion.choices == expected


def test_states_are_not_pickled_but_the_limit_is(tmp_path: Path) -> None:
    with edgelm.load(TINY_BUNDLE, device="cpu", threads=1, prefix_cache_bytes=10**6) as model:
        model.save_state(tmp_path / "state", PROMPT)
        model.load_state(tmp_path / "state")
        data = pickle.dumps(model)
    assert len(data) < 4000
    with pickle.loads(data) as copy:
        assert copy._sessions.states == [] and copy._sessions.limit_bytes == 10**6
        assert copy.generate(PROMPT, max_new_tokens=2).stats.reused_tokens == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_drops_prompts_and_keeps_states(model: Model, tmp_path: Path) -> None:
    model.save_state(tmp_path / "state", PROMPT[:10])
    model.load_state(tmp_path / "state")
    expected = model.generate(PROMPT, max_new_tokens=4)
    stream = model.stream([*PROMPT, 3, 4], max_new_tokens=4)
    next(stream)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            del stream
            assert model._sessions._idle == []
            completion = model.generate(PROMPT, max_new_tokens=4)
            assert (completion.choices, completion.stats.reused_tokens) == (expected.choices, 10)
            assert model.generate(PROMPT, max_new_tokens=4).stats.reused_tokens == 28
            assert model.generate_batch([PROMPT], max_new_tokens=4)[0].choices == expected.choices
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert list(stream)
    assert model.generate(PROMPT, max_new_tokens=4).stats.reused_tokens > 10
