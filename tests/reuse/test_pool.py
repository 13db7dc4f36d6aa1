"""A prompt that begins like an earlier prompt is computed from the first difference, with equal results."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import edgelm
from edgelm import Bundle, Completion, Model
from edgelm.engine.graph import Graph
from edgelm.ids import shared_tokens
from edgelm.reuse.pool import SessionPool
from edgelm.reuse.state import PromptState
from tests.conftest import TINY_BUNDLE

PROMPT = list(range(20, 50))


@pytest.fixture
def model() -> Model:
    return edgelm.load(TINY_BUNDLE, device="cpu", threads=1)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return Graph.open(Bundle.read(TINY_BUNDLE), device="cpu", threads=1)


def fresh(prompt: list[int], **options: Any) -> Completion:
    return edgelm.load(TINY_BUNDLE, device="cpu", threads=1).generate(prompt, **options)


def test_two_tokens_are_always_left_and_two_always_shared() -> None:
    assert shared_tokens([1, 2, 3, 4], [1, 2, 3, 4]) == 2
    assert shared_tokens([1, 2, 3, 4], [1, 2, 3, 4, 5, 6]) == 4
    assert shared_tokens([1, 2, 3, 9], [1, 2, 3, 4, 5, 6]) == 3
    assert shared_tokens([1, 9, 3], [1, 2, 3, 4, 5]) == shared_tokens([], [1, 2, 3]) == 0
    assert shared_tokens([1], [1, 2, 3, 4]) == shared_tokens([1, 2, 3], [1, 2, 3]) == 0


@given(st.lists(st.integers(0, 2), max_size=9), st.lists(st.integers(0, 2), max_size=9))
def test_what_is_shared_is_shared(held: list[int], prompt: list[int]) -> None:
    count = shared_tokens(held, prompt)
    assert held[:count] == prompt[:count]
    assert count == 0 or 2 <= count <= len(prompt) - 2


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"temperature": 2.0, "seed": 1, "num_return_sequences": 2}])
def test_a_shared_beginning_is_not_computed_again(model: Model, options: dict[str, Any]) -> None:
    options = {**options, "max_new_tokens": 8}
    model.generate(PROMPT, **options)
    other = [*PROMPT[:20], 7, 8, 9]
    completion = model.generate(other, **options)
    assert completion.stats.reused_tokens == 20
    assert completion.choices == fresh(other, **options).choices
    assert model.generate(other, **options).stats.reused_tokens == 21
    model.forget()
    again = model.generate(other, **options)
    assert again.stats.reused_tokens == 0 and again.choices == completion.choices


def test_tokens_that_came_one_at_a_time_are_computed_again(model: Model) -> None:
    first = model.generate(PROMPT[:10], max_new_tokens=20, eos_token_id=(), logprobs=1)
    longer = [*PROMPT[:10], *first.choices[0].token_ids]
    completion = model.generate(longer, max_new_tokens=5, logprobs=1)
    assert completion.stats.reused_tokens == 10
    assert completion.choices == fresh(longer, max_new_tokens=5, logprobs=1).choices


def test_searches_and_scores_are_not_disturbed(model: Model) -> None:
    expected = fresh(PROMPT, max_new_tokens=5, penalty_alpha=0.5, top_k=3).choices
    score = model.score(PROMPT[:10], PROMPT[10:])
    model.generate(PROMPT, max_new_tokens=5)
    assert model.score(PROMPT[:10], PROMPT[10:]) == score
    model.generate(PROMPT, max_new_tokens=5)
    assert model.generate(PROMPT, max_new_tokens=5, penalty_alpha=0.5, top_k=3).choices == expected


def test_the_limit_bounds_what_is_kept(graph: Graph) -> None:
    bytes_per_token = graph.session().bytes_per_token

    def use(pool: SessionPool, first: int) -> int:
        with pool.borrowed([first, *PROMPT]) as (lent, reused):
            lent.step([first, *PROMPT][reused:])
            return reused

    small = SessionPool(graph)
    assert [use(small, first) for first in (0, 1, 0, 0)] == [0, 0, 0, 29]
    assert small.idle_bytes == 31 * bytes_per_token
    large = SessionPool(graph, limit_bytes=3 * 31 * bytes_per_token)
    assert [use(large, first) for first in (0, 1, 2, 0, 1, 2)] == [0, 0, 0, 29, 29, 29]
    assert [use(large, first) for first in (3, 0, 1)] == [0, 0, 0], "the one used least lately goes first"
    assert large.idle_bytes == 3 * 31 * bytes_per_token


def test_of_sessions_that_come_back_together_the_first_goes(graph: Graph) -> None:
    """Three are lent at the same time, and the limit has room for two."""
    pool = SessionPool(graph, limit_bytes=2 * 31 * graph.session().bytes_per_token)
    prompts = [[first, *PROMPT] for first in range(3)]
    with pool.borrowed(prompts[0]) as (a, _), pool.borrowed(prompts[1]) as (b, _), pool.borrowed(prompts[2]) as (c, _):
        for session, prompt in zip((a, b, c), prompts, strict=True):
            session.step(prompt)
    reused = []
    for prompt in (prompts[1], prompts[0], prompts[2]):  # the last one lent came back first
        with pool.borrowed(prompt) as (lent, count):
            lent.step(prompt[count:])
            reused.append(count)
    assert reused == [29, 29, 0]


def test_a_session_that_began_behind_something_else_holds_no_prompt(graph: Graph) -> None:
    other = graph.session()
    other.step(PROMPT[:4])
    pool = SessionPool(graph)
    with pool.borrowed(PROMPT) as (lent, _):
        lent.begin_after(other.remembered(4))
        lent.step(PROMPT)
    with pool.borrowed(PROMPT) as (_, reused):
        assert reused == 0


def test_a_session_from_before_a_fork_is_not_kept(graph: Graph) -> None:
    pool = SessionPool(graph)
    with pool.borrowed(PROMPT) as (lent, _):
        lent.step(PROMPT)
        pool.after_fork()
    assert pool.idle_bytes == 0


def test_threads_may_share_a_pool() -> None:
    model = edgelm.load(TINY_BUNDLE, device="cpu", threads=1, prefix_cache_bytes=10**6)
    rng = np.random.default_rng(0)
    prompts = [[*PROMPT[: int(cut)], *rng.integers(0, 300, 6).tolist()] for cut in rng.integers(0, 30, 8)]
    expected = [fresh(prompt, max_new_tokens=10, logprobs=1).choices for prompt in prompts]
    wrong: list[int] = []

    def work(seed: int) -> None:
        for place in np.random.default_rng(seed).integers(0, 8, 20).tolist():
            if model.generate(prompts[place], max_new_tokens=10, logprobs=1).choices != expected[place]:
                wrong.append(place)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_limit_counts_what_was_rewound(graph: Graph) -> None:
    bytes_per_token = graph.session().bytes_per_token
    pool = SessionPool(graph, limit_bytes=100 * bytes_per_token)
    with pool.borrowed(PROMPT) as (lent, _):
        lent.step([*PROMPT, 1, 2, 3])
        lent.rewind(3)
    assert pool.idle_bytes == (len(PROMPT) + 3) * bytes_per_token


def test_calls_that_leave_nothing_to_reuse_do_not_push_prompts_out(graph: Graph) -> None:
    bytes_per_token = graph.session().bytes_per_token
    pool = SessionPool(graph, limit_bytes=2 * 31 * bytes_per_token)
    with pool.borrowed(PROMPT) as (lent, _):
        lent.step(PROMPT)
    for _ in range(20):
        with pool.borrowed() as (lent, _):
            lent.step(PROMPT[:20])
    assert pool.idle_bytes == (len(PROMPT) + 20) * bytes_per_token
    with pool.borrowed([*PROMPT, 5, 6]) as (_, reused):
        assert reused == len(PROMPT)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_borrows_while_a_thread_of_its_parent_chose_a_session() -> None:
    """The lock stays locked in the child, so the child has a new one."""
    model = edgelm.load(TINY_BUNDLE, device="cpu", threads=1)
    expected = model.generate(PROMPT, max_new_tokens=4).choices
    locked, over = threading.Event(), threading.Event()

    def choose() -> None:
        with model._sessions._lock:
            locked.set()
            over.wait(30)

    thread = threading.Thread(target=choose, daemon=True)
    thread.start()
    assert locked.wait(20)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if model.generate(PROMPT, max_new_tokens=4).choices == expected else 1)
    status = os.waitpid(child, 0)[1]
    over.set()
    thread.join(20)
    assert status == 0


OPERATIONS: dict[str, Callable[[SessionPool], object]] = {
    "states": lambda pool: pool.states,
    "add": lambda pool: pool.add(PromptState((1, 2), np.zeros((4, 4, 2, 8), np.float32))),
    "forget": lambda pool: pool.forget(),
}


@pytest.mark.skipif(sys.platform != "linux", reason="forks with the C library of Linux")
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_child_that_c_code_forked_does_not_wait_for_the_parents_lock(graph: Graph, name: str) -> None:
    pool = SessionPool(graph)
    locked, over = threading.Event(), threading.Event()

    def hold() -> None:
        with pool._lock:
            locked.set()
            over.wait(30)

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    assert locked.wait(20)
    child = ctypes.PyDLL(None).fork()  # calls no hook of Python's
    if child == 0:
        try:
            signal.alarm(20)
            OPERATIONS[name](pool)
        finally:
            os._exit(0 if sys.exception() is None else 1)
    status = os.waitpid(child, 0)[1]
    over.set()
    thread.join(20)
    assert status == 0


def test_without_a_limit_one_session_is_kept(graph: Graph) -> None:
    pool = SessionPool(graph)
    with pool.borrowed(PROMPT) as (first, _), pool.borrowed(PROMPT) as (second, _):
        first.step(PROMPT)
        second.step(PROMPT)
    assert pool.idle_bytes == len(PROMPT) * second.bytes_per_token


def test_a_closed_pool_lends_nothing() -> None:
    pool = SessionPool(Graph.open(Bundle.read(TINY_BUNDLE), device="cpu", threads=1))
    with pool.borrowed(PROMPT) as (lent, _):
        lent.step(PROMPT)
    assert not pool.closed and pool.idle_bytes > 0
    pool.close()
    assert pool.closed and pool.idle_bytes == 0
    with pytest.raises(edgelm.ClosedError, match="the model is closed"), pool.borrowed(PROMPT):
        pass


def test_keys_share_sessions_but_no_prompts(graph: Graph) -> None:
    pool = SessionPool(graph, limit_bytes=10**9)

    def use(key: str) -> int:
        with pool.borrowed(PROMPT, key=key) as (lent, reused):
            lent.step(PROMPT[reused:])
            return reused

    assert [use(key) for key in ("a", "b", "a", "b", "", "")] == [0, 0, 28, 28, 0, 28]
    assert len(pool._idle) == 3
    pool.forget()
    assert len(pool._idle) == 1 and use("c") == 0 and len(pool._idle) == 1


def test_a_sibling_shares_states_and_nothing_else(tmp_path: Path) -> None:
    with edgelm.load(TINY_BUNDLE, device="cpu", threads=1) as model:
        model.save_state(tmp_path / "state", PROMPT[:20])
        model.generate(PROMPT, max_new_tokens=2)
        sibling = model._sessions.sibling(0)
        with sibling.borrowed(PROMPT) as (lent, reused):
            assert reused == 0
            lent.step(PROMPT)
        state = model.load_state(tmp_path / "state")
        assert sibling.states == [state]
        with sibling.borrowed([*PROMPT[:20], 1, 2, 3]) as (_, reused):
            assert reused == 20
        sibling.close()
        with pytest.raises(edgelm.ClosedError), sibling.borrowed():
            pass
        assert sibling.idle_bytes == 0 and model._sessions.states == [state]
        assert model.generate(PROMPT, max_new_tokens=2).stats.reused_tokens == 28


def test_a_session_is_lent_to_one_at_a_time(graph: Graph) -> None:
    """Neither one that holds the prompt, nor one that remembers nothing, nor one that is used for something else."""
    pool = SessionPool(graph, limit_bytes=10**9)
    with pool.borrowed(PROMPT) as (lent, _), pool.borrowed() as (empty, _):
        lent.step(PROMPT)
        empty.step([1, 2])
    for prompt in ([*PROMPT, 5, 6], [9, 9, 9], [*PROMPT, 7, 8]):
        with pool.borrowed(prompt) as (first, _), pool.borrowed(prompt) as (second, _), pool.borrowed() as (third, _):
            assert len({id(first), id(second), id(third)}) == 3
    pool.forget()
    assert len(pool._idle) == 1
    small = SessionPool(graph)
    with small.borrowed(PROMPT) as (lent, _):
        lent.step(PROMPT)
    with small.borrowed([9, 9, 9]) as (first, _), small.borrowed([9, 9, 9]) as (second, _):
        assert first is lent and second is not first


def test_a_session_without_a_prompt_goes_first(graph: Graph) -> None:
    """Both cannot stay, although the one without a prompt came back earlier."""
    pool = SessionPool(graph, limit_bytes=40 * graph.session().bytes_per_token)
    with pool.borrowed(PROMPT) as (lent, _):
        lent.step(PROMPT)
        with pool.borrowed() as (other, _):
            other.step(PROMPT[:20])
    with pool.borrowed([*PROMPT, 5, 6]) as (_, reused):
        assert reused == len(PROMPT)


def test_a_models_session_is_nobody_elses() -> None:
    with edgelm.load(TINY_BUNDLE, device="cpu", threads=1) as model:
        expected = model.generate(PROMPT, max_new_tokens=9).choices
        model.session.step(PROMPT)
        model.session.begin_after(model.session.remembered(20))
        for _ in range(2):
            model.forget()
            assert model.generate(PROMPT, max_new_tokens=9).choices == expected


@pytest.mark.parametrize("limit", ["x", None, -1, 1.5, True])
def test_the_limit_is_checked(limit: Any) -> None:
    with pytest.raises(edgelm.ConfigError, match="prefix_cache_bytes must be a whole number from 0"):
        edgelm.load(TINY_BUNDLE, prefix_cache_bytes=limit)
