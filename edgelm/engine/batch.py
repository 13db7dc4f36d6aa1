"""Several continuations of one text in one batch: beams, or candidates that compete for a place.

Shapes: B rows, D hidden size, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np

from edgelm.engine.call import GraphCall, Hidden, KvCache, LoadedGraph, Logits, Places
from edgelm.errors import ContextError, PromptError
from edgelm.ids import as_ids


class BatchSession:
    """B rows of the same length, each with a cache of its own.

    A row computes what it would compute alone: in fp32 and where the session is batch invariant the same bits, and
    elsewhere up to the last bits of other kernels.

    Not for use by several threads at a time.
    """

    def __init__(self, graph: LoadedGraph, prefix: KvCache, position: int, rows: int, capacity: int) -> None:
        """Args: a cache of one row whose first `position` tokens all `rows` begin with, and room for all tokens."""
        self._graph = graph
        self._rows = rows
        self._capacity = capacity
        self._cache = KvCache(graph, rows, capacity)
        self._cache.copy_rows(prefix, np.zeros(rows, np.intp), np.arange(rows), 0, position)
        self._position = self._shared = position
        self._calls: dict[bool, GraphCall] = {}

    @property
    def position(self) -> int:
        """How many tokens each row holds."""
        return self._position

    def step(self, ids: Sequence[int] | Places) -> Logits:
        """Append one token to each row, (B,); returns the logits (B, V), which the next step overwrites.

        Raises:
            PromptError: not one id for each row, or an unknown one.
            ContextError: there is no room.
        """
        return self._run(ids, hidden=False).logits

    def step_hidden(self, ids: Sequence[int] | Places) -> tuple[Logits, Hidden]:
        """The same, with the hidden states (B, D) of the tokens."""
        call = self._run(ids, hidden=True)
        return call.logits, call.hidden

    def reorder(self, rows: Sequence[int] | Places) -> None:
        """Row i becomes a copy of what row `rows[i]` holds, (B,); what all rows share is not touched."""
        source = np.asarray(rows)
        changed = np.flatnonzero(source != np.arange(self._rows))
        if len(changed) and self._shared < self._position:
            self._cache.copy_rows(self._cache, source[changed], changed, self._shared, self._position)
        if (source == source[0]).all():
            self._shared = self._position

    def _run(self, ids: Sequence[int] | Places, *, hidden: bool) -> GraphCall:
        array = as_ids(ids, self._graph.bundle.manifest.architecture.vocab_size)
        if len(array) != self._rows:
            raise PromptError(f"a batch of {self._rows} rows takes that many token ids, got {len(array)}")
        if self._position >= self._capacity:
            raise ContextError(f"the batch has room for {self._capacity} tokens, and all are used")
        if hidden not in self._calls:
            self._calls[hidden] = GraphCall(self._graph, self._cache, self._rows, 1, self._rows, hidden=hidden)
        call = self._calls[hidden]
        call.run(array[:, None], self._position)
        self._position += 1
        return call
