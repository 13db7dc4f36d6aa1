"""A model that is closed, forked, spawned, pickled and shared by threads never hangs, crashes or writes wrong text."""

import asyncio
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import edgelm
from edgelm import ClosedError, ForkError, Model
from edgelm.engine.device import _threads_of_process
from edgelm.engine.fork import Handle
from tests.conftest import TINY_BUNDLE

PROMPT = "Once upon a time"
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@pytest.fixture
def model() -> Iterator[Model]:
    with edgelm.load(TINY_BUNDLE, device="cpu", threads=2) as loaded:
        yield loaded


def ids(model: Model, seed: int = 0, tokens: int = 8) -> tuple[int, ...]:
    return model.generate(PROMPT, max_new_tokens=tokens, do_sample=True, seed=seed).choices[0].token_ids


def test_with_closes_and_a_closed_model_says_so() -> None:
    with edgelm.load(TINY_BUNDLE) as model:
        assert ids(model) and not model.closed
    assert model.closed
    model.close()
    for use in (
        lambda: model.generate(PROMPT),
        lambda: next(model.stream(PROMPT)),
        lambda: model.score("a", "b"),
        lambda: model.session.step([1]),
        lambda: model.session.step([1, 2]),
        lambda: model.session.sibling(),
        lambda: asyncio.run(model.agenerate(PROMPT)),
        lambda: model.warmup(),
        lambda: model.__enter__(),
    ):
        with pytest.raises(ClosedError, match="the model is closed: load it again"):
            use()


def test_close_ends_an_open_stream_with_a_named_error(model: Model) -> None:
    stream = model.stream(PROMPT, max_new_tokens=30)
    next(stream)
    model.close()
    with pytest.raises(ClosedError):
        list(stream)


def test_close_while_other_threads_generate(model: Model) -> None:
    ends: list[str] = []

    def work() -> None:
        try:
            for _ in range(2000):
                ids(model, tokens=4)
            ends.append("all done")
        except ClosedError:
            ends.append("closed")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    closers = [threading.Thread(target=model.close) for _ in range(2)]
    for thread in closers:
        thread.start()
    for thread in [*threads, *closers]:
        thread.join(30)
        assert not thread.is_alive()
    assert ends == ["closed"] * 4


def test_a_model_is_pickled_as_its_path_device_and_threads(model: Model) -> None:
    model.generation_config = model.generation_config.updated({"max_new_tokens": 3})
    data = pickle.dumps(model)
    assert len(data) < 4000
    with pickle.loads(data) as copy:
        assert copy.bundle.path == model.bundle.path
        assert (copy.session.threads, copy.session.device) == (2, model.session.device)
        assert copy.generate(PROMPT).choices == model.generate(PROMPT).choices


def test_a_batch_invariant_model_is_pickled_as_one() -> None:
    with edgelm.load(TINY_BUNDLE, device="cpu", threads=1, batch_invariant=True) as model:
        data = pickle.dumps(model)
    with pickle.loads(data) as copy:
        assert copy.session.batch_invariant and copy.session.sibling().batch_invariant


def send_ids(model: Model, connection: "multiprocessing.connection.Connection") -> None:
    connection.send(ids(model))


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_a_model_goes_to_another_process(model: Model, method: str) -> None:
    expected = ids(model)
    context: Any = multiprocessing.get_context(method)
    here, there = context.Pipe()
    process = context.Process(target=send_ids, args=(model, there))
    process.start()
    assert here.poll(60)
    assert here.recv() == expected
    process.join(30)
    assert process.exitcode == 0
    assert ids(model) == expected


