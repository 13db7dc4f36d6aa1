"""Where a graph runs: the installed ONNX Runtime package, its provider, its threads, its session options."""

import logging
import os
import re
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import edgelm
from edgelm.bundle.manifest import GraphFacts
from edgelm.engine.fork import notice_fork, watch_forks
from edgelm.engine.interpreter import require_main_interpreter
from edgelm.engine.machine import int8_products_may_saturate
from edgelm.errors import BundleError, DeviceError, ForkError, install_hint, pass_interrupts_on, shown

logger = logging.getLogger(__name__)

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
_DEVICE = re.compile(r"cuda:(\d{1,3})")


@dataclass(frozen=True, slots=True)
class Device:
    """A place to run a graph."""

    kind: str
    """"cpu" or "cuda"."""
    index: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


def import_onnxruntime() -> ModuleType:
    """Import ONNX Runtime; raises DeviceError if it is not installed or does not load, or in a sub-interpreter.

    ``import edgelm`` turned its telemetry off. Where the program had imported ONNX Runtime before, a warning says once
    that it was too late.
    """
    require_main_interpreter()
    try:
        import onnxruntime  # a plain import, because programs that freeze other programs look for those

        _ = onnxruntime.InferenceSession  # a leftover empty folder imports too, as a namespace
    except (ImportError, AttributeError) as error:
        if isinstance(error, (ModuleNotFoundError, AttributeError)):
            raise DeviceError(f"ONNX Runtime is not installed; {install_hint('cpu')}, or [gpu] for CUDA") from None
        raise DeviceError(f"ONNX Runtime is installed but does not load: {first_line(error)}") from None
    _warn_of_telemetry()
    module: ModuleType = onnxruntime
    return module


@cache
def _warn_of_telemetry() -> None:
    if edgelm.telemetry_came_first:
        logger.warning(
            "onnxruntime was imported before edgelm, so its telemetry may be on: import edgelm first, or set "
            "ORT_DISABLE_TELEMETRY=1 for the process"
        )


def onnxruntime_version() -> str:
    """The version of the installed ONNX Runtime; raises DeviceError as `import_onnxruntime` does."""
    return str(import_onnxruntime().__version__)


