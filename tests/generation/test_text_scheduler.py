"""Texts of a scheduler are those of a batch, come in turns, and end when they should; nothing hangs."""

import asyncio
import gc
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import aclosing, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest

import edgelm
from edgelm import (
    Choice,
    ClosedError,
    ConfigError,
    ContextError,
    EdgelmError,
    ForkError,
    InsufficientMemoryError,
    Model,
    PromptError,
    QueueFullError,
    SchedulerLoad,
    Submission,
    TextScheduler,
)
from edgelm.generation.scheduler_thread import SchedulerThread
from tests.conftest import TINY_BUNDLE

PROMPTS: list[Any] = ["Once upon a time", "A", "The cat sat on the mat and", "Lily", [5, 6, 7], [9] * 12]
LONG: dict[str, Any] = {"max_new_tokens": 40, "eos_token_id": ()}
PATIENCE_SECONDS = 60
AT_MOST = 2
"""Tokens of a text that is ended while its first one is computed: the same step computes one more."""


@pytest.fixture
def model() -> Iterator[Model]:
    with edgelm.load(TINY_BUNDLE, device="cpu", threads=1) as loaded:
        yield loaded


class Held:
    """A logits processor that computes its first token only once `released` is set, and counts tokens."""

    def __init__(self) -> None:
        self.tokens = 0
        self.begun, self.released = threading.Event(), threading.Event()

    def __call__(self, ids: Any, logits: Any) -> Any:
        self.tokens += 1
        self.begun.set()
        assert self.released.wait(PATIENCE_SECONDS)
        return logits


def held(scheduler: TextScheduler, **options: Any) -> tuple[Held, Submission]:
    """A text that holds the scheduler's thread at its first token until it is released."""
    holder = Held()
    submission = scheduler.submit([1, 2, 3], logits_processor=holder, **{"max_new_tokens": 2, **options})
    assert holder.begun.wait(PATIENCE_SECONDS)
    return holder, submission


def in_time(check: Any) -> None:
    """Wait until `check()` is true."""
    limit = time.monotonic() + PATIENCE_SECONDS
    while not check():
        assert time.monotonic() < limit
        time.sleep(0.005)


def scheduler_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "edgelm-scheduler"]


# What a text is


OPTIONS: list[dict[str, Any]] = [
    {"do_sample": False, "max_new_tokens": 30},
    {"temperature": 1.5, "seed": 3, "num_return_sequences": 3, "max_new_tokens": 20},
    {"seed": 1, "max_new_tokens": 30, "top_k": 20, "stop_strings": ["e", "a"], "logprobs": 1},
    {"repetition_penalty": 1.3, "max_new_tokens": 1, "seed": 2},
    {"max_new_tokens": 0, "seed": 2},
    {"temperature": 1.2, "seed": 4, "max_new_tokens": 20, "logprobs": 2, "eos_token_id": list(range(40))},
]


@pytest.mark.parametrize("bundle, max_rows", [(TINY_BUNDLE, 1), (TINY_BUNDLE, 8), (None, 3)])
def test_each_text_is_that_of_a_batch(bundle: Path | None, max_rows: int) -> None:
    """Bit for bit, log-probabilities included, whatever options and keys run beside it."""
    with edgelm.load(bundle, device="cpu", threads=1) as model:
        expected = [model.generate_batch([prompt], **options)[0] for prompt in PROMPTS for options in OPTIONS]
        with model.scheduler(max_rows=max_rows) as scheduler:
            submissions = [
                scheduler.submit(prompt, key=str(number % 3), **options)
                for number, (prompt, options) in enumerate((p, o) for p in PROMPTS for o in OPTIONS)
            ]
            completions = [submission.completion() for submission in submissions]
    for submission, completion, batch in zip(submissions, completions, expected, strict=True):
        assert (completion.prompt, completion.choices, completion.seed) == (batch.prompt, batch.choices, batch.seed)
        assert (completion.stats.new_tokens, completion.stats.prompt_tokens) == (
            batch.stats.new_tokens,
            batch.stats.prompt_tokens,
        )
        assert submission.prompt_tokens == batch.stats.prompt_tokens


def test_a_submission_says_what_it_computes(model: Model) -> None:
    with model.scheduler() as scheduler:
        submission = scheduler.submit(PROMPTS[0], seed=7, temperature=0.5, max_new_tokens=3)
        assert (submission.seed, submission.config.temperature, submission.config.max_new_tokens) == (7, 0.5, 3)
        assert submission.prompt_tokens == len(model.tokenizer.encode(PROMPTS[0]))
        assert isinstance(scheduler.submit("a", max_new_tokens=1).seed, int)


