"""Repairs in a forked child. This is the only module that notices a fork.

ONNX Runtime hangs in a forked child, because its threads are not copied and both a run and the end of a session wait
for them (microsoft/onnxruntime issues 24601, 21812, 9800). Locks that another thread held stay locked forever.

Python calls a hook in the children that it forks itself. A program in C that forks (uWSGI) calls no hook, so whoever
is about to use a lock or a thread compares the process id first, with `notice_fork`.
"""

import itertools
import os
import threading
import weakref
from typing import Any, Protocol


class ForkAware(Protocol):
    """An object that holds threads, locks, or handles of ONNX Runtime."""

    def after_fork(self) -> None:
        """Repair this object, in the child, before it is used there. Calling it twice does no harm."""


_watched: "weakref.WeakValueDictionary[int, ForkAware]" = weakref.WeakValueDictionary()  # in the order they came
_numbers = itertools.count()
_process_id = os.getpid()
_repairing = threading.RLock()


def watch_forks(owner: ForkAware) -> None:
    """Have ``owner.after_fork()`` called in every forked child, as long as `owner` lives."""
    _watched[next(_numbers)] = owner


def notice_fork() -> None:
    """Repair everything if this process was forked by C code and nobody noticed yet."""
    if unnoticed_fork():
        with _repairing:
            if unnoticed_fork():
                _repair_all()


def unnoticed_fork() -> bool:
    """Whether this is a forked child in which nothing has been repaired."""
    return os.getpid() != _process_id


class Handle:
    """Owns an object of ONNX Runtime, and never destroys it in a forked child.

    Attributes:
        value: the object.
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def keep_forever(self) -> None:
        """Never destroy the object, not even when the process ends."""
        import ctypes  # does not load in the sub-interpreters of Python 3.12, where this module must

        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.value))
        self.value = None

    def __del__(self) -> None:
        try:
            if self.value is not None and unnoticed_fork():
                self.keep_forever()
        except (TypeError, AttributeError):
            pass  # Python is ending: it has noticed forks, and then emptied this module


def _repair_all() -> None:
    global _process_id
    for owner in list(_watched.values()):
        owner.after_fork()
    _process_id = os.getpid()


def _after_python_fork() -> None:
    """In the child, before any other Python code runs there."""
    global _repairing
    _repairing = threading.RLock()
    _repair_all()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_after_python_fork)
