"""Where to run: which ONNX Runtime package is there, which provider to use, how many threads."""

import math
import os
import platform
import re
import threading
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from edgelm.bundle.manifest import Graph
from edgelm.engine.graph import OpenGraph
from edgelm.engine.huge_pages import LoadedMemory
from edgelm.errors import BundleError, DeviceError, EdgelmError, ForkError

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
    """Import ONNX Runtime with its telemetry off.

    Raises:
        DeviceError: no ONNX Runtime package is installed, or it does not load.
    """
    # Read by onnxruntime at import: its wheels report usage by default since 1.29.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        onnxruntime = import_module("onnxruntime")
        _ = onnxruntime.InferenceSession  # a leftover empty folder imports too, as a namespace
    except (ImportError, AttributeError) as error:
        if isinstance(error, (ModuleNotFoundError, AttributeError)):
            raise DeviceError(
                "ONNX Runtime is not installed; run: pip install 'edgelm[cpu]' (or 'edgelm[gpu]' for CUDA)"
            ) from None
        raise DeviceError(f"ONNX Runtime is installed but does not load: {_first_line(error)}") from None
    return onnxruntime


def require_version(installed: str, minimum: str) -> None:
    """Raises DeviceError when the ONNX Runtime `installed` is older than the bundle's `minimum`."""

    def numbers(version: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", version)[:2]]

    if numbers(installed) < numbers(minimum):
        raise DeviceError(
            f"this bundle needs ONNX Runtime {minimum} or newer, {installed} is installed; "
            "run: pip install -U 'edgelm[cpu]' (or 'edgelm[gpu]')"
        )


def choose_device(request: str, graph: Graph, onnxruntime: ModuleType) -> Device:
    """Turn "auto", "cpu", "cuda" or "cuda:N" into a device this bundle and this machine have.

    "auto" is CUDA where the bundle and the installed package can use it, otherwise the CPU. An explicit device
    never falls back.

    Raises:
        DeviceError: the name is unknown, the bundle does not run there, or the installed package lacks CUDA.
    """
    cuda_missing = (
        None
        if "cuda" in graph.devices
        else "this bundle runs on the cpu only; export one with --precision fp16 for cuda"
    )
    if cuda_missing is None and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        cuda_missing = (
            "the installed ONNX Runtime has no CUDA provider; "
            "run: pip uninstall onnxruntime, then pip install 'edgelm[gpu]'"
        )
    if request == "auto":
        return Device("cpu") if cuda_missing else Device("cuda")
    if request == "cpu":
        return Device("cpu")
    match = _DEVICE.fullmatch(request) if isinstance(request, str) else None
    if request != "cuda" and not match:
        raise DeviceError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {request!r}")
    if cuda_missing:
        raise DeviceError(f"cannot use device {request!r}: {cuda_missing}")
    return Device("cuda", int(match[1]) if match else 0)


def create_inference_session(
    model_path: Path, device: Device, threads: int, onnxruntime: ModuleType, *, shared_threads: bool = False
) -> OpenGraph:
    """Load the graph at `model_path` on `device`: an ``onnxruntime.InferenceSession`` that outlives no close or fork.

    Raises:
        DeviceError: CUDA was asked for and did not load, or the process's other models do not fit
            `shared_threads`.
        BundleError: ONNX Runtime refuses the graph.
    """
    memory = LoadedMemory()

    def open_session() -> Any:
        try:
            with memory.recorded():
                return _inference_session(model_path, device, threads, onnxruntime, shared_threads)
        except EdgelmError:
            raise
        except Exception as error:  # ORT's own exceptions share no base class but Exception
            reason = (str(error).splitlines() or ["no reason given"])[0]
            name, folder = model_path.name, str(model_path.parent)
            raise BundleError(f"ONNX Runtime cannot load {name!r} of {folder!r}: {reason}") from None

    return OpenGraph(open_session, memory.move_into_huge_pages if device.kind == "cpu" else None)


def _inference_session(
    model_path: Path, device: Device, threads: int, onnxruntime: ModuleType, shared_threads: bool
) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    set_threads(options, threads, onnxruntime, shared=shared_threads)
    # Its key collides between prefill and decode, which then allocates the prefill's peak at every step.
    options.enable_mem_pattern = False
    # Long enough to span a step's Python; ORT's default, far longer, slows everything else on a shared machine.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "500")
    if _int8_products_may_saturate():
        # Exact, but it copies every int8 weight to uint8 and is slower: only where it must be.
        options.add_session_config_entry("session.x64quantprecision", "1")
    if device.kind == "cpu":
        return onnxruntime.InferenceSession(
            os.fspath(model_path),
            options,
            providers=["CPUExecutionProvider"],
            # What it makes of Add and LayerNormalization takes three times as long as the two do.
            disabled_optimizers=["SkipLayerNormFusion"],
        )
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    session = onnxruntime.InferenceSession(
        os.fspath(model_path),
        options,
        providers=[("CUDAExecutionProvider", {"device_id": str(device.index)}), "CPUExecutionProvider"],
    )
    # ORT falls back to the CPU on its own; asked-for CUDA that did not load must be an error.
    if session.get_providers()[0] != "CUDAExecutionProvider":
        raise DeviceError(
            f"cannot use device '{device}': the CUDA provider did not load (is there a GPU, a driver, and the CUDA "
            "and cuDNN libraries of 'edgelm[gpu]'?)"
        )
    return session


def default_threads() -> int:
    """The CPUs this process may use: its affinity, limited by its cgroup's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_cpus()
    return max(1, min(allowed, math.ceil(quota)) if quota else allowed)


def _int8_products_may_saturate() -> bool:
    """x86 CPUs without VNNI add u8 x s8 products in 16 bits; True too where nobody says which CPU this is."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(encoding="ascii"), re.MULTILINE)
    except (OSError, ValueError):
        return True
    return flags is None or not {"avx512_vnni", "avx_vnni"} & set(flags[1].split())


def _cgroup_cpus() -> float | None:
    """CPUs granted by the cgroup (v2, then v1), None where unlimited or not Linux."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        folder = Path("/sys/fs/cgroup/cpu")
        quota_us = int((folder / "cpu.cfs_quota_us").read_text())
        return quota_us / int((folder / "cpu.cfs_period_us").read_text()) if quota_us > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


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
