"""Cancelling from another thread or task ends a generation within one token, and frees its session."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import edgelm
from edgelm import ConfigError, Model, PromptError, Session
from edgelm.decoding.generation_config import GenerationConfig
from edgelm.decoding.loop import generate
from edgelm.decoding.request import Step
from edgelm.generation.asynchronous import EitherCancel
from tests.conftest import TINY_BUNDLE, FakeSession, counting_rows

PROMPT = "Once upon a time"


@dataclass
class SetAfter(FakeSession):
    """A session that sets `event` while it computes call number `calls_left`."""

    calls_left: int = 0
    event: threading.Event | None = None

    def step(self, ids: Any) -> npt.NDArray[np.float32]:
        self.calls_left -= 1
        if self.calls_left == 0 and self.event is not None:
            self.event.set()
        return super().step(ids)


def rows_of(session: FakeSession, prompt: list[int], **options: object) -> list[list[Step]]:
    config = GenerationConfig().updated(options)
    return [list(steps) for steps in generate(session, prompt, config, 0)]


@pytest.fixture
def model() -> Iterator[Model]:
    with edgelm.load(TINY_BUNDLE, device="cpu", threads=1) as loaded:
        yield loaded


def test_the_token_being_computed_is_the_last() -> None:
    cancel = threading.Event()
    session = SetAfter(counting_rows(50), calls_left=4, event=cancel)
    (steps,) = rows_of(session, [3], cancel=cancel)
    assert [step.token_id for step in steps] == [4, 5, 6, 7, None]
    assert steps[-1].finish_reason == "cancelled"


def test_a_long_prompt_is_left_in_the_middle() -> None:
    cancel = threading.Event()
    session = SetAfter(counting_rows(50), calls_left=2, event=cancel)
    (steps,) = rows_of(session, [3] * 500, cancel=cancel)
    assert [step.finish_reason for step in steps] == ["cancelled"]
    assert session.position < 200


def test_all_rows_end() -> None:
    cancel = threading.Event()
    session = SetAfter(counting_rows(50), calls_left=3, event=cancel)
    rows = rows_of(session, [3], cancel=cancel, do_sample=True, num_return_sequences=3)
    assert [steps[-1].finish_reason for steps in rows] == ["cancelled"] * 3
    assert [len(steps) for steps in rows] == [4, 1, 1]


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"penalty_alpha": 0.5, "top_k": 3},
    ],
)
def test_searches_end(model: Model, options: dict[str, Any]) -> None:
    calls = 0

    class AfterThree:
        def is_set(self) -> bool:
            nonlocal calls
            calls += 1
            return calls > 3

    choice = model.generate(PROMPT, max_new_tokens=30, cancel=AfterThree(), **options).choices[0]
    assert choice.finish_reason in ("cancelled", "eos") and len(choice.token_ids) < 6


def test_set_before_it_begins(model: Model) -> None:
    cancel = threading.Event()
    cancel.set()
    completion = model.generate(PROMPT, cancel=cancel)
    assert completion.text == "" and completion.choices[0].finish_reason == "cancelled"


def test_a_cancel_that_never_comes_changes_nothing(model: Model) -> None:
    prompt = PROMPT * 2
    plain = model.generate(prompt, max_new_tokens=10)
    assert model.generate(prompt, max_new_tokens=10, cancel=threading.Event()).choices == plain.choices


def test_a_cancel_without_is_set_is_refused(model: Model) -> None:
    with pytest.raises(ConfigError, match=r"cancel must be a threading.Event, or an object with a method is_set"):
        model.generate(PROMPT, cancel=5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown generation option 'cancle'"):
        model.astream(PROMPT, cancle=None)  # type: ignore[call-arg]


def test_agenerate_and_astream_give_what_the_others_give(model: Model) -> None:
    async def both() -> tuple[edgelm.Completion, list[edgelm.Chunk]]:
        completion = await model.agenerate(PROMPT, max_new_tokens=12, do_sample=True, seed=4, num_return_sequences=2)
        chunks = [c async for c in model.astream(PROMPT, max_new_tokens=12, do_sample=True, seed=4)]
        return completion, chunks

    completion, chunks = asyncio.run(both())
    expected = model.generate(PROMPT, max_new_tokens=12, do_sample=True, seed=4, num_return_sequences=2)
    assert (completion.choices, completion.seed, completion.prompt) == (expected.choices, 4, PROMPT)
    assert "".join(chunk.text for chunk in chunks) == expected.text
    assert chunks[-1].stats is not None


def test_many_tasks_at_once(model: Model) -> None:
    async def all_of_them() -> list[edgelm.Completion]:
        return await asyncio.gather(
            *(model.agenerate(PROMPT, max_new_tokens=6, do_sample=True, seed=seed) for seed in range(20))
        )

    for seed, completion in enumerate(asyncio.run(all_of_them())):
        assert completion.choices == model.generate(PROMPT, max_new_tokens=6, do_sample=True, seed=seed).choices


class Held:
    """A logits processor that counts tokens, and computes the third token until `released` is set."""

    def __init__(self) -> None:
        self.tokens = 0
        self.third = threading.Event()
        self.released = threading.Event()

    def __call__(self, ids: npt.NDArray[np.int64], logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        self.tokens += 1
        if self.tokens == 3:
            self.third.set()
            assert self.released.wait(timeout=60)
        return logits


@pytest.mark.parametrize("streaming", [False, True])
def test_cancelling_the_task_stops_the_computation_and_frees_the_session(
    model: Model, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, set_signal = Held(), EitherCancel.set

    def set_and_release(signal: EitherCancel) -> None:
        set_signal(signal)
        held.released.set()

    monkeypatch.setattr(EitherCancel, "set", set_and_release)

    async def consume() -> None:
        async for _ in model.astream(PROMPT, max_new_tokens=30, logits_processor=held):
            await asyncio.sleep(0)

    async def cancelled_in_the_middle() -> int:
        work: Any = consume() if streaming else model.agenerate(PROMPT, max_new_tokens=30, logits_processor=held)
        task = asyncio.create_task(work)
        await asyncio.to_thread(held.third.wait)
        task.cancel()
        at_cancel = held.tokens
        with pytest.raises(asyncio.CancelledError):
            await task
        assert held.tokens <= at_cancel + 1
        after = held.tokens
        await asyncio.sleep(0.05)
        assert held.tokens == after
        return after

    assert asyncio.run(cancelled_in_the_middle()) < 30
    assert len(model._sessions._idle) == 1


def test_leaving_an_async_stream_frees_the_session(model: Model) -> None:
    async def first() -> edgelm.Chunk:
        async with aclosing(model.astream(PROMPT, max_new_tokens=30)) as stream:
            async for chunk in stream:
                return chunk
        raise AssertionError

    assert asyncio.run(first()).text
    assert len(model._sessions._idle) == 1


def test_a_timeout_of_asyncio(model: Model) -> None:
    async def limited() -> None:
        async with asyncio.timeout(0.05):
            while True:
                await model.agenerate(PROMPT, max_new_tokens=30)

    with pytest.raises(TimeoutError):
        asyncio.run(limited())


def test_errors_come_through(model: Model) -> None:
    with pytest.raises(PromptError, match="there are no token ids"):
        asyncio.run(model.agenerate([]))

    async def stream() -> None:
        async for _ in model.astream([10**6]):
            pass

    with pytest.raises(PromptError, match="out of range"):
        asyncio.run(stream())


def test_closing_the_model_ends_open_tasks(model: Model) -> None:
    async def closed_meanwhile() -> None:
        stream = model.astream(PROMPT, max_new_tokens=30)
        await anext(stream)
        model.close()
        async for _ in stream:
            pass

    with pytest.raises(edgelm.ClosedError):
        asyncio.run(closed_meanwhile())


def test_contrastive_search_leaves_a_long_prompt_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    cancel, computed = threading.Event(), list[int]()
    step_hidden = Session.step_hidden

    def counted(session: Session, ids: Any) -> Any:
        computed.append(len(ids))
        cancel.set()
        return step_hidden(session, ids)

    prompt = [1 + i % 200 for i in range(200)]
    options: dict[str, Any] = {"penalty_alpha": 0.5, "top_k": 3, "max_new_tokens": 5}
    with edgelm.load(device="cpu", threads=1) as model:
        whole = model.generate(prompt, **options)
        assert model.generate(prompt, **options, cancel=cancel).choices == whole.choices
        monkeypatch.setattr(Session, "step_hidden", counted)
        completion = model.generate(prompt, **options, cancel=cancel)
    assert (completion.choices[0].finish_reason, computed) == ("cancelled", [64])
