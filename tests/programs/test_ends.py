"""A program ends with its own exit code, at once and in silence, whatever its threads, forks and streams do then."""

import os
import subprocess
import sys

import pytest

from tests.conftest import TINY_BUNDLE

needs_c_fork = pytest.mark.skipif(sys.platform != "linux", reason="forks with the C library of Linux")

BEGIN = f"""
import asyncio, atexit, ctypes, os, sys, threading, time
import edgelm
model = edgelm.load({str(TINY_BUNDLE)!r}, threads=2)
def ids(): return model.generate("Once upon a time", max_new_tokens=8, seed=0, do_sample=True).choices[0].token_ids
scheduler = model.scheduler()
def scheduled(): return scheduler.submit("Once", max_new_tokens=8).completion().text
def for_ever(work):
    started = threading.Event()
    def loop():
        while True:
            work()
            started.set()
    for _ in range(3): threading.Thread(target=loop, daemon=True).start()
    started.wait()
"""


def ended(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-c", BEGIN + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "code",
    [
        "for_ever(ids)",
        "for_ever(lambda: list(model.stream('Once', max_new_tokens=30)))",
        "for_ever(lambda: model.generate_batch(['Once', 'a', 'b'], max_new_tokens=8))",
        "for_ever(lambda: model.perplexity('Once upon a time there was'))",
        f"for_ever(lambda: edgelm.load({str(TINY_BUNDLE)!r}, threads=1).close())",
        f"for other in [edgelm.load({str(TINY_BUNDLE)!r}) for _ in range(3)]: for_ever(other.warmup)",
        "for_ever(scheduled)",
        "for_ever(lambda: asyncio.run(scheduler.submit('Once', max_new_tokens=8).acompletion()))",
        "scheduled(); unread = [scheduler.submit('Once', max_new_tokens=60, eos_token_id=[]) for _ in range(20)]",
        "for_ever(scheduled); atexit.register(scheduled)",
        "for_ever(ids); stream = model.stream('Once'); next(stream); sys.modules['elsewhere'] = stream",
        "once = dict(max_new_tokens=10**6, context_overflow='window', eos_token_id=[])\n"
        "threading.Thread(target=lambda: model.generate('Once', **once), daemon=True).start()",
    ],
)
def test_daemon_threads_at_the_end(code: str) -> None:
    """Python stops them anywhere; inside ONNX Runtime that would abort the process."""
    done = ended(f"{code}\ntime.sleep(0.01)\nsys.exit(7)")
    assert (done.returncode, done.stdout, done.stderr) == (7, "", "")


@pytest.mark.parametrize(
    "code",
    [
        "for_ever(lambda: asyncio.run(model.agenerate('Once', max_new_tokens=8)))",  # concurrent.futures refuses
        "for_ever(ids); model.close()",  # ClosedError
        "for_ever(scheduled); model.close()",
        "for_ever(scheduled); atexit.register(lambda: scheduler.close(drain_seconds=1))",
    ],
)
def test_daemon_threads_that_fail_at_the_end(code: str) -> None:
    assert ended(f"{code}\nsys.exit(7)").returncode == 7


def test_models_that_share_threads_at_the_end() -> None:
    code = (
        f"m = edgelm.load({str(TINY_BUNDLE)!r}, threads=2, shared_threads=True)\nfor_ever(m.warmup); time.sleep(0.05)"
    )
    done = ended(code)
    assert (done.returncode, done.stderr) == (0, "")


def test_handlers_of_atexit_still_generate() -> None:
    """Those that were registered before the model was loaded run last."""
    code = """
for_ever(ids)
print("the program ends")
"""
    early = "import atexit\natexit.register(lambda: print('last words', len(ids())))\n"
    done = subprocess.run([sys.executable, "-c", early + BEGIN + code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "the program ends\nlast words 8\n"


def test_handlers_of_atexit_that_come_too_late_for_a_scheduler() -> None:
    """Its thread has ended by then. They get an error, and never wait."""
    early = """
import atexit, threading
def last():
    for use in (scheduler.submit, model.scheduler().submit, lambda prompt: next(chunks)):
        try: use("Once")
        except edgelm.ClosedError as error: print(error)
    scheduler.close()
atexit.register(last)
"""
    code = """
held, begun = threading.Event(), threading.Event()
def hold(ids, logits):
    begun.set()
    held.wait()
    return logits
chunks = iter(scheduler.submit("Once", max_new_tokens=60, eos_token_id=[], logits_processor=hold))
begun.wait()
threading.Timer(0.2, held.set).start()
"""
    done = subprocess.run([sys.executable, "-c", early + BEGIN + code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    refused = "the program ends, so a scheduler takes nothing more"
    assert done.stdout.splitlines()[:2] == [refused, refused]


@needs_c_fork
@pytest.mark.parametrize(
    "code",
    [
        "pass",
        "assert len(scheduled()) > 0",
        "for_ever(scheduled)",
        "assert ids() == before; again = fork(); assert ids() == before; again or os._exit(0); os.waitpid(again, 0)",
        "again = os.fork(); assert ids() == before; again or sys.exit(0); assert os.waitpid(again, 0)[1] == 0",
        "model.close()",
        "del model, stream",
        "assert asyncio.run(model.agenerate('Once', max_new_tokens=3)).stats.new_tokens == 3",
        "model.forget(); assert len(model.generate_batch(['a', 'b'], max_new_tokens=2)) == 2",
        "for_ever(ids)",
        """
assert model.session.sibling().step([1, 2]).shape == (model.session.vocab_size,)
for use in (lambda: model.session.step([1]), lambda: list(stream)):
    try: use()
    except edgelm.ForkError: pass
    else: 1 / 0
""",
    ],
)
def test_a_child_that_c_code_forked(code: str) -> None:
    """As uWSGI forks: no hook of Python's is called."""
    lines = "\n    ".join(code.strip().splitlines())
    done = ended(
        f"""
fork = ctypes.PyDLL(None).fork  # keeps the global lock, as uWSGI does
before = ids()
model.session.step([1, 2])
stream = model.stream("Once", max_new_tokens=8)
next(stream)
child = fork()
if child == 0:
    {lines}
    sys.exit(0)
_, status = os.waitpid(child, 0)
assert ids() == before and list(stream)
sys.exit(status and 1)
"""
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_of_gunicorn_and_celery_with_daemon_threads() -> None:
    """They fork with os.fork, and their workers end by sys.exit."""
    code = """
before = ids(), scheduled()
child = os.fork()
if child == 0:
    for_ever(ids)
    for_ever(scheduled)
    sys.exit(3)
status = os.waitpid(child, 0)[1]
assert os.waitstatus_to_exitcode(status) == 3, status
"""
    done = ended(code)
    assert (done.returncode, done.stderr) == (0, "")
