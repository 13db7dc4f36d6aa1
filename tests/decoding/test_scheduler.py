"""Continuous batching: a text gets the same tokens beside any other texts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from edgelm import (
    Bundle,
    ConfigError,
    ContextError,
    GenerationConfig,
    InsufficientMemoryError,
    PromptError,
    Session,
)
from edgelm.bundle.folder import default_bundle_path
from edgelm.decoding.draft_model import DraftModel, ModelDrafts
from edgelm.decoding.drafts import DraftAccount
from edgelm.decoding.loop import generate
from edgelm.decoding.request import Step
from edgelm.decoding.scheduler import Handle, Scheduler
from edgelm.engine.graph import Graph
from edgelm.reuse.pool import SessionPool
from edgelm.reuse.state import PromptState
from tests.conftest import TINY_BUNDLE

Tokens = list[int | None]


@pytest.fixture(scope="module")
def tiny() -> Session:
    return Graph.open(Bundle.read(TINY_BUNDLE), device="cpu", threads=1).session()


@pytest.fixture(scope="module")
def int8() -> Session:
    return Graph.open(Bundle.read(default_bundle_path()), device="cpu", threads=1).session()


def config(**options: Any) -> GenerationConfig:
    return GenerationConfig().updated(options)


def prompts(count: int, longest: int = 40) -> list[list[int]]:
    rng = np.random.default_rng(4)
    return [rng.integers(1, 300, rng.integers(1, longest)).tolist() for _ in range(count)]


def alone(session: Session, prompt: list[int], options: GenerationConfig, seed: int) -> list[Step]:
    (steps,) = (list(row) for row in generate(session.sibling(), prompt, options, seed))
    return steps


def run(scheduler: Scheduler, steps: dict[Handle, list[Step]]) -> None:
    """Run one step of the scheduler, and add its turns to `steps`."""
    for turn in scheduler.step():
        assert turn.error is None and turn.step is not None
        steps.setdefault(turn.handle, []).append(turn.step)


class Lent:
    """Lends a session of the same graph as the small model; with `agreeing` False, one whose tokens come out wrong."""

    def __init__(self, session: Session, *, step_cost: float = 0.01, agreeing: bool = True) -> None:
        self.out = 0
        self._session, self._step_cost, self._agreeing = session, step_cost, agreeing

    @contextmanager
    def borrowed(self) -> Iterator[DraftModel]:
        small = self._session.sibling()
        if not self._agreeing:
            step_all, step = small.step_all, small.step
            small.step_all = lambda ids: np.roll(step_all(ids), 1, axis=-1)  # type: ignore[method-assign]
            small.step = lambda ids, **_: np.roll(step(ids), 1)  # type: ignore[method-assign]
        self.out += 1
        yield DraftModel(small, self._step_cost, self._session.vocab_size)
        self.out -= 1


@pytest.fixture
def sure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models are sure of all they guess."""
    monkeypatch.setattr("edgelm.decoding.draft_model._probability", lambda logits, token: 0.99)


def ids(steps: list[Step]) -> list[tuple[int | None, str | None]]:
    return [(step.token_id, step.finish_reason) for step in steps]


@pytest.mark.usefixtures("sure")
@pytest.mark.parametrize("agreeing", [True, False])
def test_drafts_change_no_token(tiny: Session, agreeing: bool) -> None:
    """Texts that come and go, of every number side by side, whether the small model guesses right or wrong."""
    kinds: list[dict[str, Any]] = [{}, {"temperature": 1.2}, {"mirostat_tau": 4.0}, {"repetition_penalty": 1.2}]
    for rows in (1, 2, 3, 8):
        lent, texts, drafted, true = Lent(tiny, agreeing=agreeing), prompts(12), 0, 0
        scheduler, steps = Scheduler(tiny, max_rows=rows, draft_models=lent), dict[Handle, list[Step]]()
        options = [config(max_new_tokens=3 * place, eos_token_id=[7, 8], **kinds[place % 4]) for place in range(12)]
        handles = []
        for place in range(12):
            handles.append(scheduler.submit(texts[place], options[place], seed=place))
            for _ in range(place % 3):
                run(scheduler, steps)
        while scheduler.pending:
            run(scheduler, steps)
        for place, handle in enumerate(handles):
            assert ids(steps[handle]) == ids(alone(tiny, texts[place], options[place], place)), (rows, place)
            drafted += sum(step.drafted for step in steps[handle])
            true += sum(step.was_drafted for step in steps[handle])
        assert lent.out == 0
        if rows == 1:
            assert drafted > 20 and (true > 0.6 * drafted if agreeing else true < 0.2 * drafted)


