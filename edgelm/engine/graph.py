"""How long a loaded graph lives: until it is closed, and never beyond a fork. A late use is a named error, no crash.

ONNX Runtime itself crashes when a session is destroyed while it runs, and hangs in a forked child: its threads were
not copied, and both a run and the session's end wait for them (microsoft/onnxruntime issues 24601, 21812, 9800).
"""

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, Literal

from edgelm.errors import ClosedError, ForkError, InsufficientMemoryError

GraphState = Literal["open", "closed", "forked"]

LONG_USE_RUNS = 32
"""A command that writes one token never pays for what only many repay."""


class OpenGraph:
    """An ``onnxruntime.InferenceSession`` that several threads may run, close and fork; the same interface.

    Args:
        open_session: makes the ``InferenceSession``; called once more in a forked child, when that needs it.
        settle: called once the session has run LONG_USE_RUNS times: for what takes time and pays in the long run.
    """

    def __init__(self, open_session: Callable[[], Any], settle: Callable[[], object] | None = None) -> None:
        self._open_session = open_session
        self._settle = settle
        self._runs = 0
        self._ort_session: Any | None = open_session()
        self._closed = False
        self._bindings: weakref.WeakSet[GraphBinding] = weakref.WeakSet()
        self._running: list[int] = []  # the thread of each call that is computing
        self._changed = threading.Condition()
        _open_graphs.add(self)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def get_inputs(self) -> Any:
        """As ``InferenceSession.get_inputs``."""
        return self._session().get_inputs()

    def get_outputs(self) -> Any:
        """As ``InferenceSession.get_outputs``."""
        return self._session().get_outputs()

    def get_providers(self) -> Any:
        """As ``InferenceSession.get_providers``."""
        return self._session().get_providers()

    def io_binding(self) -> "GraphBinding":
        """As ``InferenceSession.io_binding``.

        Raises:
            ClosedError: the graph is closed.
        """
        binding = GraphBinding(self._session().io_binding())
        self._bindings.add(binding)
        return binding

    def run_with_iobinding(self, binding: "GraphBinding") -> None:
        """As ``InferenceSession.run_with_iobinding``; the GIL is released while it computes.

        Raises:
            ClosedError: the graph is closed.
            ForkError: the binding was made before this process was forked.
            InsufficientMemoryError: there is no memory for the activations.
        """
        with self._changed:
            session, bound = self._session(), binding.inner
            self._running.append(threading.get_ident())
            self._runs += 1
            settle = self._settle if self._runs == LONG_USE_RUNS else None
        try:
            if settle is not None:
                settle()
            session.run_with_iobinding(bound)
        except Exception as error:  # ORT's own exceptions share no base class but Exception
            if "allocate memory" in str(error) or "bad_alloc" in str(error):
                raise InsufficientMemoryError(
                    "there is no memory left to compute on: give shorter prompts, generate fewer texts at a time, or "
                    "raise the limit"
                ) from None
            raise
        finally:
            with self._changed:
                self._running.remove(threading.get_ident())
                self._changed.notify_all()

    def close(self) -> None:
        """Free the graph once the calls that other threads are computing, a token or a chunk each, are done."""
        with self._changed:
            self._closed = True
            for binding in list(self._bindings):
                binding.end("closed")
            # A signal handler may close what its own thread was about to run: waiting for that would never end.
            self._changed.wait_for(lambda: not set(self._running) - {threading.get_ident()})
            self._ort_session = None

    def _session(self) -> Any:
        with self._changed:
            if self._closed:
                raise ClosedError(_MESSAGES["closed"])
            if self._ort_session is None:  # in a forked child
                self._ort_session = self._open_session()
            return self._ort_session

    def _after_fork(self) -> None:
        """In the child: leave alone what waits for threads that are not there."""
        for binding in list(self._bindings):
            binding.end("forked")
        self._bindings = weakref.WeakSet()
        self._running = []
        self._changed = threading.Condition()
        if self._ort_session is not None:
            _keep_forever(self._ort_session)
            self._ort_session = None
            self._runs = 0


class GraphBinding:
    """An ``onnxruntime.IOBinding`` that ends with its graph."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._state: GraphState = "open"

    @property
    def inner(self) -> Any:
        """The ``IOBinding``.

        Raises:
            ClosedError, ForkError: it has ended.
        """
        inner = self._inner
        if self._state == "closed":
            raise ClosedError(_MESSAGES["closed"])
        if self._state == "forked":
            raise ForkError(_MESSAGES["forked"])
        return inner

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        """As ``IOBinding.bind_ortvalue_input``."""
        self.inner.bind_ortvalue_input(name, value)

    def bind_ortvalue_output(self, name: str, value: Any) -> None:
        """As ``IOBinding.bind_ortvalue_output``."""
        self.inner.bind_ortvalue_output(name, value)

    def bind_cpu_input(self, name: str, array: Any) -> None:
        """As ``IOBinding.bind_cpu_input``."""
        self.inner.bind_cpu_input(name, array)

    def end(self, state: GraphState) -> None:
        """Let go of the ``IOBinding``; what uses it from now on gets the error of `state`."""
        self._state = state
        if state == "forked":
            _keep_forever(self._inner)
        self._inner = None


_MESSAGES = {
    "closed": "the model is closed: load it again",
    "forked": "this session was made before the process forked, and its threads stayed behind: generate with the "
    "model, which opens a session of its own, or make one with Session.sibling()",
}
_open_graphs: weakref.WeakSet[OpenGraph] = weakref.WeakSet()


def _keep_forever(thing: Any) -> None:
    """Never destroy `thing`, not even at exit."""
    import ctypes

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _after_fork_in_child() -> None:
    for graph in list(_open_graphs):
        graph._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
