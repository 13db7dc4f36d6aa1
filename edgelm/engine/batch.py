"""Texts that decode side by side, one in each row of a cache.

Shapes: B rows in use, T tokens of one row, E hidden size, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np

from edgelm.engine.cache import Cache, LoadedGraph, new_cache
from edgelm.engine.call import GraphCall, whole_groups
from edgelm.errors import ContextError, PromptError
from edgelm.ids import Hidden, IdArray, Indices, Logits, TokenIds, as_ids

IDLE_TOKEN = 0
"""The token to feed to a row without a text, whose logits nobody reads."""


class Batch:
    """Up to `rows` texts of any lengths. Texts come (`admit`), grow by one token a step, and leave.

    Not for use by several threads at a time.

    Args:
        graph: the loaded graph.
        rows: maximum number of texts.
        capacity: cache length of each row, in tokens.
        whole_groups_only: whether `step` computes an even number of rows, so that a text computes the same bits
            whichever texts are beside it. Otherwise only the rows in use are computed, which is faster for a fixed odd
            number of rows, but the last bits may differ from those of a text alone.
    """

    def __init__(self, graph: LoadedGraph, rows: int, capacity: int, *, whole_groups_only: bool = True) -> None:
        self._graph = graph
        self._row_limit, self._capacity = rows, capacity
        self._whole_groups_only = whole_groups_only
        self._cache = new_cache(graph, self._padded(rows), capacity)
        self._lengths: list[int | None] = []  # tokens of each row; None where a row has no text
        self._shared = 0  # leading tokens that all rows have in common
        self._calls: dict[tuple[int, bool], GraphCall] = {}
        self._longer_calls: dict[int, GraphCall] = {}  # by their number of tokens

    @property
    def is_full(self) -> bool:
        """Whether every row has a text."""
        return len(self._lengths) - self._lengths.count(None) >= self._row_limit

    @property
    def position(self) -> int:
        """Tokens in the longest row."""
        return max((length for length in self._lengths if length is not None), default=0)

    @property
    def room(self) -> int:
        """How many tokens the longest row can take."""
        return self._capacity - self.position

    def fill(self, source: Cache, length: int) -> None:
        """Make every row of this empty batch a copy of the first `length` tokens of a cache of one row."""
        rows = self._row_limit
        self._cache.copy_rows(source, np.zeros(rows, np.intp), np.arange(rows), 0, length)
        self._lengths = [length] * rows
        self._shared = length

    def admit(self, source: Cache, length: int) -> int:
        """Copy the first `length` tokens of a cache of one row into a free row; returns that row.

        Raises ContextError if every row has a text.
        """
        if self.is_full:
            raise ContextError(f"all {self._row_limit} rows of the batch are taken")
        if None not in self._lengths:
            return self.append(source, length)
        row = self._lengths.index(None)
        self._lengths[row] = length
        self._copy(source, row, length)
        return row

    @property
    def rows_behind(self) -> int:
        """How many rows are free behind all others."""
        return self._row_limit - len(self._lengths)

    def append(self, source: Cache, length: int) -> int:
        """As `admit`, in the row behind all others, which must be free."""
        row = len(self._lengths)
        self._lengths.append(length)
        self._copy(source, row, length)
        return row

    def _copy(self, source: Cache, row: int, length: int) -> None:
        self._cache.copy_rows(source, np.zeros(1, np.intp), np.array([row]), 0, length)
        self._shared = 0

    def prefill(self, first_row: int, ids: Sequence[IdArray]) -> Logits:
        """Append two tokens or more to each row from `first_row` on, `ids` (B,) of ids (t,), in one call.

        Every row computes the bits of `Session.step(ids, as_in_batch=True)`: neither other rows nor the padding behind
        shorter ones change them. Returns the logits (B, V) after each row's last token.

        Raises ContextError if a row has no room for as many tokens as the longest list has.
        """
        counts = np.array([len(of_row) for of_row in ids], np.int64)
        width = whole_groups(int(counts.max()))
        past = np.array([length or 0 for length in self._lengths[first_row : first_row + len(ids)]], np.int64)
        if past.max() + counts.max() > self._capacity:
            raise ContextError(f"{counts.max()} tokens do not fit into each row: one has {past.max()} already")
        tokens = np.full((len(ids), width), IDLE_TOKEN, np.int64)  # (B, T)
        for row, of_row in enumerate(ids):
            tokens[row, : len(of_row)] = of_row
        call = GraphCall(self._graph, self._cache, len(ids), width, whole_groups(max(2, len(ids))), first_row=first_row)
        logits = call.run_ragged(tokens, past, counts)[: len(ids)]
        self._lengths[first_row : first_row + len(ids)] = (past + counts).tolist()
        return logits

    def leave(self, row: int) -> None:
        """Free `row`, because its text is finished."""
        self._lengths[row] = None
        while self._lengths and self._lengths[-1] is None:
            self._lengths.pop()

    def moved_down(self) -> tuple[int, int] | None:
        """Move the last text into a gap if a step then computes fewer rows, or if it is the only text.

        Returns its old and new row, or None.
        """
        gaps = self._lengths.count(None)
        texts, rows = len(self._lengths) - gaps, len(self._lengths)
        if self._padded(texts) == self._padded(rows) and not (texts == 1 < rows):
            return None
        last, gap = len(self._lengths) - 1, self._lengths.index(None)
        length = self._lengths[last]
        assert length is not None  # `leave` removes rows without a text from the end
        self._cache.copy_rows(self._cache, np.array([last]), np.array([gap]), 0, length)
        self._lengths[gap] = length
        self.leave(last)
        return last, gap

    def reorder(self, rows: Sequence[int] | Indices) -> None:
        """Make row i a copy of row `rows[i]`, (B,). All rows must have the same length."""
        source = np.asarray(rows)
        position = self.position
        changed = np.flatnonzero(source != np.arange(len(source)))
        if len(changed) and self._shared < position:
            self._cache.copy_rows(self._cache, source[changed], changed, self._shared, position)
        if (source == source[0]).all():
            self._shared = position

    def step(self, ids: TokenIds) -> Logits:
        """Append one token to each row: `ids` (B,), with IDLE_TOKEN for a row without a text.

        Returns the logits (B, V), in a buffer that the next step overwrites.

        Raises:
            PromptError: the number of ids is not B, or an id is unknown.
            ContextError: a row has no room for another token.
        """
        return self._run(ids, hidden=False)[0]

    def step_hidden(self, ids: TokenIds) -> tuple[Logits, Hidden]:
        """Like `step`, with the hidden states of the tokens, (B, E)."""
        logits, call = self._run(ids, hidden=True)
        return logits, call.hidden[: len(logits)]

    def step_all(self, ids: TokenIds) -> Logits:
        """Append several tokens to the only text, which stands in row 0: `ids` (T,).

        Returns the logits (T, V), in a buffer that the next call overwrites. They are those of `Session.step_all`, but
        not those of `step`, because a single token is computed by another kernel (docs/quality.md).

        Raises:
            PromptError: an id is unknown.
            ContextError: there are other texts, or there is no room for the tokens.
        """
        array = as_ids(ids, self._graph.bundle.manifest.architecture.vocab_size)
        if len(self._lengths) != 1 or self._lengths[0] is None:
            raise ContextError("several tokens at once need a batch whose only text stands in row 0")
        if len(array) > self.room:
            raise ContextError(f"{len(array)} tokens do not fit: the batch has room for {self.room} more")
        if len(array) not in self._longer_calls:
            self._longer_calls[len(array)] = GraphCall(self._graph, self._cache, 1, len(array), len(array))
        logits = self._longer_calls[len(array)].run(array, self._lengths[0])
        self._lengths[0] += len(array)
        return logits

    def rewind(self, row: int, count: int) -> None:
        """Forget the last `count` tokens of `row`."""
        length = self._lengths[row]
        assert length is not None  # the caller's row has a text
        self._lengths[row] = length - count

    def _run(self, ids: TokenIds, *, hidden: bool) -> tuple[Logits, GraphCall]:
        array = as_ids(ids, self._graph.bundle.manifest.architecture.vocab_size)
        rows = len(self._lengths)
        if len(array) != rows:
            raise PromptError(f"a batch of {rows} rows takes that many token ids, got {len(array)}")
        if self.position >= self._capacity:
            raise ContextError(f"the batch has room for {self._capacity} tokens, and all are used")
        computed = self._padded(rows) if self._graph.device.kind == "cpu" else self._cache.rows
        tokens = np.full((computed, 1), IDLE_TOKEN, np.int64)
        tokens[:rows, 0] = array
        past = np.zeros(computed, np.int64)
        past[:rows] = [length or 0 for length in self._lengths]
        if (computed, hidden) not in self._calls:
            self._calls[computed, hidden] = GraphCall(self._graph, self._cache, computed, 1, computed, hidden=hidden)
        call = self._calls[computed, hidden]
        logits = call.run(tokens, past)[:rows]
        self._lengths = [None if length is None else length + 1 for length in self._lengths]
        return logits, call

    def _padded(self, rows: int) -> int:
        return whole_groups(max(2, rows)) if self._whole_groups_only else rows
