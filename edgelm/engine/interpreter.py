"""The Python interpreter around a graph: it must be the main one, and one day it ends.

When Python ends, it stops daemon threads where they next want the global lock. A thread that comes out of ONNX Runtime
then unwinds through C++ code that forbids it, and the process aborts. So the end first waits for the calls that are
computing, a token or a piece of a prompt each, and daemon threads begin no further calls.
"""

import atexit
import sys
import weakref
from importlib import import_module
from threading import RLock

from edgelm.engine.fork import notice_fork, watch_forks
from edgelm.errors import DeviceError

# Imported once, and not in each call: Python's search for a module drops the TimeoutError that a signal handler raises
# in it, as every OSError.
_interpreters = import_module("_interpreters" if sys.version_info >= (3, 13) else "_xxsubinterpreters")


class _NativeCalls:
    """The locks that threads hold while ONNX Runtime computes for them."""

    def __init__(self) -> None:
        self._lock = RLock()
        self._locks: weakref.WeakSet[RLock] = weakref.WeakSet()
        watch_forks(self)

    def new_lock(self) -> RLock:
        with self._lock:
            lock = RLock()
            self._locks.add(lock)
            return lock

    def stop(self) -> None:
        """Take all locks, and keep them: the thread that ends the interpreter may go on, all others wait for ever."""
        notice_fork()
        self._lock.acquire()
        for lock in list(self._locks):
            lock.acquire()

    def after_fork(self) -> None:
        self._lock, self._locks = RLock(), weakref.WeakSet()


_native_calls = _NativeCalls()
atexit.register(_native_calls.stop)


def native_lock() -> RLock:
    """A lock to hold during calls of ONNX Runtime, which release Python's global lock.

    It is reentrant, because a signal handler may close the graph that its own thread was about to run. ``with`` takes
    and releases it without a moment between, in which the exception of a signal handler could leave it locked. Make it
    before you hold another one.
    """
    return _native_calls.new_lock()


def require_main_interpreter() -> None:
    """Raise DeviceError in a sub-interpreter, where numpy does not load, or ONNX Runtime hangs."""
    if _interpreters.get_current() != _interpreters.get_main():
        raise DeviceError(
            "edgelm does not run in a sub-interpreter, because numpy and ONNX Runtime do not: use the main "
            "interpreter (mod_wsgi: WSGIApplicationGroup %{GLOBAL}), or another process"
        )
