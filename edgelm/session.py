"""One running graph: an ONNX Runtime session, a KV cache, and the position in it. Ids in, logits out; no text.

Shapes: B batch (1 here), T new tokens, P past tokens, C cache capacity, H heads, D head dim, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgelm.bundle import Bundle
from edgelm.device import (
    Device,
    choose_device,
    create_inference_session,
    default_threads,
    import_onnxruntime,
    require_version,
)
from edgelm.errors import BundleError, ContextError, DeviceError, PromptError

Ids = Sequence[int] | npt.NDArray[np.integer[Any]]
Logits = npt.NDArray[np.float32]

PREFILL_CHUNK_TOKENS = 256
"""Longer prompts run in pieces of this size, which bounds the memory of activations. A multiple of 4: MatMulNBits
computes rows in groups and the rest one by one, and the two differ in the last bits (docs/decisions.md)."""


class Session:
    """A graph with a KV cache of its own.

    Several sessions may share one graph (`sibling`): the weights exist once, each session has its own cache.
    A session may be used by one thread at a time; different sessions by different threads.
    """

    def __init__(self, bundle: Bundle, ort_session: Any, device: Device, threads: int) -> None:
        """Args: a bundle, the ``onnxruntime.InferenceSession`` of its graph, and where that runs."""
        self.bundle = bundle
        self.device = device
        self.threads = threads
        self._ort_session = ort_session
        self._onnxruntime = import_onnxruntime()
        self._position = 0
        self._cache = self._new_cache()
        self._decode = _Call(self, 1, 1)

    @classmethod
    def open(cls, bundle: Bundle, *, device: str = "auto", threads: int | None = None) -> "Session":
        """Load the bundle's graph.

        Args:
            device: "auto", "cpu", "cuda" or "cuda:N".
            threads: CPU threads; None for all CPUs this process may use.

        Raises:
            DeviceError: ONNX Runtime is missing or too old, or the device cannot be used.
            BundleError: ONNX Runtime refuses the graph, or it differs from the manifest.
        """
        if threads is not None and not (isinstance(threads, int) and 1 <= threads <= 1024):
            raise DeviceError(f"threads must be a whole number from 1 to 1024, got {threads!r}")
        graph = bundle.manifest.graph
        onnxruntime = import_onnxruntime()
        require_version(onnxruntime.__version__, graph.minimum_onnxruntime)
        place = choose_device(device, graph, onnxruntime)
        count = threads or default_threads()
        try:
            ort_session = create_inference_session(bundle.file(graph.file), place, count, onnxruntime)
        except DeviceError:
            raise
        except Exception as error:  # ORT's own exceptions share no base class but Exception
            reason = (str(error).splitlines() or ["no reason given"])[0]
            raise BundleError(f"ONNX Runtime cannot load {graph.file!r} of {str(bundle.path)!r}: {reason}") from None
        _check_signature(bundle, ort_session)
        return cls(bundle, ort_session, place, count)

    @property
    def vocab_size(self) -> int:
        """V: token ids are 0 to V - 1."""
        return self.bundle.manifest.architecture.vocab_size

    @property
    def context_length(self) -> int:
        """C: how many tokens the cache can hold."""
        return self.bundle.manifest.architecture.context_length

    @property
    def position(self) -> int:
        """P: how many tokens the cache holds."""
        return self._position

    def sibling(self) -> "Session":
        """A session of the same graph with an empty cache of its own; costs no weights."""
        return Session(self.bundle, self._ort_session, self.device, self.threads)

    def step(self, ids: Ids) -> Logits:
        """Append `ids` to the cache; returns the last position's logits, float32 of shape (V,), the caller's own.

        Raises:
            PromptError: no ids, or one outside 0 to V - 1; the cache is unchanged.
            ContextError: more ids than the context has room for; the cache is unchanged.
        """
        array = self._checked(ids)  # (T,)
        if len(array) == 1:
            return self._run(self._decode, array).reshape(-1).copy()  # (V,)
        logits: Logits | None = None
        for chunk in _chunks(array):
            logits = self._run(_Call(self, len(chunk), 1), chunk)  # (1, V)
        assert logits is not None
        return logits.reshape(-1)  # (V,)

    def score(self, ids: Ids) -> Logits:
        """Append `ids` to the cache; returns the logits of every one of them, float32 of shape (T, V).

        Raises:
            PromptError, ContextError: as `step`.
        """
        chunks = _chunks(self._checked(ids))
        return np.concatenate([self._run(_Call(self, len(chunk), len(chunk)), chunk) for chunk in chunks])  # (T, V)

    def rewind(self, count: int) -> None:
        """Forget the last `count` tokens.

        Raises:
            ContextError: the cache holds fewer.
        """
        if not 0 <= count <= self._position:
            raise ContextError(f"cannot rewind {count} tokens: the cache holds {self._position}")
        self._position -= count

    def reset(self) -> None:
        """Forget all tokens."""
        self._position = 0

    def _run(self, call: "_Call", ids: npt.NDArray[np.int64]) -> Logits:
        logits = call.run(ids, self._position)  # (N, V)
        self._position += len(ids)
        return logits

    def _checked(self, ids: Ids) -> npt.NDArray[np.int64]:
        array = as_ids(ids, self.vocab_size)
        room = self.context_length - self._position
        if len(array) > room:
            raise ContextError(
                f"{len(array)} tokens do not fit: the context holds {self.context_length} and {self._position} are used"
            )
        return array

    def _new_cache(self) -> list[Any]:
        """Key and value of every layer, (1, H, C, D) each, as OrtValues; pages are touched only as they fill."""
        facts = self.bundle.manifest.architecture
        dtype = np.dtype(self.bundle.manifest.graph.kv_dtype)
        shape = (1, facts.num_heads, facts.context_length, facts.head_dim)
        make = self._onnxruntime.OrtValue
        if self.device.kind == "cpu":
            # One allocation, for large ones come from the system untouched; small ones come from the heap, once a
            # first cache was freed there, and are zeroed whole.
            whole = np.zeros((2 * facts.num_layers, *shape), dtype)
            return [make.ortvalue_from_numpy(part) for part in whole]
        return [
            make.ortvalue_from_shape_and_type(shape, dtype.type, self.device.kind, self.device.index)
            for _ in range(2 * facts.num_layers)
        ]


class _Call:
    """The graph bound to buffers for T new ids and N rows of logits; past and present are one buffer, in place."""

    def __init__(self, session: Session, new_tokens: int, logit_rows: int) -> None:
        self._ort_session = session._ort_session  # not the session itself: a cycle would keep caches alive
        self._binding = session._ort_session.io_binding()
        graph = session.bundle.manifest.graph
        self._input_ids = np.zeros((1, new_tokens), np.int64)  # (B, T)
        self._position_ids = np.zeros((1, new_tokens), np.int64)  # (B, T)
        self._seqlens_k = np.zeros(1, np.int32)  # (B,) total tokens of the row after this call, minus one
        self._total_sequence_length = np.zeros((), np.int32)
        self._logits = np.empty((logit_rows, session.vocab_size), np.float32)  # (N, V)
        self._inputs = {
            graph.input_ids: self._input_ids,
            graph.position_ids: self._position_ids,
            graph.seqlens_k: self._seqlens_k,
            graph.total_sequence_length: self._total_sequence_length,
            graph.query_seqlens: np.full(1, new_tokens, np.int32),  # (B,) valid ids of each row: here, all
            graph.logits_index: np.arange(new_tokens - logit_rows, new_tokens, dtype=np.int64),  # (N,)
        }
        ort_value = session._onnxruntime.OrtValue.ortvalue_from_numpy
        self._binding.bind_ortvalue_output(graph.logits, ort_value(self._logits))
        for layer in range(session.bundle.manifest.architecture.num_layers):
            for part in range(2):
                cache = session._cache[2 * layer + part]
                self._binding.bind_ortvalue_input(graph.past_names[part].replace("{layer}", str(layer)), cache)
                self._binding.bind_ortvalue_output(graph.present_names[part].replace("{layer}", str(layer)), cache)
        # On the CPU a bound OrtValue aliases its array: bind once, write in place. Elsewhere binding copies.
        self._bound_once = session.device.kind == "cpu"
        if self._bound_once:
            for name, array in self._inputs.items():
                self._binding.bind_ortvalue_input(name, ort_value(array))

    def run(self, ids: npt.NDArray[np.int64], past: int) -> Logits:
        """Run `ids` after `past` cached tokens; the logits (N, V) are this object's buffer."""
        total = past + len(ids)
        self._input_ids[0] = ids
        self._position_ids[0] = np.arange(past, total)
        self._seqlens_k[0] = total - 1
        self._total_sequence_length[...] = total
        if not self._bound_once:
            for name, array in self._inputs.items():
                self._binding.bind_cpu_input(name, array)
        self._ort_session.run_with_iobinding(self._binding)
        return self._logits