def test_chunks_of_all_rows_come_interleaved(model: Model) -> None:
    options: dict[str, Any] = {"temperature": 1.5, "seed": 3, "num_return_sequences": 3, **LONG}
    with model.scheduler(max_rows=3) as scheduler:
        chunks = list(scheduler.submit("Lily", **options))
    texts = ["".join(chunk.text for chunk in chunks if chunk.index == row) for row in range(3)]
    assert texts == [choice.text for choice in model.generate_batch(["Lily"], **options)[0].choices]
    assert [chunk.index for chunk in chunks if chunk.finish_reason] == [0, 1, 2]
    assert [chunk.stats is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert {chunk.index for chunk in chunks[:9]} == {0, 1, 2}


def test_threads_and_event_loops_together(model: Model) -> None:
    """Four threads, and two event loops with a dozen tasks each, that read in both ways."""
    jobs = [(prompt, seed) for prompt in PROMPTS for seed in range(4)]
    options: dict[str, Any] = {"temperature": 1.2, "max_new_tokens": 12, "logprobs": 0}
    expected = {
        (str(prompt), seed): model.generate_batch([prompt], seed=seed, **options)[0].choices for prompt, seed in jobs
    }
    results: list[tuple[tuple[str, int], tuple[Choice, ...]]] = []

    def work(own: list[Any]) -> None:
        for prompt, seed in own:
            completion = scheduler.submit(prompt, seed=seed, key="threads", **options).completion()
            results.append(((str(prompt), seed), completion.choices))

    async def one(prompt: Any, seed: int) -> None:
        submission = scheduler.submit(prompt, seed=seed, key="tasks", **options)
        if seed % 2:
            results.append(((str(prompt), seed), (await submission.acompletion()).choices))
        else:
            chunks = [chunk async for chunk in submission]
            results.append(((str(prompt), seed), (Choice.of_chunks(chunks),)))

    async def all_at_once() -> None:
        await asyncio.gather(*(one(prompt, seed) for prompt, seed in jobs))

    with model.scheduler(max_rows=4, max_waiting=100) as scheduler:
        threads = [threading.Thread(target=work, args=(jobs[start::4],)) for start in range(4)]
        threads += [threading.Thread(target=lambda: asyncio.run(all_at_once())) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
            assert not thread.is_alive()
    assert len(results) == 3 * len(jobs)
    for job, choices in results:
        assert choices == expected[job]


def test_processors_and_cancel_signals_see_the_callers_context(model: Model) -> None:
    variable: ContextVar[str] = ContextVar("variable", default="none")
    seen: list[str] = []

    class Seen:
        def __call__(self, ids: Any, logits: Any) -> Any:
            seen.append(variable.get())
            return logits

        def is_set(self) -> bool:
            seen.append(variable.get())
            return False

    with model.scheduler() as scheduler:
        variable.set("submitted")
        submission = scheduler.submit("a", max_new_tokens=3, eos_token_id=(), logits_processor=[Seen()], cancel=Seen())
        variable.set("later")
        assert submission.completion().choices[0].finish_reason == "length"
    assert set(seen) == {"submitted"} and len(seen) >= 6


# Turns, and a full queue


def noting(order: list[str], name: str) -> Any:
    """A logits processor that appends `name` to `order` when a token of its text is chosen."""

    def processor(ids: Any, logits: Any) -> Any:
        order.append(name)
        return logits

    return processor


def test_keys_take_turns(model: Model) -> None:
    """With one row, texts run one after another: those of a key in order, and one of each key in turn."""
    order: list[str] = []

    with model.scheduler(max_rows=1) as scheduler:
        holder, first = held(scheduler)
        submissions = [
            scheduler.submit("a", key=name[0], max_new_tokens=1, logits_processor=noting(order, name))
            for name in ("a1", "a2", "a3", "a4", "b1", "b2", "c1")
        ]
        assert scheduler.load() == SchedulerLoad(waiting=7, decoding=1, max_rows=1, max_waiting=64)
        holder.released.set()
        for submission in [first, *submissions]:
            submission.completion()
    assert order == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]


def test_a_generation_of_many_rows_leaves_turns_to_others(model: Model) -> None:
    """It begins with the rows that are free, and its other rows wait for their key's turn."""
    order: list[str] = []

    options: dict[str, Any] = {"temperature": 1.5, "seed": 5, "num_return_sequences": 5, "max_new_tokens": 1}
    with model.scheduler(max_rows=2) as scheduler:
        holder, first = held(scheduler)
        many = scheduler.submit("Lily", key="many", logits_processor=noting(order, "many"), **options)
        other = scheduler.submit("a", key="other", max_new_tokens=1, logits_processor=noting(order, "other"))
        holder.released.set()
        first.completion()
        other.completion()
        assert many.completion().choices == model.generate_batch(["Lily"], **options)[0].choices
    assert order.index("other") <= 3 and order.count("many") == 5


def test_a_full_queue_refuses(model: Model) -> None:
    with model.scheduler(max_rows=2, max_waiting=3) as scheduler:
        holder, first = held(scheduler)
        further = [scheduler.submit("a", max_new_tokens=3) for _ in range(4)]  # one has the second row
        with pytest.raises(QueueFullError, match="3 generations wait already: try again in 1 s") as refused:
            scheduler.submit("a")
        assert refused.value.retry_after_seconds == 1
        assert pickle.loads(pickle.dumps(refused.value)).retry_after_seconds == 1
        holder.released.set()
        for submission in [first, *further]:
            submission.completion()
        assert scheduler.submit("a", max_new_tokens=3).completion().stats.new_tokens == 3


def test_without_waiting_there_are_only_rows(model: Model) -> None:
    with model.scheduler(max_rows=1, max_waiting=0) as scheduler:
        holder, first = held(scheduler)
        with pytest.raises(QueueFullError, match="0 generations wait already"):
            scheduler.submit("a")
        holder.released.set()
        first.completion()
        in_time(lambda: scheduler.load().decoding == 0)
        assert scheduler.submit("a", max_new_tokens=1).completion()


def test_when_to_try_again_follows_the_speed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four texts ended in 80 seconds. Half of ten waiting texts take 100 at that speed."""
    now = [1000.0]
    monkeypatch.setattr("edgelm.generation.scheduler_thread.time.monotonic", lambda: now[0])
    with model.scheduler(max_rows=1, max_waiting=10) as scheduler:
        holder, first = held(scheduler)
        quick = [scheduler.submit("a", max_new_tokens=1, key=str(number)) for number in range(3)]
        last, waiting = held_behind(scheduler, holder)
        for submission in [first, *quick]:
            submission.completion()
        assert last.begun.wait(PATIENCE_SECONDS)
        now[0] += 80.0
        more = [scheduler.submit("a", max_new_tokens=1) for _ in range(10)]
        with pytest.raises(QueueFullError, match="try again in 100 s") as refused:
            scheduler.submit("a")
        assert refused.value.retry_after_seconds == 100
        last.released.set()
        for submission in [waiting, *more]:
            submission.completion()


def held_behind(scheduler: TextScheduler, holder: Held) -> tuple[Held, Submission]:
    """Submit a second text that holds the thread, and let the first one go."""
    last = Held()
    submission = scheduler.submit([1, 2, 3], max_new_tokens=2, logits_processor=last)
    holder.released.set()
    return last, submission


# Ends


def test_a_deadline_ends_a_text(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it waits, and while it decodes; other texts go on."""
    clock, late = time.monotonic, [0.0]
    monkeypatch.setattr("edgelm.generation.scheduler_thread.time.monotonic", lambda: clock() + late[0])
    with model.scheduler(max_rows=1) as scheduler:
        holder, first = held(scheduler, **LONG, deadline_seconds=900)
        waiting = scheduler.submit("a", deadline_seconds=900)
        others = [scheduler.submit("a", max_new_tokens=3, eos_token_id=(), deadline_seconds=n) for n in (None, 9e6)]
        late[0] = 1000.0
        holder.released.set()
        completions = [submission.completion() for submission in (first, waiting, *others)]
    ends = [completion.choices[0].finish_reason for completion in completions]
    assert ends == ["time", "time", "length", "length"]
    assert [completion.stats.new_tokens for completion in completions] == [AT_MOST, 0, 3, 3]
    assert completions[1].text == ""


def test_cancelling_frees_the_row_within_a_token(model: Model) -> None:
    with model.scheduler(max_rows=1) as scheduler:
        holder, first = held(scheduler, **LONG)
        second = scheduler.submit("Lily", max_new_tokens=5, eos_token_id=())
        first.cancel()
        holder.released.set()
        choice = first.completion().choices[0]
        assert choice.finish_reason == "cancelled" and len(choice.token_ids) == holder.tokens <= AT_MOST
        assert (
            second.completion().choices == model.generate_batch(["Lily"], max_new_tokens=5, eos_token_id=())[0].choices
        )
        first.cancel()  # which is over


def test_cancelling_what_waits(model: Model) -> None:
    with model.scheduler(max_rows=1) as scheduler:
        holder, first = held(scheduler)
        waiting = [scheduler.submit("a", max_new_tokens=3, num_return_sequences=2, do_sample=True) for _ in range(3)]
        waiting[1].cancel()
        holder.released.set()
        ends = [[choice.finish_reason for choice in each.completion().choices] for each in waiting]
        first.completion()
    assert ends[1] == ["cancelled"] * 2 and "cancelled" not in ends[0] + ends[2]


def test_leaving_a_loop_or_dropping_a_submission_cancels(model: Model) -> None:
    with model.scheduler(max_rows=4) as scheduler:
        for chunk in scheduler.submit("a", **LONG, context_overflow="truncate"):
            assert chunk.text
            break
        scheduler.submit("a", **LONG)
        holder, first = held(scheduler)
        del first
        holder.released.set()
        in_time(lambda: scheduler.load().decoding == 0)
        assert holder.tokens <= AT_MOST


def test_leaving_an_async_loop_cancels(model: Model) -> None:
    async def leave(scheduler: TextScheduler) -> None:
        async with aclosing(aiter(scheduler.submit("a", **LONG))) as chunks:
            async for _ in chunks:
                break
        holder, waits = Held(), asyncio.create_task(asyncio.sleep(0))
        await waits
        task = asyncio.create_task(scheduler.submit("a", **LONG, logits_processor=holder).acompletion())
        await asyncio.to_thread(holder.begun.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        holder.released.set()
        await asyncio.to_thread(in_time, lambda: scheduler.load().decoding == 0)
        assert holder.tokens <= AT_MOST

    with model.scheduler(max_rows=1) as scheduler:
        asyncio.run(leave(scheduler))


def test_a_loop_that_is_gone_cancels_what_it_read(model: Model) -> None:
    """A server may lose its event loop without closing what its tasks read."""
    kept: list[Any] = []
    with model.scheduler(max_rows=1) as scheduler:
        holder = Held()
        submission = scheduler.submit("a", **LONG, logits_processor=holder)
        chunks = aiter(submission)
        loop = asyncio.new_event_loop()
        kept.append(loop.create_task(anext(chunks)))
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()
        holder.released.set()
        in_time(lambda: scheduler.load().decoding == 0)
        assert holder.tokens < 5
    kept[0]._log_destroy_pending = False


def test_the_callers_own_cancel_signal(model: Model) -> None:
    cancel = threading.Event()
    with model.scheduler(max_rows=1) as scheduler:
        holder, first = held(scheduler, **LONG, cancel=cancel)
        cancel.set()
        holder.released.set()
        assert first.completion().choices[0].finish_reason == "cancelled"
        assert scheduler.submit("a", max_time=1e-9, **LONG).completion().choices[0].finish_reason == "time"


# Errors


def test_what_cannot_be_done_is_refused_at_once(model: Model) -> None:
    with model.scheduler() as scheduler:
        with pytest.raises(ContextError, match="the prompt has 70 tokens"):
            scheduler.submit([1] * 70)
        with pytest.raises(PromptError, match="there are no token ids"):
            scheduler.submit([])
        refused: list[tuple[dict[str, Any], str]] = [
            ({"num_beams": 2}, "num_beams works on one prompt at a time"),
            ({"context_overflow": "window"}, "context_overflow='window' works on one prompt at a time"),
            ({"cancle": None}, "unknown generation option 'cancle'; did you mean 'cancel'"),
            ({"suppress_tokens": [300]}, "suppress_tokens: token 300 is out of range"),
            ({"key": 5}, "key must be a text, got 5"),
            ({"deadline_seconds": 0}, r"deadline_seconds must be a number of seconds in \(0, 1e9\], got 0"),
            ({"deadline_seconds": "1"}, "deadline_seconds must be a number of seconds"),
        ]
        for options, message in refused:
            with pytest.raises(ConfigError, match=message):
                scheduler.submit("a", **options)
        assert scheduler.load().waiting == scheduler.load().decoding == 0
    arguments: list[tuple[dict[str, Any], str]] = [
        ({"max_rows": 0}, "max_rows must be a whole number from 1 to 1024, got 0"),
        ({"max_waiting": -1}, "max_waiting must be a whole number from 0 to 1000000, got -1"),
        ({"max_waiting": True}, "max_waiting must be"),
        ({"prefix_cache_bytes": 1.5}, "prefix_cache_bytes must be a whole number from 0, got 1.5"),
    ]
    for options, message in arguments:
        with pytest.raises(ConfigError, match=message):
            model.scheduler(**options)
    with pytest.raises(ConfigError, match="drain_seconds must be a number of seconds"):
        model.scheduler().close(drain_seconds=-1)


def test_an_error_in_one_text_is_its_readers_alone(model: Model) -> None:
    def fails(ids: Any, logits: Any) -> Any:
        if len(ids) > 5:
            raise RuntimeError("no more")
        return logits

    with model.scheduler(max_rows=4) as scheduler:
        options: dict[str, Any] = {"max_new_tokens": 9, "num_return_sequences": 3, "temperature": 1.0, "seed": 1}
        bad = scheduler.submit([1, 2, 3], logits_processor=fails, eos_token_id=(), **options)
        good = scheduler.submit("Lily", **options)
        chunks = []
        with pytest.raises(RuntimeError, match="no more"):
            for chunk in bad:
                chunks.append(chunk)
        assert chunks and all(chunk.finish_reason is None for chunk in chunks)
        assert good.completion().choices == model.generate_batch(["Lily"], **options)[0].choices
        with pytest.raises(ConfigError, match="no token is left to choose"):
            scheduler.submit("a", suppress_tokens=list(range(300))).completion()
        in_time(lambda: scheduler.load().decoding == 0)


def failing_steps(monkeypatch: pytest.MonkeyPatch, owner: Any, fails: Any) -> None:
    """Have ``owner.step(ids)`` raise InsufficientMemoryError where ``fails(ids)``."""
    step = owner.step

    def failing(self: Any, ids: Any, **options: Any) -> Any:
        if fails(ids):
            raise InsufficientMemoryError("there is no memory left")
        return step(self, ids, **options)

    monkeypatch.setattr(owner, "step", failing)


def test_a_prompt_that_cannot_be_computed_fails_alone(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_steps(monkeypatch, edgelm.Session, lambda ids: len(ids) == 30)
    with model.scheduler(max_rows=4) as scheduler:
        holder, first = held(scheduler, **LONG)
        second = scheduler.submit([7] * 30, num_return_sequences=2, do_sample=True)
        third = scheduler.submit([7] * 29, max_new_tokens=3)
        holder.released.set()
        with pytest.raises(InsufficientMemoryError, match="there is no memory left"):
            second.completion()
        assert (first.completion().stats.new_tokens, third.completion().stats.new_tokens) == (40, 3)


def test_a_step_that_fails_reaches_all_its_texts(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only waits goes on afterwards. Each reader has an exception of its own."""
    from edgelm.engine.batch import Batch

    fail: list[bool] = []
    failing_steps(monkeypatch, Batch, lambda ids: fail and fail.pop())
    with model.scheduler(max_rows=2) as scheduler:
        holder, first = held(scheduler, **LONG)
        second = scheduler.submit("a", **LONG)
        waiting = scheduler.submit("Lily", max_new_tokens=5)
        holder.released.set()
        next(chunks := iter(second))
        fail.append(True)
        errors = []
        for read in (lambda: list(chunks), first.completion):
            with pytest.raises(InsufficientMemoryError, match="there is no memory left") as error:
                read()
            errors.append(error.value)
        assert errors[0] is not errors[1]
        assert waiting.completion().choices == model.generate_batch(["Lily"], max_new_tokens=5)[0].choices


def test_a_broken_step_ends_all_texts_and_the_next_ones_have_a_new_thread(
    model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    class Odd(BaseException):
        """As pytest and greenlets raise them: no Exception."""

    def odd(ids: Any, logits: Any) -> Any:
        raise Odd("odd")

    with model.scheduler(max_rows=2) as scheduler:
        holder, first = held(scheduler, **LONG)
        second = scheduler.submit("a", logits_processor=odd)
        holder.released.set()
        for submission in (first, second):
            with pytest.raises(EdgelmError, match=r"a step of the scheduler failed.*Odd\('odd'\)"):
                submission.completion()
        assert "a step of the scheduler failed" in caplog.text
        expected = model.generate_batch(["Lily"], max_new_tokens=5)[0].choices
        assert scheduler.submit("Lily", max_new_tokens=5).completion().choices == expected


def test_a_thread_that_the_system_refuses(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with model.scheduler() as scheduler, monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(EdgelmError, match="cannot start the scheduler's thread: raise the limit"):
            scheduler.submit("a")


def test_a_submission_is_read_once(model: Model) -> None:
    with model.scheduler() as scheduler:
        submission = scheduler.submit("a", max_new_tokens=2)
        submission.completion()
        for read in (submission.completion, lambda: iter(submission), lambda: aiter(submission)):
            with pytest.raises(EdgelmError, match="a submission can be read only once"):
                read()


def test_without_asyncio_one_sentence_says_what_to_do(model: Model) -> None:
    """As under trio, whose tasks have no event loop of asyncio."""
    with model.scheduler() as scheduler:
        coroutine = scheduler.submit("a", max_new_tokens=2).acompletion()
        with pytest.raises(EdgelmError, match=r"needs a running asyncio event loop.*completion.*trio.to_thread"):
            coroutine.send(None)


# Reused prompts


def reused(submission: Submission) -> int:
    return submission.completion().stats.reused_tokens


SHARED = list(range(20, 50))


@pytest.mark.parametrize("cache_bytes", [0, 10**7])
def test_prompts_are_reused_inside_one_key_only(model: Model, cache_bytes: int) -> None:
    """Also not from the model's own calls, nor the other way round."""
    options: dict[str, Any] = {"max_new_tokens": 4, "logprobs": 1}
    model.generate(SHARED, **options)
    expected = model.generate_batch([[*SHARED, 3, 4]], **options)[0].choices
    with model.scheduler(prefix_cache_bytes=cache_bytes) as scheduler:
        assert reused(scheduler.submit(SHARED, key="a", **options)) == 0
        assert reused(scheduler.submit([*SHARED, 3, 4], key="a", **options)) == 30
        for key in ("b", ""):
            completion = scheduler.submit([*SHARED, 3, 4], key=key, **options).completion()
            assert (completion.stats.reused_tokens, completion.choices) == (0, expected)
        # Without memory for more, the last prompt alone is kept.
        last = scheduler.submit([*SHARED, 3, 4], key="a", **options).completion()
        assert (last.stats.reused_tokens, last.choices) == (30 if cache_bytes else 0, expected)
        model.forget()
        assert reused(scheduler.submit([*SHARED, 3, 4], key="a", **options)) == 0
        assert model.generate([*SHARED, 3, 4], **options).stats.reused_tokens == 0


def test_a_loaded_state_serves_all_keys(model: Model, tmp_path: Path) -> None:
    model.save_state(tmp_path / "state", SHARED[:20])
    expected = model.generate_batch([SHARED], max_new_tokens=4)[0].choices
    with model.scheduler() as scheduler:
        assert reused(scheduler.submit(SHARED, max_new_tokens=4)) == 0
        model.load_state(tmp_path / "state")
        for key in ("a", "b"):
            completion = scheduler.submit(SHARED, key=key, max_new_tokens=4).completion()
            assert (completion.stats.reused_tokens, completion.choices) == (20, expected)
        model.forget()
        assert reused(scheduler.submit(SHARED, key="c", max_new_tokens=4)) == 0


def test_rows_of_one_prompt_compute_it_once(model: Model) -> None:
    with model.scheduler(max_rows=3) as scheduler:
        options: dict[str, Any] = {"temperature": 1.5, "num_return_sequences": 3, "max_new_tokens": 3}
        computed: list[int] = []
        step = edgelm.Session.step

        def counting(session: Any, ids: Any, **options: Any) -> Any:
            computed.append(len(ids))
            return step(session, ids, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(edgelm.Session, "step", counting)
            scheduler.submit(SHARED, **options).completion()
    assert computed == [30, 2, 2]


def test_a_prefix_is_the_operators_own(tmp_path: Path) -> None:
    with edgelm.load(threads=1) as model:
        model.save_prefix(tmp_path / "prefix", "Tom is a cat. He is afraid of the big dog.\n\n")
    with edgelm.load(threads=1, prefix=tmp_path / "prefix") as model, model.scheduler() as scheduler:
        expected = model.generate_batch(["One day Tom"], max_new_tokens=9, seed=1)[0]
        completion = scheduler.submit("One day Tom", max_new_tokens=9, seed=1).completion()
    assert completion.choices == expected.choices
    assert completion.stats.prefix_tokens == expected.stats.prefix_tokens > 0
    assert completion.stats.prompt_tokens == expected.stats.prompt_tokens


# Closing, forking, leaving


def test_closing_cancels(model: Model) -> None:
    scheduler = model.scheduler(max_rows=1)
    holder, first = held(scheduler, **LONG)
    waiting = scheduler.submit("a")
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    in_time(lambda: scheduler._closed)
    with pytest.raises(ClosedError, match="the scheduler is closed: make a new one"):
        scheduler.submit("a")
    holder.released.set()
    closing.join(PATIENCE_SECONDS)
    assert not closing.is_alive() and not scheduler_threads()
    assert [each.completion().choices[0].finish_reason for each in (first, waiting)] == ["cancelled"] * 2
    scheduler.close()
    with pytest.raises(ClosedError), scheduler:
        pass
    assert scheduler.load() == SchedulerLoad(0, 0, 1, 64)


def test_closing_lets_texts_finish_for_a_while(model: Model) -> None:
    scheduler = model.scheduler(max_rows=1)
    submissions = [scheduler.submit("a", **LONG) for _ in range(3)]
    scheduler.close(drain_seconds=PATIENCE_SECONDS)
    assert not scheduler_threads()
    assert [each.completion().choices[0].finish_reason for each in submissions] == ["length"] * 3


def test_closing_again_shortens_the_wait(model: Model) -> None:
    scheduler = model.scheduler(max_rows=1)
    holder, first = held(scheduler, **LONG)
    closing = threading.Thread(target=lambda: scheduler.close(drain_seconds=1e6))
    closing.start()
    in_time(lambda: scheduler._closed)
    threading.Timer(0.05, holder.released.set).start()
    scheduler.close()
    closing.join(PATIENCE_SECONDS)
    assert not closing.is_alive() and first.completion().choices[0].finish_reason in ("cancelled", "length")


def test_a_processor_may_close_and_submit(model: Model) -> None:
    """It runs in the scheduler's own thread, which must not wait for itself."""
    submitted: list[Submission] = []

    def closes(ids: Any, logits: Any) -> Any:
        if not submitted:
            submitted.append(scheduler.submit("a"))
            scheduler.close()
        return logits

    scheduler = model.scheduler()
    assert scheduler.submit("a", logits_processor=closes).completion().choices[0].finish_reason == "cancelled"
    assert submitted[0].completion().choices[0].finish_reason == "cancelled"
    in_time(lambda: not scheduler_threads())


def test_closing_the_model_ends_texts(model: Model) -> None:
    scheduler = model.scheduler(max_rows=1)
    holder, first = held(scheduler, **LONG)
    waiting = scheduler.submit("a")
    closing = threading.Thread(target=model.close)
    closing.start()
    in_time(lambda: model.closed)
    holder.released.set()
    closing.join(PATIENCE_SECONDS)
    for submission in (first, waiting):
        with pytest.raises(ClosedError, match="the model is closed: load it again"):
            submission.completion()
    with pytest.raises(ClosedError, match="the model is closed: load it again"):
        scheduler.submit("a")
    in_time(lambda: not scheduler_threads())


def test_closing_the_model_ends_an_idle_thread() -> None:
    with edgelm.load(TINY_BUNDLE, device="cpu", threads=1) as model:
        scheduler = model.scheduler()
        scheduler.submit("a", max_new_tokens=2).completion()
        assert len(scheduler_threads()) == 1
    in_time(lambda: not scheduler_threads())
    assert scheduler.load().decoding == 0


def test_a_scheduler_that_nobody_holds_ends_its_thread(model: Model) -> None:
    """The texts that are read go on to their ends."""
    holder, submission = held(model.scheduler(), **LONG)
    gc.collect()
    holder.released.set()
    assert submission.completion().choices[0].finish_reason == "length"
    in_time(lambda: not scheduler_threads())
    for _ in range(20):
        model.scheduler().submit("a", max_new_tokens=2).completion()
    in_time(lambda: not scheduler_threads())
    assert len(model._open_schedulers()) == 0


def test_what_arrives_as_the_thread_ends_gets_an_error(model: Model) -> None:
    """As when a signal handler closes the scheduler in the middle of `submit`."""
    scheduler = model.scheduler()
    submit = SchedulerThread.submit

    def closing(thread: SchedulerThread, scheduled: Any) -> None:
        scheduler.close()
        submit(thread, scheduled)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SchedulerThread, "submit", closing)
        submission = scheduler.submit("a")
    with pytest.raises(ClosedError, match="the scheduler is closed"):
        submission.completion()
    assert not scheduler_threads()


@pytest.mark.skipif(not hasattr(time, "thread_time"), reason="this system does not measure threads")
def test_an_idle_scheduler_uses_no_cpu(model: Model) -> None:
    """Its thread waits for a submission: it does not come back to look."""
    with model.scheduler() as scheduler:
        scheduler.submit("a", max_new_tokens=2).completion()
        in_time(lambda: scheduler.load().decoding == 0)
        thread = scheduler._thread
        assert thread is not None
        (ident,) = (each.ident for each in scheduler_threads())
        assert ident is not None
        time.sleep(0.02)
        frames = []
        for _ in range(20):
            frames.append(sys._current_frames()[ident])
            time.sleep(0.001)
        assert len({(frame.f_code.co_name, frame.f_lasti) for frame in frames}) == 1
        assert frames[0].f_code.co_name == "_receive"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_has_a_thread_of_its_own(model: Model) -> None:
    """What its parent submitted raises ForkError there. The parent's texts go on."""
    scheduler = model.scheduler(max_rows=2)
    expected = model.generate_batch(["Lily"], max_new_tokens=5)[0].choices
    assert scheduler.submit("Lily", max_new_tokens=5).completion().choices == expected
    holder, first = held(scheduler, **LONG)
    waiting = scheduler.submit("a", **LONG)
    child = os.fork()
    if child == 0:
        signal.alarm(PATIENCE_SECONDS)
        status = 1
        try:
            for submission in (first, waiting):
                with pytest.raises(ForkError, match="submit it again in the child"):
                    submission.completion()
            assert scheduler.load().decoding == scheduler.load().waiting == 0
            assert scheduler.submit("Lily", max_new_tokens=5).completion().choices == expected
            assert len(scheduler_threads()) == 1
            scheduler.close()
            assert not scheduler_threads()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    holder.released.set()
    assert [each.completion().stats.new_tokens for each in (first, waiting)] == [40, 40]
    scheduler.close()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="signals of POSIX")
def test_an_interrupted_reader_cancels(model: Model) -> None:
    class SoftTimeLimit(Exception):
        """As Celery raises it."""

    def handler(number: int, frame: Any) -> None:
        raise SoftTimeLimit

    previous = signal.signal(signal.SIGALRM, handler)
    try:
        with model.scheduler(max_rows=1) as scheduler:
            holder, first = held(scheduler, **LONG)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(SoftTimeLimit):
                first.completion()
            holder.released.set()
            in_time(lambda: scheduler.load().decoding == 0)
            assert holder.tokens <= AT_MOST
    finally:
        signal.signal(signal.SIGALRM, previous)


@pytest.fixture
def drafting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    """The tiny model, which drafts for itself, as if its steps cost little and as if it were sure of every token."""
    monkeypatch.setattr("edgelm.generation.text_generation.step_cost", lambda small, large: 0.02)
    monkeypatch.setattr("edgelm.decoding.draft_model._probability", lambda logits, token: 0.95)
    with edgelm.load(TINY_BUNDLE, device="cpu", threads=1, draft=TINY_BUNDLE) as loaded:
        yield loaded


def test_texts_with_drafts_are_those_without(model: Model, drafting: Model) -> None:
    options: list[dict[str, Any]] = [{**LONG, "temperature": 0.5 + place / 4, "seed": place} for place in range(6)]
    expected = [model.generate(prompt, **of_text) for prompt, of_text in zip(PROMPTS, options, strict=True)]
    for rows, drafts, accepted in ((1, True, 20), (3, True, 0), (1, False, 0)):
        with drafting.scheduler(drafts=drafts, max_rows=rows) as scheduler:
            texts = [scheduler.submit(prompt, **of_text) for prompt, of_text in zip(PROMPTS, options, strict=True)]
            actual = [text.completion() for text in texts]
        assert [one.choices for one in actual] == [one.choices for one in expected]
        assert sum(one.stats.accepted_tokens for one in actual) >= accepted
        assert drafts or not any(one.stats.drafted_tokens for one in actual)


def test_a_text_with_drafts_ends_at_its_stop_string(model: Model, drafting: Model) -> None:
    whole = model.generate("Once upon a time", do_sample=False, **LONG).text
    stop = {"stop_strings": (whole[9:12],), "do_sample": False, **LONG}
    with drafting.scheduler(drafts=True) as scheduler:
        assert scheduler.submit("Once upon a time", **stop).completion().text == whole[: whole.index(whole[9:12])]


@pytest.mark.parametrize("what", ["cancel", "close", "close the model"])
def test_texts_with_drafts_end_when_told(drafting: Model, what: str) -> None:
    held = Held()
    scheduler = drafting.scheduler(drafts=True, max_rows=2)
    text = scheduler.submit("Once upon a time", logits_processor=held, **LONG)
    other = scheduler.submit("A", **LONG)
    assert held.begun.wait(PATIENCE_SECONDS)
    if what == "cancel":
        text.cancel()
        held.released.set()
        assert text.completion().choices[0].finish_reason == "cancelled"
        assert len(other.completion().choices[0].token_ids) == 40
    else:
        threading.Timer(0.1, held.released.set).start()
        (scheduler if what == "close" else drafting).close()
        for submission in (text, other):
            with suppress(EdgelmError):
                submission.completion()
    scheduler.close()
    assert drafting._draft_sessions is not None
    if what != "close the model":
        assert len(drafting.generate("A", **LONG).choices[0].token_ids) == 40
