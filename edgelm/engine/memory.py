"""How much memory a model will take, how much this process takes, and the refusal of a model that would not fit."""

import logging
import math
import sys
from dataclasses import dataclass, fields, replace

import numpy as np

from edgelm.bundle.folder import Bundle
from edgelm.bundle.manifest import Architecture, CacheType
from edgelm.engine.device import import_onnxruntime
from edgelm.engine.limits import Room, rooms, status_bytes
from edgelm.errors import InsufficientMemoryError
from edgelm.ids import PREFILL_CHUNK_TOKENS

logger = logging.getLogger(__name__)

PIECES = (PREFILL_CHUNK_TOKENS, 128, 64, 32)
"""How many tokens of a prompt one call may compute: the most that memory allows. Shorter pieces are slower."""
SPARE = 1.05
"""What shorter pieces need for each byte of their forecast. That of the usual pieces has as much to spare in itself."""
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
    """Activations of one piece of a prompt, once for all texts."""
    prefix_bytes: int
    """The prefix's keys and values, beside the copy in each text's cache."""
    forecast_bytes: int
    """Memory for one text at a time, beyond Python and the imported libraries."""
    present_bytes: int
    """Resident memory of the whole process now; 0 where the system does not tell."""

    @classmethod
    def of(cls, bundle: Bundle, prefix_bytes: int = 0, piece_tokens: int = PREFILL_CHUNK_TOKENS) -> "ModelMemory":
        """Forecast the memory of `bundle` with a prefix of `prefix_bytes` before every prompt. Nothing is loaded.

        A call computes at most `piece_tokens` of a prompt.
        """
        manifest = bundle.manifest
        facts, graph = manifest.architecture, manifest.graph
        weights_bytes = manifest.files[graph.weights_file].size_bytes
        # A head of two stages looks up rows of its finer table, of which no product makes a copy: a byte for a value.
        table_bytes = 0 if graph.exact_logits is None else facts.vocab_size * facts.hidden_size
        return cls.forecast(facts, graph.kv_dtype, weights_bytes, prefix_bytes, table_bytes, piece_tokens)

    @classmethod
    def forecast(
        cls,
        architecture: Architecture,
        kv_dtype: CacheType,
        weights_bytes: int,
        prefix_bytes: int = 0,
        table_bytes: int = 0,
        piece_tokens: int = PREFILL_CHUNK_TOKENS,
    ) -> "ModelMemory":
        """Forecast the memory of a model that need not exist yet, with keys and values of `kv_dtype` in its cache.

        `table_bytes` of the weights stay mapped, because rows are only looked up there. A call computes at most
        `piece_tokens` of a prompt.
        """
        cache = architecture.cache_values_per_token * architecture.context_length * np.dtype(kv_dtype).itemsize
        # Four copies of the widest activation at once (inputs and outputs of two nodes), and the scores of attention.
        # They exist for one piece of a prompt at a time.
        tokens = min(piece_tokens, architecture.context_length)
        scores = architecture.num_heads * architecture.context_length
        activations = tokens * (4 * architecture.widest_activation + scores) * 4
        prepacked = math.ceil(max(0, weights_bytes - table_bytes) * PREPACKED_SHARE)
        total = RUNTIME_BYTES + prepacked + cache + activations + prefix_bytes
        return cls(weights_bytes, prepacked, cache, activations, prefix_bytes, total, resident_bytes())

    def with_another(self, other: "ModelMemory") -> "ModelMemory":
        """The memory of this model and of another one in the same process."""
        names = [part.name for part in fields(self) if part.name != "present_bytes"]  # which counts the whole process
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in names})


def fitting_piece(bundle: Bundle, prefix_bytes: int = 0) -> int:
    """How many tokens of a prompt one call of `bundle` may compute: the most of `PIECES` that fit every limit.

    A warning tells a smaller number than the usual one, because prompts are then read more slowly.

    Args:
        prefix_bytes: the memory of a prefix.

    Raises:
        DeviceError: ONNX Runtime cannot be imported.
        InsufficientMemoryError: even with the shortest pieces the forecast exceeds what a limit leaves.
    """
    import_onnxruntime()  # which takes memory too, so it is here when the limits are asked what they leave
    limits = rooms()
    memory = ModelMemory.of(bundle, prefix_bytes)
    room = _too_small(limits, memory)
    if room is None:
        return PIECES[0]
    for piece_tokens in PIECES[1:]:
        if _too_small(limits, ModelMemory.of(bundle, prefix_bytes, piece_tokens), SPARE) is None:
            logger.warning(
                "%s reads prompts in pieces of %d tokens instead of %d, which is slower, because %s leaves %s MB",
                *(bundle.name, piece_tokens, PIECES[0], room.limit, _mb(room.free_bytes)),
            )
            return piece_tokens
    raise _refusal(bundle, room, memory)


def refuse_if_too_large(bundle: Bundle, piece_tokens: int, attention_bytes: int) -> None:
    """Raise InsufficientMemoryError if the forecast for `bundle` and attention exceeds what a limit leaves.

    `attention_bytes` are those of the attention that `Graph.showing_attention` tells.
    """
    memory = ModelMemory.of(bundle, 0, piece_tokens)
    memory = replace(memory, forecast_bytes=memory.forecast_bytes + attention_bytes)
    if room := _too_small(rooms(), memory):
        raise _refusal(bundle, room, memory)


def _refusal(bundle: Bundle, room: Room, memory: ModelMemory) -> InsufficientMemoryError:
    return InsufficientMemoryError(
        f"the model {bundle.name!r} needs about {_mb(_counted(room, memory))} MB but {room.limit} leaves "
        f"{_mb(room.free_bytes)} MB: free some, raise the limit, or use a bundle of fewer bits"
    )


def _too_small(limits: list[Room], memory: ModelMemory, spare: float = 1) -> Room | None:
    """The first of `limits` that has no room for `memory` times `spare`."""
    return next((room for room in limits if _counted(room, memory) * spare > room.free_bytes), None)


def _counted(room: Room, memory: ModelMemory) -> int:
    return memory.forecast_bytes + (memory.weights_bytes if room.counts_mapped_files else 0)


def _mb(count: int) -> str:
    return f"{max(0, count) / 1e6:,.0f}"


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far; 0 where the system does not tell."""
    # On Linux, getrusage would also count the parent's memory before exec.
    if peak := status_bytes("VmHWM:"):
        return peak
    if sys.platform == "win32":
        return _windows_peak_bytes()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """Resident memory of this process now; 0 where the system does not tell."""
    return status_bytes("VmRSS:")


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
