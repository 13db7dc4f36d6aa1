"""Texts of different lengths that decode in one batch, and come and go while the others go on.

Shapes: B rows in use, V vocabulary.
"""

from collections.abc import Mapping

import numpy as np

from edgelm.engine.call import ROW_GROUP, GraphCall, KvCache, LoadedGraph, Logits
from edgelm.errors import ContextError

_IDLE_TOKEN = 0
"""Fed to rows without a text, whose numbers nobody reads."""


class RaggedBatch:
    """Up to `rows` texts, each in a row of one cache.

    Every step computes an even number of rows, two at least: MatMulNBits has other kernels for an odd row, so a text
    computes the same, bit for bit, whichever rows are beside it. Not for use by several threads at a time.
    """

    def __init__(self, graph: LoadedGraph, rows: int, capacity: int) -> None:
        """Args: how many texts at most, and room for how many tokens of each."""
        self._graph = graph
        self._capacity = capacity
        self._most = rows
        self._cache = KvCache(graph, _whole_groups(rows), capacity)
        self._lengths: list[int | None] = []  # of the text in each row; None where there is none
        self._calls: dict[int, GraphCall] = {}

    @property
    def is_full(self) -> bool:
        """Whether every row has a text."""
        return self._lengths.count(None) == 0 and len(self._lengths) >= self._most

    def admit(self, source: KvCache, length: int) -> int:
        """Take over the first `length` tokens of a cache of one row; returns the row, which `step` and `leave` take.

        Raises:
            ContextError: all rows are taken.
        """
        if self.is_full:
            raise ContextError(f"all {self._most} rows of the batch are taken")
        if None in self._lengths:
            row = self._lengths.index(None)
            self._lengths[row] = length
        else:
            row = len(self._lengths)
            self._lengths.append(length)
        self._cache.copy_rows(source, np.zeros(1, np.intp), np.array([row]), 0, length)
        return row

    def leave(self, row: int) -> None:
        """The text of `row` is done."""
        self._lengths[row] = None
        while self._lengths and self._lengths[-1] is None:
            self._lengths.pop()

    def moved_down(self) -> tuple[int, int] | None:
        """Move the last text into a gap where a step then computes fewer rows; returns its old and its new row."""
        gaps = self._lengths.count(None)
        if _whole_groups(len(self._lengths) - gaps) == _whole_groups(len(self._lengths)):
            return None
        last = len(self._lengths) - 1
        gap = self._lengths.index(None)
        length = self._lengths[last]
        assert length is not None  # `leave` drops rows without a text from the end
        self._cache.copy_rows(self._cache, np.array([last]), np.array([gap]), 0, length)
        self._lengths[gap] = length
        self.leave(last)
        return last, gap

    def step(self, ids: Mapping[int, int]) -> Logits:
        """Append a token to each row of `ids`, by row; returns the logits (B, V) of all rows, which the next step
        overwrites. Every text must get a token.

        Raises:
            ContextError: a row has no room.
        """
        assert ids.keys() == {row for row, length in enumerate(self._lengths) if length is not None}
        count = self._rows_to_compute()
        lengths = np.zeros(count, np.int64)
        tokens = np.full((count, 1), _IDLE_TOKEN, np.int64)
        for row, token in ids.items():
            length = self._lengths[row]
            assert length is not None
            if length >= self._capacity:
                raise ContextError(f"a row of the batch has room for {self._capacity} tokens, and all are used")
            lengths[row], tokens[row] = length, token
        if count not in self._calls:
            self._calls[count] = GraphCall(self._graph, self._cache, count, 1, count)
        logits = self._calls[count].run(tokens, lengths)
        for row in ids:
            self._lengths[row] = int(lengths[row]) + 1
        return logits

    def _rows_to_compute(self) -> int:
        if self._graph.device.kind != "cpu":
            return self._cache.batch
        return _whole_groups(len(self._lengths))


def _whole_groups(rows: int) -> int:
    return max(1, -(-rows // ROW_GROUP)) * ROW_GROUP