def as_ids(ids: Ids, vocab_size: int) -> npt.NDArray[np.int64]:
    """Check token ids; returns int64 of shape (T,), T >= 1.

    Raises:
        PromptError: empty, not one-dimensional, not whole numbers, or outside 0 to `vocab_size` - 1.
    """
    try:
        array = np.asarray(ids)
    except (ValueError, OverflowError):
        raise PromptError("token ids must be a flat list of whole numbers") from None
    if array.size == 0:
        raise PromptError("there are no token ids; give at least one")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise PromptError(f"token ids must be a flat list of whole numbers, got {array.dtype} of shape {array.shape}")
    low, high = array.min(), array.max()
    if low < 0 or high >= vocab_size:
        wrong = int(low if low < 0 else high)
        raise PromptError(f"token id {wrong} is out of range: this model knows 0 to {vocab_size - 1}")
    return array.astype(np.int64, copy=False)


def _chunks(ids: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Pieces of PREFILL_CHUNK_TOKENS; a single token left over joins the last piece. GroupQueryAttention has another
    kernel for one token, which differs in the last bits, and results must not depend on where a prompt is cut."""
    starts = list(range(0, max(1, len(ids) - 1), PREFILL_CHUNK_TOKENS))
    return [ids[start:stop] for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True)]


def _check_signature(bundle: Bundle, ort_session: Any) -> None:
    """The graph must have exactly the inputs, outputs and sizes the manifest states."""
    facts, graph = bundle.manifest.architecture, bundle.manifest.graph
    layers = range(facts.num_layers)
    cache = [facts.num_heads, None, facts.head_dim]  # axis 0 is the batch, None stands for any size
    inputs: dict[str, list[int | None]] = {
        graph.input_ids: [None],
        graph.position_ids: [None],
        graph.seqlens_k: [],
        graph.query_seqlens: [],
        graph.total_sequence_length: [],
        graph.logits_index: [],
        **{name.replace("{layer}", str(i)): cache for name in graph.past_names for i in layers},
    }
    outputs: dict[str, list[int | None]] = {
        graph.logits: [facts.vocab_size],
        graph.hidden_states: [None, facts.hidden_size],
        **{name.replace("{layer}", str(i)): cache for name in graph.present_names for i in layers},
    }
    for kind, expected, found in (
        ("inputs", inputs, ort_session.get_inputs()),
        ("outputs", outputs, ort_session.get_outputs()),
    ):
        if {node.name for node in found} != set(expected):
            raise BundleError(f"the graph {graph.file!r} has other {kind} than bundle.json states")
        for node in found:
            sizes = node.shape[1:]
            if len(sizes) != len(expected[node.name]) or any(
                want is not None and isinstance(size, int) and size != want
                for size, want in zip(sizes, expected[node.name], strict=True)
            ):
                raise BundleError(
                    f"{node.name!r} of the graph has the shape {node.shape}, which differs from what bundle.json states"
                )
