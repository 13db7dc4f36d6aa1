"""Key-value caches: host memory that the CPU provider updates in place, or memory of a CUDA device.

Shapes: B rows, H key-value heads, C capacity, D cached head dim, T positions, N rows to copy.
"""

import errno
import math
import mmap
import sys
from abc import ABC, abstractmethod
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgelm.bundle.folder import Bundle
from edgelm.engine.device import Device
from edgelm.errors import InsufficientMemoryError, pass_interrupts_on
from edgelm.ids import Indices, KeysValues

ROW_GROUP = 2
"""MatMulNBits computes rows in pairs; the kernel for a row left over differs in the last bits. So does attention's for
a token that is alone in its tile. So calls of several tokens, and batches, compute whole pairs: then the result of a
row depends on nothing but its own tokens."""


class Binding(Protocol):
    """Inputs and outputs of one call; `edgelm.engine.graph.GraphBinding` is one."""

    @property
    def io_binding(self) -> Any:
        """The ``onnxruntime.IOBinding``."""


class LoadedGraph(Protocol):
    """What caches, calls and sessions need of a loaded graph; `edgelm.engine.graph.Graph` is one."""

    bundle: Bundle
    device: Device
    threads: int
    shared_threads: bool
    batch_invariant: bool
    piece_tokens: int
    onnxruntime: ModuleType

    def new_binding(self) -> Binding: ...

    def run(self, binding: Binding) -> None: ...


class Cache(ABC):
    """Keys and values of B rows in every layer, as a list of OrtValues (B, H, C, D): key 0, value 0, key 1, ..."""

    rows: int
    values: list[Any]

    @abstractmethod
    def some_rows(self, first: int, count: int) -> list[Any]:
        """OrtValues of `count` rows, fewer than `rows`, from row `first` on."""

    @abstractmethod
    def read(self, row: int, start: int, stop: int) -> KeysValues:
        """A copy of the positions `start` to `stop` of `row`, (2·layers, H, T, D)."""

    @abstractmethod
    def write(self, row: int, start: int, content: KeysValues) -> None:
        """Set the positions of `row` from `start` on to `content` (2·layers, H, T, D).

        These are floats of any type, or integers where the cache has integers.
        """

    @abstractmethod
    def copy_rows(self, source: "Cache", rows: Indices, to: Indices, start: int, stop: int) -> None:
        """Copy the positions `start` to `stop` of `source`, from its rows `rows` (N,) to the rows `to` (N,) here."""


class HostCache(Cache):
    """A cache in host memory. Its pages exist only once they are written."""

    def __init__(self, graph: LoadedGraph, layers: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._make_value = graph.onnxruntime.OrtValue.ortvalue_from_numpy
        self._array = untouched_zeros((2 * layers, *shape), dtype)  # (2·layers, B, H, C, D)
        self.rows, self.values = shape[0], [self._make_value(part) for part in self._array]

    def some_rows(self, first: int, count: int) -> list[Any]:
        return [self._make_value(part[first : first + count]) for part in self._array]

    def read(self, row: int, start: int, stop: int) -> KeysValues:
        return self._array[:, row, :, start:stop].copy()

    def write(self, row: int, start: int, content: KeysValues) -> None:
        self._array[:, row, :, start : start + content.shape[2]] = content

    def copy_rows(self, source: Cache, rows: Indices, to: Indices, start: int, stop: int) -> None:
        assert isinstance(source, HostCache)  # caches of one graph are of one kind
        self._array[:, to, :, start:stop] = source._array[:, rows, :, start:stop]


class DeviceCache(Cache):
    """A cache in the memory of a CUDA device. Reading and writing copy whole layers through the host."""

    def __init__(self, graph: LoadedGraph, layers: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        make, device = graph.onnxruntime.OrtValue.ortvalue_from_shape_and_type, graph.device
        self.rows = shape[0]
        self.values = [make(shape, dtype.type, device.kind, device.index) for _ in range(2 * layers)]

    def some_rows(self, first: int, count: int) -> list[Any]:
        return self.values  # a device has no views: every call computes all rows

    def read(self, row: int, start: int, stop: int) -> KeysValues:
        return np.stack([value.numpy()[row, :, start:stop] for value in self.values])

    def write(self, row: int, start: int, content: KeysValues) -> None:
        for value, part in zip(self.values, content, strict=True):
            array = value.numpy()  # a copy
            array[row, :, start : start + content.shape[2]] = part
            value.update_inplace(array)

    def copy_rows(self, source: Cache, rows: Indices, to: Indices, start: int, stop: int) -> None:
        for value, other in zip(self.values, source.values, strict=True):
            array = value.numpy()  # a copy
            array[to, :, start:stop] = other.numpy()[rows, :, start:stop]
            value.update_inplace(array)


def new_cache(graph: LoadedGraph, rows: int, capacity: int) -> Cache:
    """An empty cache of `graph` for `rows` texts of up to `capacity` tokens; raises InsufficientMemoryError."""
    facts = graph.bundle.manifest.architecture
    # The padding of a chunk that ends at the last position needs room too.
    shape = rows, facts.num_key_value_heads, capacity + ROW_GROUP, facts.head_dim
    dtype = np.dtype(graph.bundle.manifest.graph.kv_dtype)
    kind = HostCache if graph.device.kind == "cpu" else DeviceCache
    return kind(graph, facts.num_layers, shape, dtype)


def untouched_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Zeros in a mapping of their own, in small pages that exist only once they are written.

    numpy would take the memory from the heap, where a freed cache leaves pages that must be zeroed first. It would also
    ask for huge pages, and a few tokens in every head touch all of those. Raises InsufficientMemoryError.
    """
    size_bytes = max(1, math.prod(shape) * dtype.itemsize)
    try:
        if sys.platform == "win32":
            memory = mmap.mmap(-1, size_bytes)
        else:  # private, because a forked child must not write into its parent's cache
            memory = mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        pass_interrupts_on(error)
        if error.errno != errno.ENOMEM:
            raise
        raise InsufficientMemoryError(
            "there is no memory left for the keys and values of another text: generate fewer texts at a time, or raise "
            "the limit"
        ) from None
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)
