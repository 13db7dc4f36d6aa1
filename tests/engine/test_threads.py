"""Threads are tried before a graph is loaded, because ONNX Runtime hangs where only some of its threads start."""

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import edgelm
from edgelm.bundle.folder import default_bundle_path
from edgelm.engine.memory import ModelMemory
from edgelm.engine.threads import choose_threads, startable_threads
from tests.conftest import TINY_BUNDLE

linux = pytest.mark.skipif(sys.platform != "linux", reason="sets limits of Linux")

FEW_PROCESSES = """
import ctypes, os, resource, sys
import edgelm.model, onnxruntime, tokenizers
allowed = 1
if os.getuid() == 0:  # the limit does not hold for root: become another user, who may still read all files
    libc = ctypes.CDLL(None)
    libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
    os.setuid(54321)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    assert libc.capset(header, (ctypes.c_uint32 * 6)(4, 4, 0, 0, 0, 0)) == 0  # CAP_DAC_READ_SEARCH
    allowed = 2
resource.setrlimit(resource.RLIMIT_NPROC, (allowed, allowed))
model = edgelm.load(sys.argv[1], threads=4)
print(allowed, model.session.threads, model.generate("Hello", max_new_tokens=2).choices[0].finish_reason)
"""


@linux
def test_with_few_processes_it_runs_on_fewer_threads() -> None:
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FEW_PROCESSES, str(TINY_BUNDLE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    assert done.stdout in ("1 1 length\n", "2 2 length\n"), done.stderr
    assert f"the model runs on {done.stdout[0]} of 4 threads, because this process cannot start more" in done.stderr


def refusing(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the system refuse all threads but the first `after`."""
    start, count = threading.Thread.start, iter(range(1000))

    def refuse(self: threading.Thread) -> None:
        if next(count) >= after:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refuse)


@pytest.mark.parametrize(("after", "wanted", "threads"), [(0, 4, 1), (2, 4, 3), (3, 4, 4), (5, 1, 1)])
def test_fewer_threads_are_taken_with_a_warning(
    after: int, wanted: int, threads: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refusing(after, monkeypatch)
    before = threading.active_count()
    with caplog.at_level(logging.WARNING):
        assert choose_threads(wanted, ModelMemory.of(edgelm.Bundle.read(TINY_BUNDLE))) == threads
    assert threading.active_count() == before
    said = f"the model runs on {threads} of {wanted} threads" in caplog.text
    assert said == (threads < wanted)


@linux
def test_threads_that_were_tried_are_gone() -> None:
    tasks = Path("/proc/self/task")
    before = set(os.listdir(tasks))  # noqa: PTH208
    assert startable_threads(20) == 20
    assert set(os.listdir(tasks)) <= before  # noqa: PTH208
    assert startable_threads(0) == 0


STACKS = """
import resource, sys
import edgelm, edgelm.model, onnxruntime
from edgelm.engine.limits import status_bytes
from edgelm.engine.memory import ModelMemory
memory = ModelMemory.of(edgelm.Bundle.read(sys.argv[1]))
limit = status_bytes("VmSize:") + int((memory.forecast_bytes + memory.weights_bytes) * 1.1)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
model = edgelm.load(sys.argv[1], threads=32)
print(model.session.threads, model.generate([5] * 500, max_new_tokens=3).choices[0].finish_reason)
"""


@linux
def test_stacks_of_threads_leave_room_for_the_model() -> None:
    """The stacks of 32 threads are 256 MB of address space; a tenth of the forecast is 4 MB."""
    command = [sys.executable, "-c", STACKS, str(default_bundle_path())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.split()[1:] == ["length"] or done.stdout.split()[1:] == ["eos"], done.stderr
    assert int(done.stdout.split()[0]) < 32 and "of 32 threads" in done.stderr
