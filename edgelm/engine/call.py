"""Calls of a loaded graph with every buffer bound, and what a call of several tokens costs.

Shapes: B rows, T new tokens of each row, E hidden size, V vocabulary, N rows of logits, L layers, A query heads, P past
tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgelm.bundle.attention_outputs import attention_name
from edgelm.bundle.manifest import Manifest, Recipe
from edgelm.engine.cache import ROW_GROUP, Cache, LoadedGraph
from edgelm.ids import Attention, Hidden, IdArray, Indices, Logits


def whole_groups(rows: int) -> int:
    """`rows` rounded up to a multiple of ROW_GROUP. A single row stays single: it has the fastest kernel of all."""
    return rows if rows == 1 else -(-rows // ROW_GROUP) * ROW_GROUP


class GraphCall:
    """The graph bound to a cache, and to buffers for T new tokens of B rows. Past and present are one buffer.

    Several tokens of a row, and their logits, are padded to whole row groups. Padding stands behind the text, so no
    token sees it, and the next call overwrites its keys and values.

    Args:
        graph: the loaded graph.
        cache: the cache to read and write, or some of its rows if it has more than `rows`.
        rows: B.
        new_tokens: T. Several tokens of several rows must be whole row groups.
        logit_rows: N, the number of rows of logits to compute, for the last N of the B·T tokens.
        first_row: the first of the cache's rows to use.
        hidden: whether to compute hidden states too.
        attended_past: whether to tell the attention too, of a call behind this number of cached tokens; None for not.
    """

    def __init__(
        self,
        graph: LoadedGraph,
        cache: Cache,
        rows: int,
        new_tokens: int,
        logit_rows: int,
        *,
        first_row: int = 0,
        hidden: bool = False,
        attended_past: int | None = None,
    ) -> None:
        manifest = graph.bundle.manifest
        names, facts = manifest.graph, manifest.architecture
        padded_tokens = whole_groups(new_tokens)
        padded_logit_rows = whole_groups(logit_rows) if rows == 1 else logit_rows
        self._graph = graph
        self._new_tokens, self._padding, self._logit_rows = new_tokens, padded_tokens - new_tokens, logit_rows
        self._last_position = facts.context_length - 1
        self._input_ids = np.zeros((rows, padded_tokens), np.int64)  # (B, T)
        self._position_ids = np.zeros((rows, padded_tokens), np.int64)  # (B, T)
        self._seqlens_k = np.zeros(rows, np.int32)  # (B,) tokens of the row after this call, minus one
        self._total_sequence_length = np.zeros((), np.int32)
        self._logits: Logits = np.empty((padded_logit_rows, facts.vocab_size), np.float32)  # (N, V)
        hidden_shape = (rows, padded_tokens, facts.hidden_size) if hidden else (0, 0, 0)
        self._hidden = np.empty(hidden_shape, np.dtype(names.dtype))  # (B, T, E)
        first, last = rows * new_tokens - logit_rows, rows * new_tokens - 1
        self._logits_index = np.minimum(np.arange(first, first + padded_logit_rows), last).astype(np.int64)  # (N,)
        self._inputs: dict[str, npt.NDArray[Any]] = {
            names.input_ids: self._input_ids,
            names.seqlens_k: self._seqlens_k,
            names.total_sequence_length: self._total_sequence_length,
            names.query_seqlens: np.full(rows, padded_tokens, np.int32),  # (B,) tokens of each row in this call
            names.logits_index: self._logits_index,
        }
        if names.position_ids is not None:
            self._inputs[names.position_ids] = self._position_ids
        self._binding = graph.new_binding()
        io_binding = self._binding.io_binding
        ort_value = graph.onnxruntime.OrtValue.ortvalue_from_numpy
        io_binding.bind_ortvalue_output(names.logits, ort_value(self._logits))
        if hidden:
            io_binding.bind_ortvalue_output(names.hidden_states, ort_value(self._hidden))
        attention_shape = (0, rows, 0, 0, 0)
        if attended_past is not None:
            attention_shape = (facts.num_layers, rows, facts.num_heads, padded_tokens, attended_past + padded_tokens)
        self._attention = np.empty(attention_shape, np.dtype(names.dtype))
        for layer, shares in enumerate(self._attention):
            io_binding.bind_ortvalue_output(attention_name(layer), ort_value(shares))
        values = cache.values if rows == cache.rows else cache.some_rows(first_row, rows)
        for layer in range(facts.num_layers):
            for part in range(2):
                value = values[2 * layer + part]
                io_binding.bind_ortvalue_input(names.past_names[part].replace("{layer}", str(layer)), value)
                io_binding.bind_ortvalue_output(names.present_names[part].replace("{layer}", str(layer)), value)
        # On the CPU a bound OrtValue is a view of its array, so it is bound once. Elsewhere binding copies.
        self._bound_once = graph.device.kind == "cpu"
        if self._bound_once:
            for name, array in self._inputs.items():
                io_binding.bind_ortvalue_input(name, ort_value(array))

    @property
    def hidden(self) -> Hidden:
        """Hidden states of the last call, float32 (B·T, E)."""
        states = self._hidden[:, : self._new_tokens]
        return states.reshape(-1, states.shape[-1]).astype(np.float32, copy=False)

    @property
    def attention(self) -> Attention:
        """Attention of the last call in its only row, float32 (L, A, T, P + T)."""
        padding = self._padding
        shares = self._attention[:, 0, :, : self._new_tokens, : self._attention.shape[-1] - padding]
        return shares.astype(np.float32, copy=False)

    def run_ragged(self, ids: IdArray, past: Indices, counts: Indices) -> Logits:
        """Compute `counts` (B,) tokens of the rows `ids` (B, T), each behind its own `past` (B,) cached tokens.

        Returns the logits (N, V) after the last of each row's tokens; N is B, or more if the call was made for more.
        """
        last = np.arange(len(counts)) * self._new_tokens + counts - 1
        self._logits_index[:] = np.resize(last, len(self._logits_index))
        return self.run(ids, past)

    def run(self, ids: IdArray | Sequence[int], past: int | Indices) -> Logits:
        """Compute the tokens `ids`, (B, T), or (T,) of one row; returns logits (N, V) that the next call overwrites.

        `past` is the number of cached tokens, of all rows or of each row (B,).
        """
        new_tokens = self._new_tokens
        self._input_ids[:, :new_tokens] = ids
        if isinstance(past, int):
            self._position_ids[:, :new_tokens] = np.arange(past, past + new_tokens)
            longest = past
        else:
            positions = past[:, None] + np.arange(new_tokens)
            # The caller's own padding may stand behind the last position.
            self._position_ids[:, :new_tokens] = np.minimum(positions, self._last_position)
            longest = int(past.max())
        self._seqlens_k[:] = past + (new_tokens + self._padding - 1)
        self._total_sequence_length[...] = longest + new_tokens + self._padding
        if not self._bound_once:
            for name, array in self._inputs.items():
                self._binding.io_binding.bind_cpu_input(name, array)
        self._graph.run(self._binding)
        return self._logits[: self._logit_rows]


@dataclass(frozen=True, slots=True)
class DraftCost:
    """What drafted tokens add to the call that checks them; the unit is a step of one token.

    The numbers are constants, not measured at run time, so that a request makes the same drafts on every machine.
    """

    call: float
    """Cost of a call of several tokens instead of one."""
    token: float
    """Cost of each drafted token."""

    def of(self, drafted: int) -> float:
        """Cost of `drafted` tokens, in steps."""
        return self.call + self.token * drafted

    def affordable(self, credit: float) -> int:
        """How many drafted tokens `credit` steps pay."""
        return max(0, int((credit - self.call) / self.token + 1e-9))


FOUR_BIT_DRAFTS = DraftCost(0.15, 0.25)
"""At 4 bits a step takes less time, so further tokens cost more beside it (docs/decisions.md)."""
OTHER_DRAFTS = DraftCost(0.1, 0.2)
"""Measured at 8 bits. Drafts cost less where weights are floats, because these take longer to read."""


def draft_cost(recipe: Recipe) -> DraftCost:
    """The cost of drafts with the matrices of `recipe`."""
    return FOUR_BIT_DRAFTS if any(matrix.bits == 4 for matrix in recipe.matrices) else OTHER_DRAFTS


LAYER_BYTES = 2_000_000
"""How many bytes of weights could be read in the time that a layer takes beside reading its own.

Fitted to a small model whose steps stand between those of a large one (docs/batches.md). Alone it takes less than half
of that time.
"""


def step_cost(small: Manifest, large: Manifest) -> float:
    """What a step of a small model costs, in steps of a large one; a step mostly reads weights."""
    costs = [
        manifest.files[manifest.graph.weights_file].size_bytes + LAYER_BYTES * manifest.architecture.num_layers
        for manifest in (small, large)
    ]
    return costs[0] / costs[1]
