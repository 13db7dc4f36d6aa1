"""Repairs in a forked child. This is the only module that notices a fork.

ONNX Runtime hangs in a forked child, because its threads are not copied and both a run and the end of a session wait
for them (microsoft/onnxruntime issues 24601, 21812, 9800). Locks that another thread held stay locked forever.
"""

import os
import weakref
from typing import Protocol


class ForkAware(Protocol):
    """An object that holds threads, locks, or handles of ONNX Runtime."""

    def after_fork(self) -> None:
        """Repair this object. Called in the child, before any other Python code runs there."""


_watched: "weakref.WeakSet[ForkAware]" = weakref.WeakSet()


def watch_forks(owner: ForkAware) -> None:
    """Have ``owner.after_fork()`` called in every forked child, as long as `owner` lives."""
    _watched.add(owner)


def _repair_all() -> None:
    for owner in list(_watched):
        owner.after_fork()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_repair_all)
