"""A short run of every target, and the harness itself on readers that break."""

import os
import signal
import time

import pytest

from tests.fuzz import harness
from tests.fuzz.harness import Target, fuzz
from tests.fuzz.mutations import flip_bits
from tests.fuzz.targets import TARGETS

SHORT_COUNTS = {"manifest": 300}
"""Number of inputs in the default tests, for a second or so each; for the other targets 100."""


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_short_run(name: str) -> None:
    target, count = TARGETS[name], SHORT_COUNTS.get(name, 100)
    report = fuzz(target, count)
    assert [f"input {failure.index}: {failure.what}" for failure in report.failures] == []
    assert report.count == count
    assert report.accepted >= 1 and report.refused >= 1


class Fragile(Target):
    """A reader with every kind of fault, each at an input of its own."""

    name = "fragile"
    mutators = (flip_bits,)
    refusals = (ValueError,)

    def __init__(self) -> None:
        self._reads = 0

    def seeds(self) -> list[bytes]:
        return [b"good", b"refused", b"two lines", b"foreign", b"dies", b"hangs", b"memory", b"good"]

    def corpus(self) -> list[bytes]:
        return []

    def read(self, data: bytes) -> object:
        self._reads += 1
        if self._reads <= 8:  # the worker reads the seeds before it counts
            return None
        if data == b"refused":
            raise ValueError("no")
        if data == b"two lines":
            raise ValueError("no\nno")
        if data == b"foreign":
            raise RuntimeError("what is this")
        if data == b"dies":
            os.kill(os.getpid(), signal.SIGABRT)
        if data == b"hangs":
            time.sleep(60)
        return bytearray(300 * 2**20) if data == b"memory" else None


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs the signals of POSIX")
@pytest.mark.parametrize("jobs", [1, 3])
def test_every_fault_is_a_failure_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch, jobs: int) -> None:
    monkeypatch.setattr(harness, "HANG_SECONDS", 1.0)
    report = fuzz(Fragile, 8, jobs=jobs)
    assert [failure.index for failure in report.failures] == [2, 3, 4, 5, 6]
    texts = [failure.what for failure in report.failures]
    assert texts[0] == "ValueError of another form than one line"
    assert texts[1] == "RuntimeError: what is this"
    assert texts[2] == f"the process ended with status -{int(signal.SIGABRT)}"
    assert texts[3].startswith("hangs")
    assert "bytes of memory" in texts[4]
    assert (report.accepted, report.refused) == (2, 1)


def test_an_input_is_the_same_again() -> None:
    reader = TARGETS["manifest"]()
    seeds = reader.seeds()
    assert [reader.input(7, index, seeds) for index in range(20)] == [
        reader.input(7, index, seeds) for index in range(20)
    ]
    assert reader.input(7, 10, seeds) != reader.input(8, 10, seeds)
