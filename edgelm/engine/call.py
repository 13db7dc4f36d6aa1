"""A loaded graph, its caches, and calls of it with everything bound.

Shapes: B batch, T new tokens of each row, P past tokens, C cache capacity, H heads, p cache head dim, D hidden size,
V vocabulary, N rows of logits.
"""

import errno
import math
import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgelm.bundle.folder import Bundle
from edgelm.engine.device import Device
from edgelm.errors import InsufficientMemoryError

Logits = npt.NDArray[np.float32]
Hidden = npt.NDArray[np.float32]
KeysValues = npt.NDArray[Any]
Places = npt.NDArray[np.integer[Any]]

ROW_GROUP = 2
"""MatMulNBits computes rows in pairs and a row left over by another kernel, which differs in the last bits; attention
does so with a token that is alone in its tile. So every call of one text's several tokens is padded to whole pairs, and
the padding computed like the rest: what a chunk computes depends on nothing but the tokens."""


@dataclass(frozen=True, slots=True)
class LoadedGraph:
    """The ``onnxruntime.InferenceSession`` of a bundle's graph, and where and how it runs."""

    bundle: Bundle
    ort_session: Any
    onnxruntime: Any
    device: Device
    threads: int
    shared_threads: bool
    batch_invariant: bool
    """Whether one-token calls compute whole row groups too, on the CPU."""


class KvCache:
    """Keys and values of B rows, every layer's; pages are touched only as they fill.

    For a graph that is batch invariant there are `spare_rows` beside them, which fill up the row group.
    """

    def __init__(self, graph: LoadedGraph, batch: int, capacity: int) -> None:
        self.batch = batch
        self.spare_rows = -batch % ROW_GROUP if graph.batch_invariant else 0
        facts = graph.bundle.manifest.architecture
        dtype = np.dtype(graph.bundle.manifest.graph.kv_dtype)
        # The padding of a chunk that ends at the last position wants room too.
        rows = batch + self.spare_rows
        shape = (rows, facts.num_key_value_heads, capacity + ROW_GROUP, facts.head_dim)  # (B, H, C, p)
        make = graph.onnxruntime.OrtValue
        self._onnxruntime = graph.onnxruntime
        self._whole: npt.NDArray[Any] | None = None
        if graph.device.kind == "cpu":
            self._whole = _untouched_zeros((2 * facts.num_layers, *shape), dtype)
            self.values = [make.ortvalue_from_numpy(part) for part in self._whole]
        else:
            self.values = [
                make.ortvalue_from_shape_and_type(shape, dtype.type, graph.device.kind, graph.device.index)
                for _ in range(2 * facts.num_layers)
            ]

    def first_rows(self, count: int) -> list[Any]:
        """OrtValues of the first `count` rows alone; elsewhere than on the CPU of all rows, for there are no views."""
        if self._whole is None:
            return self.values
        make = self._onnxruntime.OrtValue.ortvalue_from_numpy
        return [make(part[:count]) for part in self._whole]

    def read(self, row: int, start: int, stop: int) -> KeysValues:
        """A copy of the positions from `start` to `stop` of a row, (2·layers, H, T, p)."""
        if self._whole is not None:
            return self._whole[:, row, :, start:stop].copy()
        return np.stack([value.numpy()[row, :, start:stop] for value in self.values])

    def write(self, row: int, start: int, content: KeysValues) -> None:
        """Set the positions of a row from `start` on to what `read` gave, of this cache's or another float type."""
        stop = start + content.shape[2]
        if self._whole is not None:
            self._whole[:, row, :, start:stop] = content
            return
        for mine, part in zip(self.values, content, strict=True):
            array = mine.numpy()
            array[row, :, start:stop] = part
            mine.update_inplace(array)

    def copy_rows(self, source: "KvCache", rows: Places, to: Places, start: int, stop: int) -> None:
        """Copy the positions from `start` to `stop` of `source`'s `rows` to this cache's rows `to`, (N,) each."""
        if self._whole is not None and source._whole is not None:
            self._whole[:, to, :, start:stop] = source._whole[:, rows, :, start:stop]
            return
        for mine, other in zip(self.values, source.values, strict=True):
            array = mine.numpy()  # elsewhere than on the CPU: a copy
            array[to, :, start:stop] = other.numpy()[rows, :, start:stop]
            mine.update_inplace(array)


