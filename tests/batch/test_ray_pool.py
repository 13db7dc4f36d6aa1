"""Rows on Ray: what happens when workers die, on a stand-in for Ray; and the same on a real cluster.

The real one: ``pip install ray``, then EDGELM_TEST_NETWORK=1.
"""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from random import Random
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import edgelm
from edgelm import Model
from edgelm.batch.pool import answers
from edgelm.batch.ray_pool import MOST_LOSSES, RayPool
from edgelm.batch.rows import Job
from edgelm.errors import BundleError, ConfigError, EdgelmError
from tests.conftest import TINY_BUNDLE
from tests.environments import INSTALLS

JOB = Job("generate", 7, datetime(2026, 1, 1), max_rows=2)
ROWS = [(number, json.dumps({"prompt": "The cat", "max_new_tokens": 2}).encode()) for number in range(1, 13)]


class RayError(Exception):
    """Ray's base of errors."""


class RayTaskError(RayError):
    """What a method raised."""

    def __init__(self, cause: BaseException) -> None:
        self.cause = cause


class FakeRay(ModuleType):
    """Actors in this process, whose calls are made in `wait`, one at a time, in any order.

    `dies(actor, method, args)` decides whether an actor dies in the middle of a call; actors are numbered from 0.
    """

    def __init__(self, cpus: int, dies: Callable[[int, str, tuple[Any, ...]], bool] = lambda *call: False) -> None:
        super().__init__("ray")
        self.exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)
        self.started: dict[str, Any] = {}
        self.actors = 0
        self.is_shut_down = False
        self._cpus, self._dies, self._luck = cpus, dies, Random(0)
        self._calls: dict[object, tuple[int, str, Callable[[], Any], tuple[Any, ...]]] = {}
        self._dead: set[int] = set()
        self._results: dict[object, Callable[[], Any]] = {}

    def init(self, **options: Any) -> None:
        if options["address"] == "nowhere:1":
            raise ConnectionError("refused")
        self.started = options

    def shutdown(self) -> None:
        self.is_shut_down = True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(self._cpus)}

    def remote(self, **options: Any) -> Callable[[type], Any]:
        return lambda cls: SimpleNamespace(remote=lambda: self._actor(cls()))

    def _actor(self, worker: Any) -> Any:
        number = self.actors
        self.actors += 1

        def method(name: str) -> Any:
            def call(*args: Any) -> object:
                reference = object()
                self._calls[reference] = (number, name, lambda: getattr(worker, name)(*args), args)
                return reference

            return SimpleNamespace(remote=call)

        return SimpleNamespace(open=method("open"), answer=method("answer"))

    def wait(self, references: list[object], *, num_returns: int, timeout: float) -> tuple[list[object], list[object]]:
        if num_returns == 1:
            self._run(self._luck.choice(references))
        ready = [reference for reference in references if reference in self._results]
        return ready, [reference for reference in references if reference not in self._results]

    def get(self, reference: object) -> Any:
        return self._results.pop(reference)()

    def _run(self, reference: object) -> None:
        if reference in self._results:
            return
        number, name, call, args = self._calls.pop(reference)
        if number in self._dead or self._dies(number, name, args):
            self._dead.add(number)
            lost = [reference, *(one for one, entry in self._calls.items() if entry[0] == number)]
            self._results |= {one: lambda: _raise(RayError("the actor died")) for one in lost}
            self._calls = {one: entry for one, entry in self._calls.items() if one not in lost}
            return
        try:
            result = call()
        except Exception as error:
            cause = error
            self._results[reference] = lambda: _raise(RayTaskError(cause))
        else:
            self._results[reference] = lambda: result


def _raise(error: Exception) -> None:
    raise error


@pytest.fixture(scope="module")
def model() -> Model:
    return edgelm.load(TINY_BUNDLE, device="cpu", threads=1)


