"""One set of ONNX Runtime threads for all models of a process. ONNX Runtime wants all of its sessions on it then."""

import os
import threading
from types import ModuleType
from typing import Any

from edgelm.errors import DeviceError, ForkError

_made: tuple[int, int] | None = None  # in which process, and how many: ONNX Runtime makes them once and for all
_making = threading.Lock()


def set_threads(options: Any, threads: int, onnxruntime: ModuleType, *, shared: bool) -> None:
    """Let a session of these ``SessionOptions`` run on threads of its own, or on those the process shares.

    Raises:
        DeviceError: this process shares threads, and the session is not to, or with another number of them.
        ForkError: the parent of this process shared threads, which stayed there.
    """
    global _made
    with _making:
        if shared and _made is None:
            onnxruntime.set_global_thread_pool_sizes(threads, 1)
            _made = (os.getpid(), threads)
        made = _made
    if made is None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        return
    process, count = made
    if process != os.getpid():
        raise ForkError(
            "this process was forked from one whose models share threads: use spawn, or load after the fork"
        )
    if not shared or count != threads:
        raise DeviceError(
            f"the models of this process share {count} threads: load all of them with shared_threads=True and "
            f"threads={count}"
        )
    options.use_per_session_threads = False
