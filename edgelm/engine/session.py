"""One running graph: an ONNX Runtime session, a KV cache, and the position in it. Ids in, logits out; no text.

Shapes: T new tokens, P past tokens, C cache capacity, D hidden size, V vocabulary, N rows of logits.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from edgelm.bundle.folder import Bundle
from edgelm.engine.batch import BatchSession
from edgelm.engine.call import GraphCall, Hidden, KeysValues, KvCache, LoadedGraph, Logits
from edgelm.engine.device import (
    choose_device,
    create_inference_session,
    default_threads,
    import_onnxruntime,
    require_version,
)
from edgelm.engine.draft_cost import DraftCost, draft_cost
from edgelm.engine.ragged_batch import RaggedBatch
from edgelm.engine.signature import check_signature
from edgelm.errors import ContextError, DeviceError
from edgelm.ids import Ids, as_ids, prompt_chunks


class Session:
    """A graph with a KV cache of its own.

    Several sessions may share one graph (`sibling`): the weights exist once, each session has its own cache.
    A session may be used by one thread at a time; different sessions by different threads.
    """

    def __init__(self, graph: LoadedGraph) -> None:
        """Use `graph`, which others may use too; `open` loads one."""
        self._graph = graph
        self.bundle, self.device, self.threads = graph.bundle, graph.device, graph.threads
        self.shared_threads, self.batch_invariant = graph.shared_threads, graph.batch_invariant
        self._prefix: KeysValues | None = None
        self._base = self._position = 0  # where texts begin, and the next token comes, in the cache
        self._most = 0
        self._cache = KvCache(graph, 1, self.bundle.manifest.architecture.context_length)
        self._decode = GraphCall(graph, self._cache, 1, 1, 1)
        self._few = {1: self._decode}

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        *,
        device: str = "auto",
        threads: int | None = None,
        shared_threads: bool = False,
        batch_invariant: bool = False,
    ) -> "Session":
        """Load the bundle's graph.

        Args:
            device: "auto", "cpu", "cuda" or "cuda:N".
            threads: CPU threads; None for all CPUs this process may use.
            shared_threads: whether to run on threads that all sessions of the process share; all or none must.
            batch_invariant: whether to compute single tokens as a batch does, slower, to the same bits; CPU only.

        Raises:
            DeviceError: ONNX Runtime is missing or too old, the device cannot be used, or not for a
                `batch_invariant` session, or the process's other sessions do not fit `shared_threads`.
            BundleError: ONNX Runtime refuses the graph, or it differs from the manifest.
        """
        if threads is not None and not (isinstance(threads, int) and 1 <= threads <= 1024):
            raise DeviceError(f"threads must be a whole number from 1 to 1024, got {threads!r}")
        for name, value in (("shared_threads", shared_threads), ("batch_invariant", batch_invariant)):
            if not isinstance(value, bool):
                raise DeviceError(f"{name} must be True or False, got {value!r}")
        graph = bundle.manifest.graph
        onnxruntime = import_onnxruntime()
        require_version(onnxruntime.__version__, graph.minimum_onnxruntime)
        place = choose_device(device, graph, onnxruntime)
        if batch_invariant and place.kind != "cpu":
            raise DeviceError(
                f"batch_invariant works on the CPU only, not on {place}: give device='cpu', or leave it out"
            )
        count = threads or default_threads()
        ort_session = create_inference_session(
            bundle.file(graph.file), place, count, onnxruntime, shared_threads=shared_threads
        )
        check_signature(bundle, ort_session)
        return cls(LoadedGraph(bundle, ort_session, onnxruntime, place, count, shared_threads, batch_invariant))

    @property
    def vocab_size(self) -> int:
        """V: token ids are 0 to V - 1."""
        return self.bundle.manifest.architecture.vocab_size

    @property
    def context_length(self) -> int:
        """C: how many tokens the cache can hold behind the prefix."""
        return self.bundle.manifest.architecture.context_length - self._base

    @property
    def position(self) -> int:
        """P: how many tokens the cache holds behind the prefix."""
        return self._position - self._base

    @property
    def prefix(self) -> KeysValues | None:
        """Keys and values that stand before every text here; see `begin_after`."""
        return self._prefix

    @property
    def most_tokens(self) -> int:
        """How many places of the cache were ever written: what it takes of memory, with `bytes_per_token`."""
        return max(self._most, self._position)

    @property
    def bytes_per_token(self) -> int:
        """What a token takes in the cache."""
        manifest = self.bundle.manifest
        return manifest.architecture.cache_values_per_token * np.dtype(manifest.graph.kv_dtype).itemsize

    @property
    def draft_cost(self) -> DraftCost:
        """What computing several tokens at once costs."""
        return draft_cost(self.bundle.manifest.recipe)

    def sibling(self) -> "Session":
        """A session of the same graph with an empty cache of its own, and the same prefix; costs no weights."""
        other = Session(self._graph)
        if self._prefix is not None:
            other.begin_after(self._prefix)
        return other

    def begin_after(self, prefix: KeysValues | None) -> None:
        """Forget all tokens, and begin every text behind these keys and values, (2·layers, H, N, p), from now on: it
        takes the positions N, N + 1, ..., which count as 0, 1, ... here. None for nothing.

        Raises:
            ContextError: they leave no room.
        """
        tokens, context = 0 if prefix is None else prefix.shape[2], self.bundle.manifest.architecture.context_length
        if tokens >= context:
            raise ContextError(f"a prefix of {tokens} tokens leaves no room in a context of {context}")
        if prefix is not None:
            self._cache.write(0, 0, prefix)
        self._prefix = prefix
        self._move_to(tokens)
        self._base = tokens

    def close(self) -> None:
        """Free the graph, which all siblings share, once other threads' calls are done; later ones raise ClosedError.

        Closing twice is no error.
        """
        self._graph.ort_session.close()

    def step(self, ids: Ids) -> Logits:
        """Append `ids` to the cache; returns the last position's logits, float32 of shape (V,), the caller's own.

        Raises:
            PromptError: no ids, or one outside 0 to V - 1; the cache is unchanged.
            ContextError: more ids than the context has room for; the cache is unchanged.
            ClosedError: the model is closed.
            ForkError: the session was made before this process was forked.
        """
        array = self._checked(ids)  # (T,)
        if len(array) == 1:
            return self._run(self._decode, array).reshape(-1).copy()  # (V,)
        logits: Logits | None = None
        for chunk in prompt_chunks(array):
            logits = self._run(self._call(len(chunk), 1), chunk)  # (1, V)
        assert logits is not None
        return logits.reshape(-1)  # (V,)

    def score(self, ids: Ids) -> Logits:
        """Append `ids` to the cache; returns the logits of every one of them, float32 of shape (T, V).

        Raises:
            PromptError, ContextError: as `step`.
        """
        return np.concatenate(list(self.score_pieces(ids)))  # (T, V)

    def score_pieces(self, ids: Ids) -> Iterator[Logits]:
        """As `score`, in pieces of some hundred rows: all logits of a long text at once may not fit into memory."""
        for chunk in prompt_chunks(self._checked(ids)):
            yield self._run(self._call(len(chunk), len(chunk)), chunk)

    def step_all(self, ids: Ids) -> Logits:
        """As `score` for a few ids, in buffers that are kept: the logits (T, V) are valid until the next call.

        Raises:
            PromptError, ContextError: as `step`.
        """
        array = self._checked(ids)
        if len(array) not in self._few:
            self._few[len(array)] = self._call(len(array), len(array))
        return self._run(self._few[len(array)], array)

    def step_hidden(self, ids: Ids) -> tuple[Logits, Hidden]:
        """As `step`, with the hidden states of all of `ids`, the final norm's output, float32 of shape (T, D).

        Raises:
            PromptError, ContextError: as `step`.
        """
        hidden: list[Hidden] = []
        logits: Logits | None = None
        for chunk in prompt_chunks(self._checked(ids)):
            call = self._call(len(chunk), 1, hidden=True)
            logits = self._run(call, chunk)  # (1, V)
            hidden.append(call.hidden)  # (T, D)
        assert logits is not None
        return logits.reshape(-1), np.concatenate(hidden)

    def batch(self, rows: int, capacity: int) -> BatchSession:
        """A batch of `rows` that continue what this session holds, with room for `capacity` tokens in all.

        Raises:
            ContextError: less room than this session holds already.
        """
        room = min(capacity, self.context_length)
        if self.position > room:
            raise ContextError(f"a batch with room for {capacity} tokens cannot take over {self.position}")
        return BatchSession(self._graph, self._cache, self._position, rows, self._base + room)

    def ragged_batch(self, rows: int) -> RaggedBatch:
        """An empty batch of the same graph for up to `rows` texts of any lengths; see `copy_into`."""
        return RaggedBatch(self._graph, rows, self._base + self.context_length)

    def copy_into(self, batch: RaggedBatch) -> int:
        """Have a text in `batch` that continues what this session holds; returns its row."""
        return batch.admit(self._cache, self._position)

    def remembered(self, count: int) -> KeysValues:
        """Keys and values of the first `count` tokens, a copy, of the cache's type and shape (2·layers, H, count, p).

        Raises:
            ContextError: the cache holds fewer.
        """
        if count > self.position:
            raise ContextError(f"cannot copy {count} tokens: the cache holds {self.position}")
        return self._cache.read(0, self._base, self._base + count)

    def restore(self, content: KeysValues) -> None:
        """Hold what `remembered` gave, behind the same prefix, and nothing else."""
        self._cache.write(0, self._base, content)
        self._move_to(self._base + content.shape[2])

    def rewind(self, count: int) -> None:
        """Forget the last `count` tokens.

        Raises:
            ContextError: the cache holds fewer.
        """
        if not 0 <= count <= self.position:
            raise ContextError(f"cannot rewind {count} tokens: the cache holds {self.position}")
        self._move_to(self._position - count)

    def reset(self) -> None:
        """Forget all tokens; the prefix stays."""
        self._move_to(self._base)

    def _move_to(self, position: int) -> None:
        self._most = self.most_tokens
        self._position = position

    def _call(self, new_tokens: int, logit_rows: int, *, hidden: bool = False) -> GraphCall:
        return GraphCall(self._graph, self._cache, 1, new_tokens, logit_rows, hidden=hidden)

    def _run(self, call: GraphCall, ids: npt.NDArray[np.int64]) -> Logits:
        logits = call.run(ids, self._position)  # (N, V)
        self._position += len(ids)
        return logits

    def _checked(self, ids: Ids) -> npt.NDArray[np.int64]:
        array = as_ids(ids, self.vocab_size)
        room = self.context_length - self.position
        if len(array) > room:
            raise ContextError(
                f"{len(array)} tokens do not fit: the context holds {self.context_length} and {self.position} are used"
            )
        return array