def lines_of(ray: FakeRay, model: Model, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[tuple[int, str]]:
    monkeypatch.setitem(sys.modules, "ray", ray)
    pool = RayPool("local", model, JOB, **({"workers": 3, "threads": 1} | options))
    try:
        return [(answer.number, answer.line) for answer in answers(pool, iter(ROWS), ordered=True)]
    finally:
        pool.close()
        assert ray.is_shut_down


def test_a_dead_worker_loses_nothing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = FakeRay(3)
    expected = lines_of(undisturbed, model, monkeypatch)
    assert [number for number, _ in expected] == [number for number, _ in ROWS]
    assert undisturbed.actors == 3 and undisturbed.started["num_cpus"] == 3
    died: list[int] = []

    def dies(actor: int, method: str, args: tuple[Any, ...]) -> bool:
        """The first two workers die with their third row."""
        died.append(actor)
        return method == "answer" and actor < 2 and died.count(actor) == 4

    disturbed = FakeRay(3, dies)
    assert lines_of(disturbed, model, monkeypatch) == expected
    assert disturbed.actors == 5


def test_a_row_that_kills_its_workers_ends_the_run(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(3, lambda actor, method, args: method == "answer" and args[0] == 5)
    with pytest.raises(EdgelmError, match=f"{MOST_LOSSES} workers died while they computed line"):
        lines_of(ray, model, monkeypatch)


def test_workers_that_never_start_end_the_run(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(3, lambda actor, method, args: method == "open")
    with pytest.raises(EdgelmError, match="one after another while they loaded the model"):
        lines_of(ray, model, monkeypatch)


def test_what_a_worker_raises_ends_the_run(tiny_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = edgelm.load(tiny_copy, device="cpu", threads=1)
    (tiny_copy / "bundle.json").unlink()
    with pytest.raises(BundleError):
        lines_of(FakeRay(3), model, monkeypatch)


def test_a_cluster_that_is_too_small_or_missing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="CPUs for 1 workers of 2 threads"):
        lines_of(FakeRay(3), model, monkeypatch, threads=2)
    monkeypatch.setitem(sys.modules, "ray", FakeRay(3))
    with pytest.raises(EdgelmError, match="no Ray cluster at 'nowhere:1'"):
        RayPool("nowhere:1", model, JOB, workers=None, threads=1)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EdgelmError, match=r"edgelm\[cpu,ray\]"):
        RayPool("local", model, JOB, workers=None, threads=1)


def test_without_a_number_the_cluster_is_filled(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(5)
    lines_of(ray, model, monkeypatch, workers=None, threads=2)
    assert ray.actors == 2


@INSTALLS[1]
@pytest.mark.network
@pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install ray")
def test_a_killed_worker_changes_nothing(tmp_path: Path) -> None:
    rows = "".join(f'{{"prompt": "The cat {number}", "id": {number}}}\n' for number in range(1500))
    (tmp_path / "in.jsonl").write_text(rows)
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", "edgelm", "batch", "in.jsonl"]
    options = ["-m", str(TINY_BUNDLE), "--threads", "1", "--seed", "3", "--do-sample", "-n", "40"]
    environment = os.environ | {"EDGELM_TEST_MARK": mark}
    subprocess.run([*command, "alone.jsonl", *options], cwd=tmp_path, check=True, timeout=600)
    ray = ["--ray", "local", "--workers", "4"]
    with subprocess.Popen([*command, "ray.jsonl", *options, *ray], cwd=tmp_path, env=environment) as run:
        output = tmp_path / "ray.jsonl"
        while run.poll() is None and (not output.exists() or output.read_bytes().count(b"\n") < 200):
            time.sleep(0.05)
        os.kill(workers_of(mark)[0], signal.SIGKILL)
        assert run.wait(600) == 0
    assert output.read_bytes() == (tmp_path / "alone.jsonl").read_bytes()


def workers_of(mark: str) -> list[int]:
    """The processes of actors that this test started."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            is_worker = b"BatchWorker" in (place / "cmdline").read_bytes()
            if is_worker and mark.encode() in (place / "environ").read_bytes():
                found.append(int(place.name))
        except OSError:
            continue
    return found
