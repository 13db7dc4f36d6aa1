"""A position in a text: a loaded graph with a key-value cache of its own. Token ids in, logits out.

Shapes: T new tokens, P past tokens, C context, H key-value heads, D cached head dim, E hidden size, V vocabulary.
"""

from collections.abc import Iterator

import numpy as np

from edgelm.engine.batch import IDLE_TOKEN, Batch
from edgelm.engine.cache import ROW_GROUP, LoadedGraph, new_cache
from edgelm.engine.call import DraftCost, GraphCall, draft_cost
from edgelm.errors import ContextError
from edgelm.ids import Attention, Hidden, IdArray, KeysValues, Logits, TokenIds, as_ids, prompt_chunks

TWO_STAGE_ROWS = 64
"""How many rows of logits a head of two stages computes at once. With GPT-2 124M they look up 25 MB."""


class Session:
    """A graph with a key-value cache of its own; `Graph.session` makes one.

    Sessions of one graph share its weights, and each has its own cache. One thread at a time may use a session;
    different threads may use different sessions.
    """

    def __init__(self, graph: LoadedGraph, prefix: KeysValues | None = None) -> None:
        """Make an empty session behind `prefix`; see `begin_after`.

        Raises:
            ContextError: the prefix leaves no room.
            InsufficientMemoryError: there is no memory for another cache.
        """
        self._graph = graph
        self.bundle, self.device, self.threads = graph.bundle, graph.device, graph.threads
        self.shared_threads, self.batch_invariant = graph.shared_threads, graph.batch_invariant
        facts = self.bundle.manifest.architecture
        self.vocab_size = facts.vocab_size
        """V: token ids are 0 to V - 1."""
        self.context_length = facts.context_length
        """C: how many tokens the cache can hold behind the prefix."""
        # A batch invariant session computes single tokens in a whole row group, and ignores the other rows.
        self._cache = new_cache(graph, ROW_GROUP if graph.batch_invariant else 1, facts.context_length)
        self.prefix: KeysValues | None = None
        """Keys and values that stand before every text; see `begin_after`."""
        self._base = 0  # the position in the cache where texts begin
        self.position = 0
        """P: how many tokens the cache holds behind the prefix."""
        self.high_water_tokens = 0
        """How many positions of the cache were ever written; times `bytes_per_token`, this is the memory it takes."""
        self._short_calls = {1: self._call(1, 1)}
        if prefix is not None:
            self.begin_after(prefix)

    @property
    def bytes_per_token(self) -> int:
        """Memory that the keys and values of a token take."""
        manifest = self.bundle.manifest
        return manifest.architecture.cache_values_per_token * np.dtype(manifest.graph.kv_dtype).itemsize

    @property
    def piece_tokens(self) -> int:
        """How many tokens one call computes at most; fewer than usual where memory is limited."""
        return self._graph.piece_tokens

    @property
    def draft_cost(self) -> DraftCost:
        """The cost of computing several tokens in one call."""
        return draft_cost(self.bundle.manifest.recipe)

    def sibling(self) -> "Session":
        """A session of the same graph and prefix with an empty cache; raises ClosedError if the graph is closed."""
        return Session(self._graph, self.prefix)

    def begin_after(self, prefix: KeysValues | None) -> None:
        """Forget all tokens, and begin every text behind `prefix`, (2·layers, H, N, D) or None, from now on.

        The prefix takes the first N positions of the graph. The positions behind it count as 0, 1, ... in `position`.
        Raises ContextError if it leaves no room.
        """
        tokens, context = 0 if prefix is None else prefix.shape[2], self.bundle.manifest.architecture.context_length
        if tokens >= context:
            raise ContextError(f"a prefix of {tokens} tokens leaves no room in a context of {context}")
        if prefix is not None:
            self._cache.write(0, 0, prefix)
        self.prefix = prefix
        self._base, self.context_length = tokens, context - tokens
        self._hold(0)

    def step(self, ids: TokenIds, *, as_in_batch: bool = False) -> Logits:
        """Append `ids` (T,) to the cache; returns the logits of the last position, float32 (V,), the caller's own.

        `as_in_batch` says that the logits of several tokens must be the bits of `Batch.prefill`.

        Raises:
            PromptError: there are no ids, or one is outside 0 to V - 1; the cache is unchanged.
            ContextError: there are more ids than the context has room for; the cache is unchanged.
            ClosedError: the model is closed.
            ForkError: the session was made before this process was forked.
        """
        array = self._checked(ids)  # (T,)
        if len(array) == 1:
            return self._run(self._short_calls[1], array).reshape(-1).copy()  # (V,)
        logits: Logits | None = None
        rows = ROW_GROUP if as_in_batch or self.batch_invariant else 1  # one row of logits has a kernel of its own
        for chunk in prompt_chunks(array, self._graph.piece_tokens):
            logits = self._run(self._call(len(chunk), rows), chunk)  # (N, V)
        assert logits is not None
        last: Logits = logits[-1]  # (V,)
        return last

    def score(self, ids: TokenIds) -> Logits:
        """Append `ids` (T,) to the cache; returns the logits of every position, float32 (T, V). Raises as `step`."""
        return np.concatenate(list(self.score_pieces(ids)))  # (T, V)

    def score_pieces(self, ids: TokenIds) -> Iterator[Logits]:
        """Like `score`, in pieces of a few hundred rows, because all logits of a long text may not fit into memory.

        A head of two stages looks up rows of its table for every row of logits, so its pieces are smaller.
        """
        rows = self._graph.piece_tokens
        if self.bundle.manifest.graph.exact_logits is not None:
            rows = min(rows, TWO_STAGE_ROWS)
        for chunk in prompt_chunks(self._checked(ids), rows):
            yield self._run(self._call(len(chunk), len(chunk)), chunk)

    def attention_pieces(self, ids: TokenIds) -> Iterator[Attention]:
        """Append `ids` in the pieces of `score_pieces`; the attention of each piece's T tokens, (L, A, T, P + T).

        P counts the prefix and all tokens before the piece. The graph is one of `Graph.showing_attention`.
        """
        for chunk in prompt_chunks(self._checked(ids), self._graph.piece_tokens):
            call = self._call(len(chunk), 1, attended_past=self._base + self.position)
            self._run(call, chunk)
            yield call.attention

    def step_all(self, ids: TokenIds) -> Logits:
        """Like `score` for a few ids, in buffers that are kept: the next call overwrites the logits (T, V)."""
        array = self._checked(ids)
        if len(array) not in self._short_calls:
            self._short_calls[len(array)] = self._call(len(array), len(array))
        return self._run(self._short_calls[len(array)], array)

    def step_hidden(self, ids: TokenIds) -> tuple[Logits, Hidden]:
        """Like `step`, with the hidden states of all of `ids`: the output of the final norm, float32 (T, E)."""
        hidden: list[Hidden] = []
        logits: Logits | None = None
        for chunk in prompt_chunks(self._checked(ids), self._graph.piece_tokens):
            call = self._call(len(chunk), 1, hidden=True)
            logits = self._run(call, chunk)  # (1, V)
            hidden.append(call.hidden[: len(chunk)])  # (T, E)
        assert logits is not None
        return logits.reshape(-1), np.concatenate(hidden)

    def batch(self, rows: int, capacity: int) -> Batch:
        """A batch of `rows` texts that all continue this session's tokens, up to `capacity` tokens each in all.

        Raises ContextError if the session has more tokens than `capacity`.
        """
        room = min(capacity, self.context_length)
        if self.position > room:
            raise ContextError(f"a batch with room for {capacity} tokens cannot take over {self.position}")
        batch = Batch(self._graph, rows, self._base + room, whole_groups_only=self.batch_invariant)
        batch.fill(self._cache, self._base + self.position)
        return batch

    def empty_batch(self, rows: int) -> Batch:
        """An empty batch of the same graph for up to `rows` texts of any lengths; see `copy_into`."""
        return Batch(self._graph, rows, self._base + self.context_length)

    def copy_into(self, batch: Batch) -> int:
        """Have a text in `batch` continue this session's tokens; returns its row."""
        return batch.admit(self._cache, self._base + self.position)

    def copy_behind(self, batch: Batch) -> int:
        """As `copy_into`, in the row behind all others."""
        return batch.append(self._cache, self._base + self.position)

    def remembered(self, count: int) -> KeysValues:
        """A copy of the keys and values of the first `count` tokens, (2·layers, H, count, D), of the cache's dtype.

        Raises ContextError if the cache holds fewer tokens.
        """
        if count > self.position:
            raise ContextError(f"cannot copy {count} tokens: the cache holds {self.position}")
        return self._cache.read(0, self._base, self._base + count)

    def restore(self, content: KeysValues) -> None:
        """Hold only the tokens whose keys and values `content` are, as `remembered` returned them with this prefix."""
        self._cache.write(0, self._base, content)
        self._hold(content.shape[2])

    def rewind(self, count: int) -> None:
        """Forget the last `count` tokens; raises ContextError if the cache holds fewer tokens."""
        if not 0 <= count <= self.position:
            raise ContextError(f"cannot rewind {count} tokens: the cache holds {self.position}")
        self.position -= count

    def reset(self) -> None:
        """Forget all tokens; the prefix stays."""
        self.position = 0

    def _hold(self, tokens: int) -> None:
        self.position = tokens
        self.high_water_tokens = max(self.high_water_tokens, self._base + tokens)

    def _call(
        self, new_tokens: int, logit_rows: int, *, hidden: bool = False, attended_past: int | None = None
    ) -> GraphCall:
        rows = 1
        if new_tokens == 1:
            rows = logit_rows = self._cache.rows
        return GraphCall(
            self._graph, self._cache, rows, new_tokens, logit_rows, hidden=hidden, attended_past=attended_past
        )

    def _run(self, call: GraphCall, ids: IdArray) -> Logits:
        """Run `ids` (T,) and advance; returns the call's buffer of logits (N, V)."""
        if len(ids) == 1 and self._cache.rows > 1:
            tokens, past = np.full((self._cache.rows, 1), IDLE_TOKEN, np.int64), np.zeros(self._cache.rows, np.int64)
            tokens[0], past[0] = ids, self._base + self.position
            logits = call.run(tokens, past)[:1]  # (1, V)
        else:
            logits = call.run(ids, self._base + self.position)  # (N, V)
        self._hold(self.position + len(ids))
        return logits

    def _checked(self, ids: TokenIds) -> IdArray:
        array = as_ids(ids, self.vocab_size)
        room = self.context_length - self.position
        if len(array) > room:
            raise ContextError(
                f"{len(array)} tokens do not fit: the context holds {self.context_length} and {self.position} are used"
            )
        return array