def in_child(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a forked child, after its parent loaded and used a model. The child ends as any Python program."""
    script = f"""
import os, sys, asyncio
import edgelm
model = edgelm.load({str(TINY_BUNDLE)!r}, threads=2)
def ids(): return model.generate({PROMPT!r}, max_new_tokens=8, seed=0, do_sample=True).choices[0].token_ids
before = ids()
model.session.step([1, 2])
stream = model.stream({PROMPT!r}, max_new_tokens=8)
next(stream)
asyncio.run(model.agenerate({PROMPT!r}, max_new_tokens=2))
child = os.fork()
if child == 0:
{code}
    sys.exit(0)
_, status = os.waitpid(child, 0)
assert ids() == before and list(stream)
sys.exit(status)
"""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)


@needs_fork
@pytest.mark.parametrize(
    "code",
    [
        "    pass",
        "    assert ids() == before",
        "    model.close()",
        "    assert asyncio.run(model.agenerate('Once', max_new_tokens=3)).stats.new_tokens == 3",
        "    del model, stream",
        "    try: model.session.step([1])\n    except edgelm.ForkError as e: assert 'sibling' in str(e)\n    else: 1/0",
        "    try: list(stream)\n    except edgelm.ForkError: pass\n    else: 1 / 0",
        "    assert model.session.sibling().step([1, 2]).shape == (model.session.vocab_size,)",
        "    os.fork()\n    assert ids() == before",
    ],
)
def test_a_forked_child_works_or_says_why_not_and_ends(code: str) -> None:
    done = in_child(code)
    assert (done.returncode, done.stderr) == (0, "")


@needs_fork
def test_a_cache_is_not_shared_with_a_forked_child(model: Model) -> None:
    model.session.step([1, 2, 3])
    expected = model.session.step([4])
    model.session.rewind(1)
    child = os.fork()
    if child == 0:
        model.session._cache._array[:] = 0  # type: ignore[attr-defined]
        os._exit(0)
    os.waitpid(child, 0)
    assert (model.session.step([4]) == expected).all()


@needs_fork
def test_fork_while_other_threads_generate() -> None:
    script = f"""
import os, sys, threading
import edgelm
model = edgelm.load({str(TINY_BUNDLE)!r}, threads=2)
def ids(): return model.generate({PROMPT!r}, max_new_tokens=8, seed=0, do_sample=True).choices[0].token_ids
before, wrong, over = ids(), [], threading.Event()
def work():
    while not over.is_set():
        if ids() != before: wrong.append(1)
threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads: thread.start()
for _ in range(10):
    child = os.fork()
    if child == 0:
        os._exit(0 if ids() == before else 1)
    if os.waitpid(child, 0)[1]: wrong.append(2)
over.set()
for thread in threads: thread.join()
sys.exit(len(wrong))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_close_in_a_signal_handler(model: Model) -> None:
    previous = signal.signal(signal.SIGALRM, lambda *_: model.close())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(ClosedError):
            while True:
                ids(model)
    finally:
        signal.signal(signal.SIGALRM, previous)


class Waits:
    """Stands in for an InferenceSession: a call of the graph does what a test wants at that moment."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.run_with_iobinding = lambda binding: act()


def test_a_call_that_closes_its_own_graph_does_not_wait_for_itself() -> None:
    """A signal handler does so: it runs in the thread whose call has just computed."""
    model = edgelm.load(TINY_BUNDLE, device="cpu", threads=1)
    model.session._graph._ort_session = Handle(Waits(model.close))  # type: ignore[attr-defined]
    thread = threading.Thread(target=model.session.step, args=([1],), daemon=True)
    thread.start()
    thread.join(20)
    assert model.closed and not thread.is_alive()


def test_close_waits_for_the_calls_of_other_threads(model: Model) -> None:
    computing, over = threading.Event(), threading.Event()

    def compute() -> None:
        computing.set()
        assert over.wait(20)

    model.session._graph._ort_session = Handle(Waits(compute))  # type: ignore[attr-defined]
    caller = threading.Thread(target=model.session.step, args=([1],), daemon=True)
    closer = threading.Thread(target=model.close, daemon=True)
    caller.start()
    assert computing.wait(20)
    closer.start()
    closer.join(0.2)
    assert closer.is_alive(), "the graph is freed while it runs"
    over.set()
    for thread in (closer, caller):
        thread.join(20)
        assert not thread.is_alive()


@needs_fork
def test_a_forked_child_closes_without_waiting_for_the_parents_calls(model: Model) -> None:
    computing, over = threading.Event(), threading.Event()

    def compute() -> None:
        computing.set()
        over.wait(20)

    model.session._graph._ort_session = Handle(Waits(compute))  # type: ignore[attr-defined]
    caller = threading.Thread(target=model.session.step, args=([1],), daemon=True)
    caller.start()
    assert computing.wait(20)
    child = os.fork()
    if child == 0:
        signal.alarm(10)  # ends a child that waits for ever
        model.close()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    over.set()
    caller.join(20)
    assert status == 0


@needs_fork
def test_a_forked_child_loads_while_a_thread_of_its_parent_was_loading() -> None:
    """The lock over the threads of the process stays locked in the child, so the child has a new one."""
    with _threads_of_process._lock:
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            edgelm.load(TINY_BUNDLE, device="cpu", threads=1)
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_a_session_that_is_kept_does_not_keep_a_closed_graph(model: Model) -> None:
    """An IOBinding holds the graph's memory, so closing the model ends every binding."""
    session = model.session
    bound = [weakref.ref(call._binding.io_binding) for call in session._short_calls.values()]
    ort_session = weakref.ref(session._graph._ort_session.value)  # type: ignore[attr-defined]
    assert bound and all(binding() is not None for binding in [*bound, ort_session])
    model.close()
    assert all(binding() is None for binding in [*bound, ort_session])


def test_the_gil_is_released_while_computing() -> None:
    """A call of the embedded model takes milliseconds, in which another thread can count."""
    with edgelm.load(threads=1) as model:
        counted = 0
        computing, over = threading.Event(), threading.Event()

        def count() -> None:
            nonlocal counted
            while not over.is_set():
                if computing.is_set():
                    counted += 1
                time.sleep(0)

        thread = threading.Thread(target=count)
        thread.start()
        prompt = [5] * 256  # one call of the graph: one piece
        computing.set()
        model.session.step(prompt)
        computing.clear()
        over.set()
        thread.join()
    assert counted > 20


def test_models_that_share_threads() -> None:
    script = f"""
import os, sys
import edgelm
path = {str(TINY_BUNDLE)!r}
models = [edgelm.load(path, threads=2, shared_threads=True) for _ in range(6)]
def ids(model): return model.generate({PROMPT!r}, max_new_tokens=8, seed=0, do_sample=True).choices[0].token_ids
assert len({{ids(model) for model in models}}) == 1
if sys.platform == "linux":
    assert len(os.listdir("/proc/self/task")) < 6
for options in ({{"threads": 1, "shared_threads": True}}, {{"threads": 2}}):
    try: edgelm.load(path, **options)
    except edgelm.DeviceError as error: assert "share 2 threads: load all of them" in str(error)
    else: 1 / 0
if hasattr(os, "fork"):
    child = os.fork()
    if child == 0:
        try: ids(models[0])
        except edgelm.ForkError as error: assert "use spawn" in str(error)
        else: 1 / 0
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0
import pickle
copy = pickle.loads(pickle.dumps(models[1]))
assert copy.session.shared_threads and ids(copy) == ids(models[1])
models[0].close()
ids(models[1])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir())) if sys.platform == "linux" else 0


def hammer(model: Model, expected: dict[int, tuple[int, ...]], rounds: int, seed: int, errors: list[str]) -> None:
    """Generate texts that are sometimes cancelled or abandoned; each is right as far as it goes."""
    chance = random.Random(seed)
    for _ in range(rounds):
        seed_of_text = chance.randrange(len(expected))
        cancel = threading.Event()
        stop_after = chance.choice([1, 3, 100])
        got: list[int] = []
        stream = model.stream(PROMPT, max_new_tokens=8, do_sample=True, seed=seed_of_text, cancel=cancel)
        for count, chunk in enumerate(stream):
            got += chunk.token_ids
            if count + 1 == stop_after:
                if chance.random() < 0.5:
                    cancel.set()
                else:
                    break
        whole = expected[seed_of_text]
        if tuple(got) != (whole if stop_after == 100 else whole[: len(got)]):
            errors.append(f"seed {seed_of_text}: {got}")


def test_threads_with_random_cancels_leak_nothing(model: Model) -> None:
    """benchmarks/stress.py does the same for longer, with forks."""
    expected = {seed: ids(model, seed) for seed in range(5)}
    errors: list[str] = []

    def round_of_threads(rounds: int) -> None:
        threads = [threading.Thread(target=hammer, args=(model, expected, rounds, i, errors)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()

    round_of_threads(5)
    descriptors, running = open_descriptors(), threading.active_count()
    round_of_threads(40)
    assert errors == []
    assert open_descriptors() <= descriptors
    assert threading.active_count() <= running


def test_load_and_close_leaves_no_descriptors_or_threads() -> None:
    def native_threads() -> int:
        return len(list(Path("/proc/self/task").iterdir())) if sys.platform == "linux" else 0

    for count in range(6):
        if count == 1:
            descriptors, threads = open_descriptors(), native_threads()
        with edgelm.load(TINY_BUNDLE, threads=2) as model:
            ids(model)
    assert open_descriptors() <= descriptors and native_threads() <= threads


def test_fork_error_is_an_edgelm_error() -> None:
    assert issubclass(ForkError, edgelm.EdgelmError) and issubclass(ClosedError, edgelm.EdgelmError)
