"""How much memory a model will take, how much this process takes, and how much more it may take."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgelm.bundle.folder import Bundle
from edgelm.bundle.manifest import Architecture
from edgelm.errors import InsufficientMemoryError, pass_interrupts_on
from edgelm.ids import PREFILL_CHUNK_TOKENS

RUNTIME_BYTES = 16 << 20
"""Memory of a loaded graph without weights, beyond the imported libraries. Measured: docs/embedding.md."""
PREPACKED_SHARE = 1.06
"""ONNX Runtime copies the weights into the order that its kernels need. The file's pages are not needed afterwards."""


@dataclass(frozen=True, slots=True)
class ModelMemory:
    """A model's memory, in bytes: the forecast before it is loaded, and what the process takes now."""

    weights_bytes: int
    """Size of the weights file. It is mapped, so the system may drop its pages; the forecast does not count them."""
    prepacked_bytes: int
    """The weights in the order that the kernels need, made when the model is loaded."""
    cache_bytes: int
    """Keys and values of one text that fills the context. Each text generated at the same time takes this much."""
    activation_bytes: int
    """Activations of a long prompt, once for all texts."""
    prefix_bytes: int
    """The prefix's keys and values, beside the copy in each text's cache."""
    forecast_bytes: int
    """Memory for one text at a time, beyond Python and the imported libraries."""
    present_bytes: int
    """Resident memory of the whole process now; 0 where the system does not tell."""

    @classmethod
    def of(cls, bundle: Bundle, prefix_bytes: int = 0) -> "ModelMemory":
        """Forecast the memory of `bundle` with a prefix of `prefix_bytes` before every prompt. Nothing is loaded."""
        manifest = bundle.manifest
        weights_bytes = manifest.files[manifest.graph.weights_file].size_bytes
        return cls.forecast(manifest.architecture, manifest.graph.kv_dtype, weights_bytes, prefix_bytes)

    @classmethod
    def forecast(
        cls,
        architecture: Architecture,
        kv_dtype: Literal["float32", "float16"],
        weights_bytes: int,
        prefix_bytes: int = 0,
    ) -> "ModelMemory":
        """Forecast the memory of a model that need not exist yet, with keys and values of `kv_dtype` in its cache."""
        cache = architecture.cache_values_per_token * architecture.context_length * (2 if kv_dtype == "float16" else 4)
        # Four copies of the widest activation at once (inputs and outputs of two nodes), and the scores of attention.
        # They exist for one chunk of a prompt at a time.
        tokens = min(PREFILL_CHUNK_TOKENS, architecture.context_length)
        scores = architecture.num_heads * architecture.context_length
        activations = tokens * (4 * architecture.widest_activation + scores) * 4
        prepacked = math.ceil(weights_bytes * PREPACKED_SHARE)
        total = RUNTIME_BYTES + prepacked + cache + activations + prefix_bytes
        return cls(weights_bytes, prepacked, cache, activations, prefix_bytes, total, resident_bytes())


@dataclass(frozen=True, slots=True)
class Room:
    """How much more memory this process may take, and the limit that says so."""

    free_bytes: int
    limit: str


def refuse_if_too_large(bundle: Bundle, prefix_bytes: int = 0) -> None:
    """Raise InsufficientMemoryError if the forecast for `bundle` and a prefix exceeds what a limit leaves."""
    memory = ModelMemory.of(bundle, prefix_bytes)
    for room in rooms():
        # RLIMIT_AS counts mapped files. The other limits count only memory that cannot be dropped and read again.
        needed = memory.forecast_bytes + (memory.weights_bytes if room.limit == "RLIMIT_AS" else 0)
        if needed > room.free_bytes:
            raise InsufficientMemoryError(
                f"the model {bundle.path.name!r} needs about {_mb(needed)} MB but {room.limit} leaves "
                f"{_mb(room.free_bytes)} MB: free some, raise the limit, or use a bundle of fewer bits"
            )


def rooms() -> list[Room]:
    """What each known limit leaves: the cgroup's, RLIMIT_AS, and the machine's available memory."""
    return [room for room in (_cgroup_room(), _address_space_room(), _machine_room()) if room is not None]


def _cgroup_room() -> Room | None:
    """The cgroup's limit, version 2, then 1. Cached file pages that are not in use count as free."""
    for folder, limit_name, used_name, idle in (
        (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit = (folder / limit_name).read_text(encoding="ascii").strip()
            if limit == "max":
                return None
            used = int((folder / used_name).read_text(encoding="ascii"))
            lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
            droppable = sum(int(line.split()[1]) for line in lines if line.split()[0] == idle)
            return Room(int(limit) - used + droppable, "the cgroup's memory limit")
        except (OSError, ValueError, IndexError) as error:
            pass_interrupts_on(error)
            continue
    return None


def _address_space_room() -> Room | None:
    if sys.platform == "win32":
        return None
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError) as error:
        pass_interrupts_on(error)
        return None
    return Room(limit - pages * resource.getpagesize(), "RLIMIT_AS")


def _machine_room() -> Room | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        facts = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        return Room(facts["MemAvailable"] + facts.get("SwapFree", 0), "this machine's available memory")
    except (OSError, ValueError, KeyError, IndexError) as error:
        pass_interrupts_on(error)
        return None


def _mb(count: int) -> str:
    return f"{max(0, count) / 1e6:,.0f}"


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far; 0 where the system does not tell."""
    # On Linux, getrusage would also count the parent's memory before exec.
    if peak := _status_bytes("VmHWM:"):
        return peak
    if sys.platform == "win32":
        return _windows_peak_bytes()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """Resident memory of this process now; 0 where the system does not tell."""
    return _status_bytes("VmRSS:")


def _status_bytes(field: str) -> int:
    """An amount of memory from /proc/self/status; 0 where there is no such file or field."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))
    except (OSError, StopIteration) as error:
        pass_interrupts_on(error)
        return 0


def _windows_peak_bytes() -> int:
    if sys.platform != "win32":
        return 0
    import ctypes
    from ctypes import wintypes

    class Counters(ctypes.Structure):  # PROCESS_MEMORY_COUNTERS of psapi.h
        _fields_ = (
            ("cb", wintypes.DWORD),
            ("PageFaultCount", wintypes.DWORD),
            ("PeakWorkingSetSize", ctypes.c_size_t),
            ("WorkingSetSize", ctypes.c_size_t),
            ("QuotaPeakPagedPoolUsage", ctypes.c_size_t),
            ("QuotaPagedPoolUsage", ctypes.c_size_t),
            ("QuotaPeakNonPagedPoolUsage", ctypes.c_size_t),
            ("QuotaNonPagedPoolUsage", ctypes.c_size_t),
            ("PagefileUsage", ctypes.c_size_t),
            ("PeakPagefileUsage", ctypes.c_size_t),
        )

    counters = Counters()
    counters.cb = ctypes.sizeof(counters)
    process = ctypes.windll.kernel32.GetCurrentProcess()
    ok = ctypes.windll.psapi.GetProcessMemoryInfo(process, ctypes.byref(counters), counters.cb)
    return int(counters.PeakWorkingSetSize) if ok else 0