def _untouched_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Zeros whose pages exist only once they are written: one mapping of its own, in small pages.

    numpy would take it from the heap, zeroed whole, once a first cache was freed there, and asks for huge pages, of
    which a few tokens in every head touch all.

    Raises:
        InsufficientMemoryError: there is no room for them.
    """
    size = max(1, math.prod(shape) * dtype.itemsize)
    try:
        if sys.platform == "win32":
            memory = mmap.mmap(-1, size)
        else:  # private: a forked child must not write into its parent's cache
            memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise InsufficientMemoryError(
            "there is no memory left for the keys and values of another text: generate fewer at a time, or raise the "
            "limit"
        ) from None
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)


class GraphCall:
    """The graph bound to a cache and to buffers for T new ids of each row; past and present are one buffer, in place.

    The ids and the logits of a single text are padded to whole row groups. Padding stands after the text, so no token
    sees it, and what it leaves in the cache is overwritten by what comes next. One-token calls compute the cache's
    spare rows too, each a text of one token that nobody reads.
    Of a cache with more rows than `batch` the first ones are used.

    Args:
        logit_rows: N, how many rows of logits to compute, the last ones of the B·T.
        hidden: whether to compute the hidden states too.
    """

    def __init__(
        self, loaded: LoadedGraph, cache: KvCache, batch: int, new_tokens: int, logit_rows: int, *, hidden: bool = False
    ) -> None:
        self._ort_session = loaded.ort_session
        self._binding = loaded.ort_session.io_binding()
        graph, facts = loaded.bundle.manifest.graph, loaded.bundle.manifest.architecture
        padded_tokens, padded_rows = new_tokens, logit_rows
        if batch == 1:
            padded_tokens, padded_rows = _whole_groups(new_tokens), _whole_groups(logit_rows)
        rows = batch
        if new_tokens == 1 and batch == cache.batch:
            rows, padded_rows = batch + cache.spare_rows, padded_rows + cache.spare_rows
        self._batch, self._new_tokens, self._logit_rows = batch, new_tokens, logit_rows
        self._padding = padded_tokens - new_tokens
        self._input_ids = np.zeros((rows, padded_tokens), np.int64)  # (B, T)
        self._position_ids = np.zeros((rows, padded_tokens), np.int64)  # (B, T)
        self._seqlens_k = np.zeros(rows, np.int32)  # (B,) total tokens of the row after this call, minus one
        self._total_sequence_length = np.zeros((), np.int32)
        self._logits: Logits = np.empty((padded_rows, facts.vocab_size), np.float32)  # (N, V)
        hidden_shape = (rows, padded_tokens, facts.hidden_size) if hidden else (0, 0, 0)
        self._hidden = np.empty(hidden_shape, np.dtype(graph.dtype))  # (B, T, D)
        first, last = batch * new_tokens - logit_rows, rows * new_tokens - 1
        wanted = np.arange(first, first + padded_rows)  # (N,)
        self._inputs = {
            graph.input_ids: self._input_ids,
            graph.seqlens_k: self._seqlens_k,
            graph.total_sequence_length: self._total_sequence_length,
            graph.query_seqlens: np.full(rows, padded_tokens, np.int32),  # (B,) valid ids of each row
            graph.logits_index: np.minimum(wanted, last).astype(np.int64),  # (N,)
        }
        if graph.position_ids is not None:
            self._inputs[graph.position_ids] = self._position_ids
        ort_value = loaded.onnxruntime.OrtValue.ortvalue_from_numpy
        self._binding.bind_ortvalue_output(graph.logits, ort_value(self._logits))
        if hidden:
            self._binding.bind_ortvalue_output(graph.hidden_states, ort_value(self._hidden))
        values = cache.values if rows == cache.batch + cache.spare_rows else cache.first_rows(rows)
        for layer in range(facts.num_layers):
            for part in range(2):
                value = values[2 * layer + part]
                self._binding.bind_ortvalue_input(graph.past_names[part].replace("{layer}", str(layer)), value)
                self._binding.bind_ortvalue_output(graph.present_names[part].replace("{layer}", str(layer)), value)
        # On the CPU a bound OrtValue aliases its array: bind once, write in place. Elsewhere binding copies.
        self._bound_once = loaded.device.kind == "cpu"
        if self._bound_once:
            for name, array in self._inputs.items():
                self._binding.bind_ortvalue_input(name, ort_value(array))

    @property
    def logits(self) -> Logits:
        """The last call's logits, (N, V); the next call overwrites them."""
        return self._logits[: self._logit_rows]

    @property
    def hidden(self) -> Hidden:
        """The last call's hidden states, float32 (B·T, D)."""
        found = self._hidden[: self._batch, : self._new_tokens]
        return found.reshape(-1, found.shape[-1]).astype(np.float32, copy=False)

    def run(self, ids: npt.NDArray[np.int64] | Sequence[int], past: int | Places) -> Logits:
        """Run `ids`, (T,) of the one row or (B, T), after `past` cached tokens of all rows, or of each, (B,); the
        logits (N, V) are this object's buffer."""
        batch, new = self._batch, self._new_tokens
        self._input_ids[:batch, :new] = ids
        if isinstance(past, int):
            self._position_ids[:batch, :new] = np.arange(past, past + new)
            longest = past
        else:
            self._position_ids[:batch, :new] = past[:, None] + np.arange(new)
            longest = int(past.max())
        self._seqlens_k[:batch] = past + (new + self._padding - 1)
        self._total_sequence_length[...] = longest + new + self._padding
        if not self._bound_once:
            for name, array in self._inputs.items():
                self._binding.bind_cpu_input(name, array)
        self._ort_session.run_with_iobinding(self._binding)
        return self.logits


def _whole_groups(rows: int) -> int:
    """`rows` rounded up to whole groups; a single row has a kernel of its own, the fastest, and stays alone."""
    return rows if rows == 1 else -(-rows // ROW_GROUP) * ROW_GROUP
