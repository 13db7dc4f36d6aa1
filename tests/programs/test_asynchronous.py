"""What asynchronous generation sees of its caller: context variables, and an event loop that must be asyncio's."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from contextvars import ContextVar

import numpy as np
import numpy.typing as npt
import pytest

import edgelm
from edgelm import EdgelmError, Model
from tests.conftest import TINY_BUNDLE

request_id: ContextVar[str] = ContextVar("request_id", default="none")
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with edgelm.load(TINY_BUNDLE, threads=1) as loaded:
        yield loaded


class Seen:
    """A logits processor and a cancel signal that note the context variable."""

    def __init__(self) -> None:
        self.values: set[str] = set()

    def __call__(self, ids: npt.NDArray[np.int64], logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        self.values.add(request_id.get())
        return logits

    def is_set(self) -> bool:
        self.values.add(request_id.get())
        return False


async def generated(model: Model, name: str) -> set[str]:
    seen = Seen()
    request_id.set(name)
    await model.agenerate(PROMPT, max_new_tokens=5, logits_processor=[seen], cancel=seen)
    return seen.values


async def streamed(model: Model, name: str) -> set[str]:
    """The context is that of the call, as with `asyncio.to_thread`, even where another task reads the stream."""
    seen = Seen()
    request_id.set(name)
    stream = model.astream(PROMPT, max_new_tokens=5, logits_processor=[seen], cancel=seen)
    request_id.set("later")
    async with aclosing(stream):
        async for _ in stream:
            await asyncio.sleep(0)
    return seen.values


def test_processors_and_cancel_signals_see_the_callers_context(model: Model) -> None:
    async def side_by_side() -> list[set[str]]:
        calls = [use(model, f"{use.__name__} {n}") for n in range(4) for use in (generated, streamed)]
        return list(await asyncio.gather(*calls))

    expected = [{f"{use} {n}"} for n in range(4) for use in ("generated", "streamed")]
    assert asyncio.run(side_by_side()) == expected
    assert request_id.get() == "none"


def test_what_a_processor_sets_stays_for_the_next_token(model: Model) -> None:
    counts: list[int] = []
    count: ContextVar[int] = ContextVar("count", default=0)

    def counting(ids: npt.NDArray[np.int64], logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        counts.append(count.get())
        count.set(count.get() + 1)
        return logits

    options = {"max_new_tokens": 4, "eos_token_id": [], "logits_processor": [counting]}
    asyncio.run(model.agenerate(PROMPT, **options))  # type: ignore[arg-type]
    assert counts == [0, 1, 2, 3]
    assert count.get() == 0


def test_without_asyncio_one_sentence_says_what_to_do(model: Model) -> None:
    """As under trio, whose tasks have no event loop of asyncio."""

    async def streaming() -> None:
        stream: AsyncIterator[object] = model.astream(PROMPT)
        await anext(stream)

    for coroutine in (model.agenerate(PROMPT), streaming()):
        with pytest.raises(EdgelmError, match=r"need a running asyncio event loop.*trio.to_thread.run_sync"):
            coroutine.send(None)