@pytest.mark.usefixtures("sure")
@pytest.mark.parametrize("first, second", [(30, 10), (10, 30)])
def test_a_text_takes_drafts_while_it_decodes_alone(tiny: Session, first: int, second: int) -> None:
    """It may be the first or the second text of the batch."""
    lent = Lent(tiny)
    scheduler, steps = Scheduler(tiny, max_rows=2, draft_models=lent), dict[Handle, list[Step]]()
    options = [config(max_new_tokens=count, eos_token_id=()) for count in (first, second)]
    handles = [scheduler.submit([1, 2, 3], each, 0) for each in options]
    while scheduler.pending:
        run(scheduler, steps)
    beside = [step for of_text in steps.values() for step in of_text[:10]]
    assert not any(step.drafted for step in beside) and lent.out == 0
    drafted = [sum(step.drafted for step in steps[handle]) for handle in handles]
    assert (drafted[0] > 5, drafted[1] > 5) == (first > second, first < second)
    assert [len(steps[handle]) for handle in handles] == [first + 1, second + 1]


@pytest.mark.usefixtures("sure")
def test_each_draft_is_paid_for_once(tiny: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another text comes after a draft, and the first text goes on without drafts for a while."""
    drafts, settled = list[list[int]](), list[float]()
    draft, settle = ModelDrafts.draft, DraftAccount.settle

    def drafting(*given: Any) -> list[int]:
        drafts.append(draft(*given))
        return drafts[-1]

    def settling(account: DraftAccount, tokens: int, right: int, cost: float) -> None:
        settled.append(cost)
        settle(account, tokens, right, cost)

    monkeypatch.setattr(ModelDrafts, "draft", drafting)
    monkeypatch.setattr(DraftAccount, "settle", settling)
    scheduler = Scheduler(tiny, max_rows=2, draft_models=Lent(tiny))
    scheduler.submit([1, 2, 3], config(max_new_tokens=40, eos_token_id=()), 0)
    while not any(drafts):
        scheduler.step()
    scheduler.submit([4, 5, 6], config(max_new_tokens=8, eos_token_id=()), 0)
    while scheduler.pending:
        scheduler.step()
    assert sum(map(bool, drafts)) > 2 and len(settled) == len(drafts)


@pytest.mark.usefixtures("sure")
def test_drafts_fill_the_context_and_no_more(tiny: Session) -> None:
    whole = list(range(1, tiny.context_length + 1))
    for count in (64, 63, 9):
        scheduler, steps = Scheduler(tiny, draft_models=Lent(tiny)), dict[Handle, list[Step]]()
        handle = scheduler.submit(whole[:count], config(max_new_tokens=200, eos_token_id=()), 0)
        while scheduler.pending:
            run(scheduler, steps)
        assert len(steps[handle]) == 64 + 2 - count
        assert steps[handle][-1].finish_reason == "context"


def test_an_error_of_a_small_model_ends_its_own_text_only(tiny: Session) -> None:
    class Fails(Lent):
        @contextmanager
        def borrowed(self) -> Iterator[DraftModel]:
            if scheduler.pending == 2:  # the text that decodes, and the one that waits for its row
                raise InsufficientMemoryError("there is no memory left")
            with super().borrowed() as model:
                yield model

    scheduler = Scheduler(tiny, max_rows=1, draft_models=Fails(tiny))
    bad, good = (scheduler.submit([place, 2, 3], config(max_new_tokens=9, eos_token_id=()), 0) for place in (1, 2))
    turns = []
    while scheduler.pending:
        turns += scheduler.step()
    assert [(turn.handle, str(turn.error)) for turn in turns if turn.error] == [(bad, "there is no memory left")]
    assert [len([turn for turn in turns if turn.handle == handle]) for handle in (bad, good)] == [2, 10]


def test_texts_that_come_and_go_get_what_they_get_alone(tiny: Session) -> None:
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.5},
        {"top_k": 5, "repetition_penalty": 1.2},
        {"mirostat_tau": 4.0},
        {"logprobs": 2},
    ]
    lengths = np.random.default_rng(1).integers(0, 30, 25)
    options = [
        config(max_new_tokens=int(n), eos_token_id=list(range(30)), **kinds[at % 5]) for at, n in enumerate(lengths)
    ]
    texts = prompts(25)
    scheduler, steps = Scheduler(tiny, max_rows=5), dict[Handle, list[Step]]()
    handles = []
    for place, (prompt, requested) in enumerate(zip(texts, options, strict=True)):
        handles.append(scheduler.submit(prompt, requested, seed=place))
        for _ in range(place % 4):
            run(scheduler, steps)
    while scheduler.pending:
        run(scheduler, steps)
    for place, handle in enumerate(handles):
        assert steps[handle] == alone(tiny, texts[place], options[place], place), place
    assert scheduler.step() == []


@pytest.mark.parametrize("neighbours", [0, 1, 2, 7])
def test_int8_ids_do_not_depend_on_the_neighbours(int8: Session, neighbours: int) -> None:
    """Log-probabilities, which show the last bits, do not depend on them either."""
    texts = prompts(9)
    requested = config(max_new_tokens=25, logprobs=3)

    def with_neighbours(count: int, *, late: bool) -> list[Step]:
        scheduler, steps = Scheduler(int8, max_rows=8), dict[Handle, list[Step]]()
        for prompt in texts[1 : 1 + count]:
            scheduler.submit(prompt, config(max_new_tokens=7 if late else 40), 0)
        for _ in range(3 * late):
            scheduler.step()
        handle = scheduler.submit(texts[0], requested, 0)
        while scheduler.pending:
            run(scheduler, steps)
        return steps[handle]

    by_itself = with_neighbours(0, late=False)
    assert len(by_itself) == 26
    assert with_neighbours(neighbours, late=False) == with_neighbours(neighbours, late=True) == by_itself


def counted_calls(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the number of prompts of every call which computes several together."""
    calls, prefill = list[int](), scheduler._batch.prefill

    def counting(first_row: int, ids: Any) -> Any:
        calls.append(len(ids))
        return prefill(first_row, ids)

    monkeypatch.setattr(scheduler._batch, "prefill", counting)
    return calls


@pytest.mark.parametrize("name", ["tiny", "int8"])
def test_short_prompts_are_computed_together(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each text gets what it gets when its prompt is computed alone, to the last bit of its log-probabilities."""
    session: Session = request.getfixturevalue(name)
    texts = [[1 + place * number % 290 for number in range(1, length)] for place, length in enumerate([9, 5, 12, 3, 8])]
    texts += [[5], [6, 7, 8, 9]]  # one token alone has a kernel of its own
    options = config(max_new_tokens=12, logprobs=3, eos_token_id=())

    def steps_of(submitted: list[list[int]], rows: int) -> tuple[list[list[Step]], list[int]]:
        scheduler, steps = Scheduler(session.sibling(), max_rows=rows), dict[Handle, list[Step]]()
        calls = counted_calls(scheduler, monkeypatch)
        handles = [scheduler.submit(text, options, place) for place, text in enumerate(submitted)]
        while scheduler.pending:
            run(scheduler, steps)
        return [steps[handle] for handle in handles], calls

    one_by_one, none = steps_of(texts, 1)
    together, calls = steps_of(texts, 8)
    assert together == one_by_one
    assert (none, calls) == ([], [5])
    assert steps_of(texts, 3)[0] == one_by_one


@pytest.mark.parametrize(
    "lengths, together",
    [
        ([8] * 8, [8]),
        ([64] * 6, [4]),  # no more tokens in a call than of a long prompt; two are left
        ([8, 8, 60], [2]),
        ([60, 2, 2], [2]),
        ([60, 8, 60], []),
    ],
)
def test_prompts_are_computed_together_where_that_saves_time(
    int8: Session, lengths: list[int], together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = Scheduler(int8.sibling(), max_rows=8)
    calls = counted_calls(scheduler, monkeypatch)
    for place, length in enumerate(lengths):
        text = [1 + (place * 31 + number * (place + 1)) % 290 for number in range(length)]
        scheduler.submit(text, config(max_new_tokens=1, eos_token_id=()), 0)
    scheduler.step()
    assert calls == together


def test_fewer_prompts_are_computed_together_where_memory_is_limited(
    tiny: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = tiny.sibling()
    monkeypatch.setattr(session._graph, "piece_tokens", 32)
    scheduler = Scheduler(session, max_rows=8)
    calls = counted_calls(scheduler, monkeypatch)
    for place in range(8):
        scheduler.submit([1 + place + number for number in range(9)], config(max_new_tokens=1), 0)
    scheduler.step()
    assert calls == [3, 3, 2]


def test_what_prompts_have_in_common_is_computed_once(tiny: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """A common beginning of 30 tokens is worth more than a call for all."""
    scheduler, turns = Scheduler(tiny.sibling(), max_rows=4), []
    calls = counted_calls(scheduler, monkeypatch)
    common = list(range(20, 50))
    for place in range(3):
        scheduler.submit([*common, 7 + place, 8, 9], config(max_new_tokens=2), 0)
    while scheduler.pending:
        turns += scheduler.step()
    assert calls == []
    assert sum(turn.reused_tokens for turn in turns) == 60


def test_prompts_together_begin_behind_what_is_known(tiny: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both prompts share a call, in which the first one needs only the tokens after its saved state."""
    common = list(range(20, 50))
    session = tiny.sibling()
    session.step(common)
    state = PromptState(tuple(common), session.remembered(30))
    texts = [[*common, 7, 8, 9], [3, 4, 5, 6]]
    options = config(max_new_tokens=6, logprobs=2, eos_token_id=())

    def steps_of(rows: int) -> list[list[Step]]:
        monkeypatch.setattr("edgelm.decoding.scheduler._TOKEN_COST", 0.001)
        scheduler, steps = Scheduler(tiny.sibling(), max_rows=rows, states=[state]), dict[Handle, list[Step]]()
        calls = counted_calls(scheduler, monkeypatch)
        handles = [scheduler.submit(text, options, 0) for text in texts]
        reused = list[int]()
        while scheduler.pending:
            for turn in scheduler.step():
                assert turn.step is not None
                steps.setdefault(turn.handle, []).append(turn.step)
                reused.append(turn.reused_tokens)
        assert calls == ([2] if rows > 1 else []) and sum(reused) == 30
        return [steps[handle] for handle in handles]

    assert steps_of(2) == steps_of(1)


def test_a_long_prompt_does_not_hold_up_the_others(tiny: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgelm.ids.PREFILL_CHUNK_TOKENS", 8)
    monkeypatch.setattr("edgelm.decoding.scheduler.PREFILL_CHUNK_TOKENS", 8)
    long = list(range(1, 50))
    scheduler, steps = Scheduler(tiny, max_rows=4), dict[Handle, list[Step]]()
    first = scheduler.submit([5, 6, 7], config(max_new_tokens=20), 0)
    run(scheduler, steps)
    second = scheduler.submit(long, config(max_new_tokens=5), 0)
    while second not in steps:
        run(scheduler, steps)
    assert 6 <= len(steps[first]) <= 9
    while scheduler.pending:
        run(scheduler, steps)
    assert steps[second] == alone(tiny, long, config(max_new_tokens=5), 0)


def test_rows_of_one_prompt_share_its_computation(tiny: Session) -> None:
    requested = config(max_new_tokens=10, temperature=2.0)
    scheduler, steps = Scheduler(tiny, max_rows=3), dict[Handle, list[Step]]()
    handles = [scheduler.submit(list(range(9, 30)), requested, 5, row=row) for row in range(3)]
    while scheduler.pending:
        run(scheduler, steps)
    many = config(max_new_tokens=10, temperature=2.0, num_return_sequences=3)
    rows = [list(row) for row in generate(tiny.sibling(), list(range(9, 30)), many, 5)]
    assert [steps[handle] for handle in handles] == rows


def test_cancelled_texts_have_no_more_turns(tiny: Session) -> None:
    scheduler, steps = Scheduler(tiny, max_rows=2), dict[Handle, list[Step]]()
    texts = prompts(5)
    handles = [scheduler.submit(prompt, config(max_new_tokens=12), 0) for prompt in texts]
    run(scheduler, steps)
    counts = {handle: len(steps.get(handle, [])) for handle in handles}
    for handle in (handles[0], handles[2], handles[0], 999):
        scheduler.cancel(handle)
    assert scheduler.pending == 3
    while scheduler.pending:
        run(scheduler, steps)
    for place, handle in enumerate(handles):
        if place in (0, 2):
            assert len(steps.get(handle, [])) == counts[handle]
        else:
            assert steps[handle] == alone(tiny, texts[place], config(max_new_tokens=12), 0)


@pytest.mark.parametrize("shared", [0, 20, 49])
def test_a_prompt_cancelled_halfway_leaves_nothing_behind(
    tiny: Session, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the rest of it is computed for the next prompt, nor counts what was never computed as computed."""
    monkeypatch.setattr("edgelm.ids.PREFILL_CHUNK_TOKENS", 8)
    monkeypatch.setattr("edgelm.decoding.scheduler.PREFILL_CHUNK_TOKENS", 8)
    long = list(range(1, 50))
    other = [*long[:shared], *range(200, 249 - shared)]
    scheduler, steps = Scheduler(tiny.sibling(), max_rows=2), dict[Handle, list[Step]]()
    cancelled = scheduler.submit(long, config(max_new_tokens=5), 0)
    assert scheduler.step() == []  # 8 of 49 tokens are computed
    scheduler.cancel(cancelled)
    next_one = scheduler.submit(other, config(max_new_tokens=5), 0)
    while scheduler.pending:
        run(scheduler, steps)
    assert steps == {next_one: alone(tiny, other, config(max_new_tokens=5), 0)}


def test_the_longest_computed_beginning_is_used(tiny: Session) -> None:
    """A saved state of 12 tokens serves the first text, and what the first text computed the second."""
    text, session = list(range(20, 50)), tiny.sibling()
    session.step(text[:12])
    state = PromptState(tuple(text[:12]), session.remembered(12))
    scheduler, reused = Scheduler(tiny.sibling(), max_rows=1, states=[state]), dict[Handle, list[int]]()
    handles = [scheduler.submit(prompt, config(max_new_tokens=3), 0) for prompt in (text, [*text, 7, 8])]
    while scheduler.pending:
        for turn in scheduler.step():
            reused.setdefault(turn.handle, []).append(turn.reused_tokens)
    assert reused == {handles[0]: [12, 0, 0, 0], handles[1]: [30, 0, 0, 0]}


@pytest.mark.parametrize("limit_tokens, last", [(0, 0), (200, 30)])
def test_a_pool_may_lend_the_sessions_and_keys_share_nothing(tiny: Session, limit_tokens: int, last: int) -> None:
    """Without memory for more, the pool keeps the last prompt only."""
    pool = SessionPool(tiny._graph, limit_bytes=limit_tokens * tiny.bytes_per_token)  # type: ignore[arg-type]
    text, options = list(range(20, 50)), config(max_new_tokens=3)
    for sessions in (pool, None):
        scheduler, reused = Scheduler(tiny.sibling(), max_rows=1, sessions=sessions), list[int]()
        for key in ("a", "a", "b", "b", "a"):
            scheduler.add(scheduler.request([*text, 7, 8], options, 0), key=key)
            turns = []
            while scheduler.pending:
                turns += scheduler.step()
            assert [turn.step for turn in turns] == alone(tiny, [*text, 7, 8], options, 0)
            reused.append(turns[0].reused_tokens)
        assert reused == [0, 30, 0, 30, last if sessions else 0]


def test_a_prompt_cancelled_halfway_gives_its_session_back(tiny: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgelm.ids.PREFILL_CHUNK_TOKENS", 8)
    monkeypatch.setattr("edgelm.decoding.scheduler.PREFILL_CHUNK_TOKENS", 8)
    pool, long = SessionPool(tiny._graph), list(range(1, 50))  # type: ignore[arg-type]
    scheduler = Scheduler(tiny.sibling(), max_rows=2, sessions=pool)
    cancelled = scheduler.add(scheduler.request(long, config(max_new_tokens=5), 0))
    assert (scheduler.step(), scheduler.waiting_tokens, scheduler.free_rows) == ([], 49, 1)
    assert scheduler.first_waiting == cancelled and pool.idle_bytes == 0
    scheduler.cancel(cancelled)
    left: tuple[Handle | None, int, int] = (scheduler.first_waiting, scheduler.waiting_tokens, scheduler.free_rows)
    assert left == (None, 0, 2)
    assert pool.idle_bytes == 8 * tiny.bytes_per_token


def test_an_error_ends_its_own_text_only(tiny: Session) -> None:
    def fails(ids: Any, logits: Any) -> Any:
        if len(ids) > 5:
            raise RuntimeError("no more")
        return logits

    scheduler = Scheduler(tiny, max_rows=2)
    bad = scheduler.submit([1, 2, 3], config(max_new_tokens=9, logits_processor=fails), 0)
    good = scheduler.submit([4, 5, 6], config(max_new_tokens=9), 0)
    turns = []
    while scheduler.pending:
        turns += scheduler.step()
    assert [str(turn.error) for turn in turns if turn.error is not None] == ["no more"]
    assert [turn.handle for turn in turns if turn.handle == bad] == [bad] * 4
    assert [t.step for t in turns if t.handle == good] == alone(tiny, [4, 5, 6], config(max_new_tokens=9), 0)


def test_a_text_may_fill_the_context(tiny: Session) -> None:
    whole = list(range(1, tiny.context_length + 1))
    scheduler, steps = Scheduler(tiny, max_rows=2), dict[Handle, list[Step]]()
    handles = [scheduler.submit(whole[:count], config(max_new_tokens=200), 0) for count in (64, 60)]
    while scheduler.pending:
        run(scheduler, steps)
    assert [len(steps[handle]) for handle in handles] == [2, 6]
    assert all(steps[handle][-1].finish_reason == "context" for handle in handles)


def test_what_cannot_be_done_is_refused_when_it_is_submitted(tiny: Session) -> None:
    scheduler = Scheduler(tiny)
    with pytest.raises(ContextError, match="the prompt has 65 tokens"):
        scheduler.submit([1] * 65, config(), 0)
    with pytest.raises(PromptError, match="token id 300 is out of range"):
        scheduler.submit([300], config(), 0)
    for options in ({"num_beams": 2}, {"penalty_alpha": 0.5, "top_k": 4}, {"prompt_lookup_num_tokens": 4}):
        with pytest.raises(ConfigError, match=f"{next(iter(options))} works on one prompt at a time"):
            scheduler.submit([1], config(**options), 0)
    with pytest.raises(ConfigError, match="max_rows must be a whole number from 1 to 1024, got 0"):
        Scheduler(tiny, max_rows=0)
    assert scheduler.pending == 0


class Failing:
    """Raises an error at the n-th call of `step` of a session or batch."""

    def __init__(self, step: Callable[..., Any], calls: list[int]) -> None:
        self.step, self.calls = step, calls

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls[0] -= 1
        if self.calls[0] == 0:
            raise InsufficientMemoryError("there is no memory left")
        return self.step(*arguments, **options)


@pytest.mark.parametrize("fails", range(1, 9))
def test_a_step_that_fails_loses_nothing(int8: Session, fails: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = config(max_new_tokens=5)
    texts = [[1 + i % 300 for i in range(480)], [5, 6, 7], [9, 8]]

    def tokens(calls: list[int]) -> list[list[Step]]:
        scheduler, steps = Scheduler(int8.sibling(), max_rows=3), dict[Handle, list[Step]]()
        monkeypatch.setattr(scheduler._session, "step", Failing(scheduler._session.step, calls))
        monkeypatch.setattr(scheduler._batch, "step", Failing(scheduler._batch.step, calls))
        monkeypatch.setattr(scheduler._batch, "prefill", Failing(scheduler._batch.prefill, calls))
        handles = [scheduler.submit(text, options, 0) for text in texts]
        while scheduler.pending:
            try:
                run(scheduler, steps)
            except InsufficientMemoryError:
                continue
        return [steps[handle] for handle in handles]

    assert tokens([fails]) == tokens([0])


def test_a_signal_that_raises_ends_its_own_text_only(tiny: Session) -> None:
    class Gone:
        asked = 0

        def is_set(self) -> bool:
            self.asked += 1
            if self.asked > 3:
                raise ConnectionRefusedError("the manager is gone")
            return False

    scheduler, steps, errors = Scheduler(tiny.sibling(), max_rows=2), dict[Handle, list[Step]](), []
    bad = scheduler.submit([1, 2], config(max_new_tokens=9, cancel=Gone()), 0)
    good = scheduler.submit([3, 4], config(max_new_tokens=9), 0)
    while scheduler.pending:
        for turn in scheduler.step():
            if turn.error is not None:
                errors.append((turn.handle, str(turn.error)))
            elif turn.step is not None:
                steps.setdefault(turn.handle, []).append(turn.step)
    assert errors == [(bad, "the manager is gone")]
    assert steps[good] == alone(tiny, [3, 4], config(max_new_tokens=9), 0)


@pytest.mark.parametrize("at", [0, 3])
def test_a_processor_may_cancel_any_text(tiny: Session, at: int) -> None:
    """The processor's own text, the text before it and the text after it; all other texts go on unchanged."""
    scheduler, steps = Scheduler(tiny.sibling(), max_rows=5), dict[Handle, list[Step]]()
    texts, handles = prompts(5), list[Handle]()

    def cancels(ids: Any, logits: Any) -> Any:
        if len(ids) == len(texts[2]) + at:
            for place in (0, 2, 4):
                scheduler.cancel(handles[place])
        return logits

    for place, text in enumerate(texts):
        own = {"logits_processor": cancels} if place == 2 else {}
        handles.append(scheduler.submit(text, config(max_new_tokens=8, **own), 0))
    while scheduler.pending:
        run(scheduler, steps)
    for place in (1, 3):
        assert steps[handles[place]] == alone(tiny, texts[place], config(max_new_tokens=8), 0)
    assert len(steps.get(handles[2], [])) == at
    assert all(step.finish_reason is None for place in (0, 2, 4) for step in steps.get(handles[place], []))


@pytest.mark.parametrize("answer", [True, False])
@pytest.mark.parametrize("asks", [1, 3])
def test_a_signal_may_cancel_any_text(tiny: Session, answer: bool, asks: int) -> None:
    """The signal's own text is among them. No other text loses a turn."""

    class Cancels:
        asked = 0

        def is_set(self) -> bool:
            self.asked += 1
            if self.asked == asks:
                scheduler.cancel(bad)
            return answer and self.asked >= asks

    scheduler, steps = Scheduler(tiny.sibling(), max_rows=2), dict[Handle, list[Step]]()
    bad = scheduler.submit([1, 2], config(max_new_tokens=6, cancel=Cancels()), 0)
    good = scheduler.submit([3, 4], config(max_new_tokens=6), 0)
    while scheduler.pending:
        run(scheduler, steps)
    assert steps[good] == alone(tiny, [3, 4], config(max_new_tokens=6), 0)
    assert len(steps.get(bad, [])) < asks


def test_cancelled_texts_have_no_turn(tiny: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no turn of the step that cancels them, nor of a step that fails."""
    scheduler, steps = Scheduler(tiny.sibling(), max_rows=3), dict[Handle, list[Step]]()
    handles = list[Handle]()

    def cancels(ids: Any, logits: Any) -> Any:
        if len(ids) == 4:
            scheduler.cancel(handles[0])
        return logits

    for options in ({}, {"logits_processor": cancels}):
        handles.append(scheduler.submit([1, 2], config(max_new_tokens=6, **options), 0))
    for _ in range(4):
        run(scheduler, steps)
    assert len(steps[handles[0]]) < len(steps[handles[1]])
    third = scheduler.submit([5, 6], config(max_new_tokens=6), 0)
    monkeypatch.setattr(scheduler._batch, "step", Failing(scheduler._batch.step, [1]))
    with pytest.raises(InsufficientMemoryError):
        scheduler.step()
    scheduler.cancel(third)
    scheduler.cancel(handles[1])
    assert (scheduler.pending, scheduler.step()) == (0, [])