def require_version(installed: str, minimum: str) -> None:
    """Raises DeviceError when the ONNX Runtime `installed` is older than the bundle's `minimum`."""

    def numbers(version: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", version)[:2]]

    if numbers(installed) < numbers(minimum):
        raise DeviceError(
            f"this bundle needs ONNX Runtime {minimum} or newer, {installed} is installed; "
            "run: pip install -U onnxruntime (or onnxruntime-gpu for CUDA)"
        )


def choose_device(request: str, graph: GraphFacts, onnxruntime: ModuleType) -> Device:
    """Turn "auto", "cpu", "cuda" or "cuda:N" into a device that this bundle and this machine can use.

    "auto" is CUDA where the bundle and the installed package can use it, otherwise the CPU. An explicit device never
    falls back.

    Raises DeviceError if the name is unknown, the bundle does not run there, or the installed package lacks CUDA.
    """
    if not isinstance(request, str):
        raise DeviceError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {shown(request)}")
    cuda_missing = None
    if "cuda" not in graph.devices:
        cuda_missing = "this bundle runs on the cpu only; export one with --precision fp16 for cuda"
    elif "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        advice = f"run: pip uninstall onnxruntime, then {install_hint('gpu')}"
        cuda_missing = f"the installed ONNX Runtime has no CUDA provider; {advice}"
    if request == "auto":
        return Device("cpu") if cuda_missing else Device("cuda")
    if request == "cpu":
        return Device("cpu")
    match = _DEVICE.fullmatch(request)
    if request != "cuda" and not match:
        raise DeviceError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {shown(request)}")
    if cuda_missing:
        raise DeviceError(f"cannot use device {request!r}: {cuda_missing}")
    return Device("cuda", int(match[1]) if match else 0)


def open_inference_session(
    model_path: Path,
    device: Device,
    threads: int,
    onnxruntime: ModuleType,
    *,
    shared_threads: bool = False,
    content: bytes | None = None,
) -> Any:
    """Load the graph at `model_path`; returns an ``onnxruntime.InferenceSession``.

    `content` is loaded in place of that file; its weights are in the same folder.

    Raises:
        DeviceError: CUDA was requested and did not load, the process's other models do not fit `shared_threads`, or
            there is no /proc.
        BundleError: ONNX Runtime cannot open such a path.
        Exception: ONNX Runtime refuses the graph.
    """
    try:
        os.fspath(model_path).encode("utf-8")
    except UnicodeEncodeError:
        raise BundleError(
            f"ONNX Runtime cannot load {model_path.name!r} of {os.fspath(model_path.parent)!r}, because its path is "
            "not UTF-8: rename the folder"
        ) from None
    graph = os.fspath(model_path) if content is None else content
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails becomes an exception; nothing else is written to standard error
    _threads_of_process.apply(options, threads, onnxruntime, shared=shared_threads)
    # Prefill and decode share a key of memory patterns, so each decode step would allocate the prefill's peak.
    options.enable_mem_pattern = False
    # Long enough to span a step's Python. The default is far longer and slows everything else on a shared machine.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "500")
    if int8_products_may_saturate():
        # Exact, but slower, and it copies every int8 weight to uint8. So it is set only where products may saturate.
        options.add_session_config_entry("session.x64quantprecision", "1")
    if content is not None:
        options.add_session_config_entry(_WEIGHTS_FOLDER, os.fspath(model_path.parent))
    if device.kind == "cpu":
        try:
            return onnxruntime.InferenceSession(
                graph,
                options,
                providers=["CPUExecutionProvider"],
                # The fusion of Add and LayerNormalization takes three times as long as the two nodes do.
                disabled_optimizers=["SkipLayerNormFusion"],
                enable_fallback=0,  # otherwise a failure is printed on stdout, and everything is tried a second time
            )
        except Exception as error:  # the exceptions of ONNX Runtime have no base class but Exception
            pass_interrupts_on(error)
            if "procfs" not in str(error):
                raise
            raise DeviceError(
                "ONNX Runtime cannot read a model's weights without /proc: mount it in this chroot or sandbox"
            ) from None
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    try:
        session = onnxruntime.InferenceSession(
            graph,
            options,
            providers=[("CUDAExecutionProvider", {"device_id": str(device.index)}), "CPUExecutionProvider"],
            enable_fallback=0,
        )
    except Exception as error:  # the exceptions of ONNX Runtime have no base class but Exception
        pass_interrupts_on(error)
        if is_lack_of_memory(error) or "cuda" not in str(error).lower():
            raise
        raise DeviceError(f"cannot use device '{device}': {first_line(error)}") from None
    # ONNX Runtime falls back to the CPU on its own. CUDA that was requested and did not load must be an error.
    if session.get_providers()[0] != "CUDAExecutionProvider":
        raise DeviceError(
            f"cannot use device '{device}': the CUDA provider did not load (is there a GPU, a driver, and the CUDA "
            "and cuDNN libraries of 'edgelm[gpu]'?)"
        )
    return session


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not empty, or the name of its kind where it has no message."""
    return next((line for line in str(error).splitlines() if line), type(error).__name__)


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether an exception of ONNX Runtime, or of Python, says that memory ran out."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(
        words in text for words in ("allocate memory", "bad_alloc", "out of memory", "mmap failed")
    )


class _ProcessThreads:
    """The threads that all models of a process share, if any. ONNX Runtime makes them once and for all sessions."""

    def __init__(self) -> None:
        self._count: int | None = None
        self._stayed_in_parent = False
        self._lock = threading.Lock()
        watch_forks(self)

    def apply(self, options: Any, threads: int, onnxruntime: ModuleType, *, shared: bool) -> None:
        """Let a session with these ``SessionOptions`` run on `threads` threads of its own, or on the shared threads.

        Raises:
            DeviceError: this process shares threads, and the session does not, or asks for another number of threads.
            ForkError: the parent of this process shared threads, which stayed there.
        """
        notice_fork()
        with self._lock:
            if shared and self._count is None:
                try:
                    onnxruntime.set_global_thread_pool_sizes(threads, 1)
                finally:  # even where a signal handler raises right after it
                    self._count = threads
            count = self._count
        if count is None:
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
            return
        if self._stayed_in_parent:
            raise ForkError(
                "this process was forked from one whose models share threads: use spawn, or load after the fork"
            )
        if not shared or count != threads:
            raise DeviceError(
                f"the models of this process share {count} threads: load all of them with shared_threads=True and "
                f"threads={count}"
            )
        options.use_per_session_threads = False

    def after_fork(self) -> None:
        self._stayed_in_parent = self._count is not None
        self._lock = threading.Lock()


_threads_of_process = _ProcessThreads()
