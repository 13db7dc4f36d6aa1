"""What ONNX Runtime raises becomes an error of edgelm, in one line; what a signal handler raises stays as it is."""

import signal
from collections.abc import Callable
from typing import Any

import pytest

from edgelm import Bundle, BundleError
from edgelm.engine.graph import Graph
from edgelm.errors import InsufficientMemoryError
from tests.conftest import TINY_BUNDLE


@pytest.fixture
def graph() -> Graph:
    return Graph.open(Bundle.read(TINY_BUNDLE), device="cpu", threads=1)


class FailingSession:
    """An ``onnxruntime.InferenceSession`` whose runs do something else."""

    def __init__(self, run: Callable[[], object]) -> None:
        self._run = run

    def run_with_iobinding(self, binding: object) -> None:
        self._run()


def failing(graph: Graph, monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> None:
    monkeypatch.setattr(graph, "_open_session", lambda: FailingSession(run))


def raising(error: Exception) -> Callable[[], object]:
    def run() -> object:
        raise error

    return run


def test_a_graph_that_cannot_compute(graph: Graph) -> None:
    with pytest.raises(BundleError, match="tiny-gpt2' cannot compute: ") as error:
        graph.run(graph.new_binding())  # without inputs
    assert "\n" not in str(error.value)
    assert isinstance(error.value.__cause__, RuntimeError)


def test_several_lines_become_one(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    binding = graph.new_binding()
    failing(graph, monkeypatch, raising(RuntimeError("\nNode X failed\nStacktrace:")))
    with pytest.raises(BundleError, match=r"cannot compute: Node X failed$"):
        graph.run(binding)


@pytest.mark.parametrize("words", ["std::bad_alloc", "Failed to allocate memory for requested buffer of size 1"])
def test_a_lack_of_memory(graph: Graph, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    binding = graph.new_binding()
    failing(graph, monkeypatch, raising(RuntimeError(words)))
    with pytest.raises(InsufficientMemoryError, match="no memory left to compute on"):
        graph.run(binding)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers that send signals")
def test_what_a_signal_handler_raises_passes_unchanged(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    class SoftTimeLimit(Exception):
        """As Celery raises it."""

    def handler(number: int, frame: Any) -> None:
        raise SoftTimeLimit

    binding = graph.new_binding()
    failing(graph, monkeypatch, lambda: signal.raise_signal(signal.SIGALRM))
    before = signal.signal(signal.SIGALRM, handler)
    try:
        with pytest.raises(SoftTimeLimit):
            graph.run(binding)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_graph_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> object:
        raise RuntimeError("This is an invalid model.\nmore")

    monkeypatch.setattr("edgelm.engine.graph.open_inference_session", refuse)
    with pytest.raises(BundleError, match=r"cannot load 'model.onnx' of '.*tiny-gpt2': This is an invalid model\.$"):
        Graph.open(Bundle.read(TINY_BUNDLE), device="cpu", threads=1)
