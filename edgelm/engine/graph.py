"""A bundle's graph in ONNX Runtime: opened once, run by many sessions, closed and forked as a whole.

ONNX Runtime crashes when a session is destroyed while it runs, and hangs in a forked child (`edgelm.engine.fork`). Here
a late use is a named error instead.
"""

import itertools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from types import ModuleType
from typing import Any, Literal

from edgelm.bundle.attention_outputs import with_attention_outputs
from edgelm.bundle.folder import Bundle
from edgelm.bundle.onnx_file import with_weights_at
from edgelm.engine.cache import Binding
from edgelm.engine.device import (
    Device,
    choose_device,
    first_line,
    import_onnxruntime,
    is_lack_of_memory,
    open_inference_session,
    require_version,
)
from edgelm.engine.fork import Handle, notice_fork, watch_forks
from edgelm.engine.huge_pages import LoadedMemory
from edgelm.engine.interpreter import native_lock
from edgelm.engine.memory import ModelMemory, refuse_if_too_large
from edgelm.engine.session import Session
from edgelm.engine.threads import choose_threads
from edgelm.errors import (
    BundleError,
    ClosedError,
    DeviceError,
    EdgelmError,
    ForkError,
    InsufficientMemoryError,
    pass_interrupts_on,
    shown,
)
from edgelm.ids import PREFILL_CHUNK_TOKENS, KeysValues

GraphState = Literal["open", "closed", "forked"]

LONG_USE_RUNS = 32
"""After this many runs the weights move into huge pages. A command that writes one token never pays for the move."""

_MESSAGES = {
    "closed": "the model is closed: load it again",
    "forked": "this session was made before the process forked, and its threads stayed behind: generate with the "
    "model, which opens a session of its own, or make one with Session.sibling()",
}


class Graph:
    """The loaded graph of a bundle. Several threads may use it, close it and fork.

    Attributes:
        bundle: the bundle that the graph belongs to.
        device: where the graph runs.
        threads: number of CPU threads.
        shared_threads: whether all models of the process share these threads.
        batch_invariant: whether single tokens are computed as in a batch, to the same bits.
        piece_tokens: how many tokens of a prompt a call computes at most.
        shows_attention: whether it is a copy whose attention can be seen; see `showing_attention`.
        onnxruntime: the module ``onnxruntime``.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: Device,
        threads: int,
        onnxruntime: ModuleType,
        *,
        shared_threads: bool = False,
        batch_invariant: bool = False,
        piece_tokens: int = PREFILL_CHUNK_TOKENS,
        shows_attention: bool = False,
    ) -> None:
        """Load the graph with finished choices; `open` makes and checks them, and lists the errors."""
        self.bundle, self.device, self.threads, self.onnxruntime = bundle, device, threads, onnxruntime
        self.shared_threads, self.batch_invariant = shared_threads, batch_invariant
        self.piece_tokens, self.shows_attention = piece_tokens, shows_attention
        self._memory = LoadedMemory()
        self._runs = itertools.count(1)
        self._closed = False
        self._bindings: weakref.WeakSet[GraphBinding] = weakref.WeakSet()
        self._lock = native_lock()  # nobody waits for a binding's lock, which is held while computing, and holds this
        with self._lock:
            self._ort_session: Handle | None = self._load()
        watch_forks(self)

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        *,
        device: str = "auto",
        threads: int | None = None,
        shared_threads: bool = False,
        batch_invariant: bool = False,
        piece_tokens: int = PREFILL_CHUNK_TOKENS,
    ) -> "Graph":
        """Load the graph of `bundle`; `edgelm.load` explains the options.

        A call computes at most `piece_tokens` of a prompt, and some more where one token alone would be left over.

        Raises:
            DeviceError: ONNX Runtime is missing or too old; the device cannot be used, or not by a `batch_invariant`
                graph; or the process's other models do not fit `shared_threads`.
            BundleError: ONNX Runtime refuses the graph, or the graph differs from the manifest.
            InsufficientMemoryError: there is no memory left for it.
        """
        if threads is not None and not (isinstance(threads, int) and 1 <= threads <= 1024):
            raise DeviceError(f"threads must be a whole number from 1 to 1024, got {shown(threads)}")
        for name, value in (("shared_threads", shared_threads), ("batch_invariant", batch_invariant)):
            if not isinstance(value, bool):
                raise DeviceError(f"{name} must be True or False, got {shown(value)}")
        onnxruntime = import_onnxruntime()
        require_version(onnxruntime.__version__, bundle.manifest.graph.minimum_onnxruntime)
        place = choose_device(device, bundle.manifest.graph, onnxruntime)
        if batch_invariant and place.kind != "cpu":
            raise DeviceError(
                f"batch_invariant works on the CPU only, not on {place}: give device='cpu', or leave it out"
            )
        count = choose_threads(threads, ModelMemory.of(bundle, piece_tokens=piece_tokens))
        return cls(
            bundle,
            place,
            count,
            onnxruntime,
            shared_threads=shared_threads,
            batch_invariant=batch_invariant,
            piece_tokens=piece_tokens,
        )

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def require_intact_files(self) -> None:
        """Raise BundleError if the graph's files were written into, because ONNX Runtime has mapped them.

        Replacing or removing a file does no harm: the old one lives on until the graph is closed.
        """
        for name, now in self.bundle.stamps().items():
            then = self._stamps.get(name)
            if then is not None and then != now and then.inode == now.inode:
                self.bundle.require_content(name)
                self._stamps[name] = now

    def session(self, prefix: KeysValues | None = None) -> Session:
        """A session with an empty cache of its own, behind `prefix`; see `Session.begin_after`.

        Raises:
            ClosedError: the graph is closed.
            ContextError, InsufficientMemoryError: as `Session`.
        """
        return Session(self, prefix)

    @contextmanager
    def showing_attention(self, attention_bytes: int) -> Iterator["Graph"]:
        """Yield a copy of this graph whose sessions tell their attention (`Session.attention_pieces`), then close it.

        The copy takes the memory of another model, and `attention_bytes` for what it tells.

        Raises:
            DeviceError: this graph is not on the CPU.
            BundleError: the bundle's files were written into or replaced, or its graph has no attention to show.
            InsufficientMemoryError: there is no memory for the copy.
            ClosedError: the graph is closed.
        """
        if self.device.kind != "cpu":
            raise DeviceError(
                f"attention can be seen on the CPU only, not on {self.device}: load the model with device='cpu'"
            )
        if self._closed:
            raise ClosedError(_MESSAGES["closed"])
        self.bundle.require_unchanged(self._stamps)
        refuse_if_too_large(self.bundle, self.piece_tokens, attention_bytes)
        copy = Graph(
            self.bundle,
            self.device,
            self.threads,
            self.onnxruntime,
            shared_threads=self.shared_threads,
            piece_tokens=self.piece_tokens,
            shows_attention=True,
        )
        try:
            yield copy
        finally:
            copy.close()

    def new_binding(self) -> "GraphBinding":
        """A binding of inputs and outputs that ends with this graph; raises ClosedError if the graph is closed."""
        notice_fork()
        lock = native_lock()  # before a lock is held, because daemon threads wait here once Python ends
        with self._lock:
            binding = GraphBinding(self._open_session().io_binding(), lock)
            self._bindings.add(binding)
        return binding

    def run(self, binding: Binding) -> None:
        """Compute what `binding` binds; the GIL is released meanwhile.

        Raises:
            ClosedError: the graph is closed.
            ForkError: the binding was made before this process was forked.
            InsufficientMemoryError: there is no memory for the activations.
            BundleError: the graph fails.
        """
        assert isinstance(binding, GraphBinding)
        notice_fork()
        ort_session = self._open_session()
        with binding.lock:
            io_binding = binding.io_binding
            if next(self._runs) == LONG_USE_RUNS and self.device.kind == "cpu":
                self._memory.move_into_huge_pages()
            try:
                ort_session.run_with_iobinding(io_binding)
            except Exception as error:  # the exceptions of ONNX Runtime have no base class but Exception
                pass_interrupts_on(error)
                if is_lack_of_memory(error):
                    raise InsufficientMemoryError(
                        "there is no memory left to compute on: give shorter prompts, generate fewer texts at a time, "
                        "or raise the limit"
                    ) from None
                where = str(self.bundle.path)
                raise BundleError(f"the graph of {where!r} cannot compute: {first_line(error)}") from error

    def close(self) -> None:
        """Free the graph once the calls of other threads, a token or a chunk each, are finished.

        Later uses raise ClosedError. Closing twice is allowed.
        """
        notice_fork()
        with self._lock:
            self._closed = True
            bindings = list(self._bindings)
        for binding in bindings:
            with binding.lock:
                binding.end("closed")
        self._ort_session = None

    def after_fork(self) -> None:
        """In a forked child: never touch again what waits for threads that stayed behind."""
        for binding in list(self._bindings):
            binding.end("forked")
        self._bindings = weakref.WeakSet()
        self._lock = native_lock()
        if self._ort_session is not None:
            self._ort_session.keep_forever()
            self._ort_session = None
            self._runs = itertools.count(1)

    def _load(self) -> Handle:
        """An ``onnxruntime.InferenceSession`` of the graph."""
        bundle, manifest = self.bundle, self.bundle.manifest
        names = manifest.graph
        stamps = bundle.stamps()
        path, content = bundle.path / names.file, None
        if self.shows_attention or bundle.packed is not None:
            content = bundle.graph_content()
        if content is not None and self.shows_attention:
            content = with_attention_outputs(content, manifest.architecture, names)
        if content is not None and bundle.packed is not None:
            weights = bundle.extent(names.weights_file)
            path = weights.path.resolve()
            content = with_weights_at(content, path.name, weights.offset)
        try:
            with self._memory.recorded():
                ort_session = open_inference_session(
                    path,
                    self.device,
                    self.threads,
                    self.onnxruntime,
                    shared_threads=self.shared_threads,
                    content=content,
                )
        except EdgelmError:
            raise
        except Exception as error:  # the exceptions of ONNX Runtime have no base class but Exception
            pass_interrupts_on(error)
            if is_lack_of_memory(error):
                raise InsufficientMemoryError(
                    f"there is no memory left to load {str(bundle.path)!r}: free some, raise the limit, or use a "
                    "bundle of fewer bits"
                ) from None
            raise BundleError(
                f"ONNX Runtime cannot load {names.file!r} of {str(bundle.path)!r}: {first_line(error)}"
            ) from error
        bundle.require_unchanged(stamps)
        self._stamps = stamps
        return Handle(ort_session)

    def _open_session(self) -> Any:
        """The ``onnxruntime.InferenceSession``, made again where a forked child needs one."""
        with self._lock:
            if self._closed:
                raise ClosedError(_MESSAGES["closed"])
            if self._ort_session is None:  # in a forked child
                self.bundle.require_unchanged(self._stamps)
                self._ort_session = self._load()
            return self._ort_session.value


class GraphBinding:
    """An ``onnxruntime.IOBinding`` that ends with its graph, and the native `lock` to hold while it is run or ended."""

    def __init__(self, io_binding: Any, lock: RLock) -> None:
        self.lock = lock
        self._io_binding = io_binding
        self._state: GraphState = "open"

    @property
    def io_binding(self) -> Any:
        """The ``onnxruntime.IOBinding``; raises ClosedError or ForkError if the binding has ended."""
        io_binding = self._io_binding  # read first, because another thread may end the binding meanwhile
        if self._state == "closed":
            raise ClosedError(_MESSAGES["closed"])
        if self._state == "forked":
            raise ForkError(_MESSAGES["forked"])
        return io_binding

    def end(self, state: Literal["closed", "forked"]) -> None:
        """Let go of the ``IOBinding``. Later uses raise the error of `state`."""
        self._state = state
        if state == "forked":
            self.lock = native_lock()  # a thread that stayed behind may hold the old one
        self._io_binding = None
