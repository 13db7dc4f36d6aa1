"""Sessions lent to one generation each. What they remember of prompts is used again."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from edgelm.engine.fork import notice_fork, watch_forks
from edgelm.engine.graph import Graph
from edgelm.engine.session import Session
from edgelm.errors import ClosedError, ConfigError, shown
from edgelm.ids import LEAST_TOKENS, KeysValues, shared_tokens
from edgelm.reuse.state import PromptState, most_shared


@dataclass
class _Idle:
    """A session that nobody uses, and the prompt whose tokens it begins with."""

    session: Session
    prompt: tuple[int, ...] = ()
    key: str = ""
    """Whose prompt it is."""


class SessionPool:
    """Lends each generation a session that already holds as much of its prompt as possible. Threads may share a pool.

    Only tokens of prompts are kept. A token that was computed alone differs in the last bits from the same token inside
    a prompt, and results must not depend on earlier calls. A forked child keeps the states and makes new sessions.

    Args:
        graph: the loaded graph.
        prefix: keys and values that stand before every text of every session.
        limit_bytes: memory that idle sessions may take. One idle session is kept even if it takes more.
        permanent: a state that `forget` does not forget.
        owns_graph: whether `close` closes the graph too.
    """

    def __init__(
        self,
        graph: Graph,
        prefix: KeysValues | None = None,
        *,
        limit_bytes: int = 0,
        permanent: PromptState | None = None,
        owns_graph: bool = True,
    ) -> None:
        self._graph, self._prefix, self.limit_bytes, self._owns_graph = graph, prefix, limit_bytes, owns_graph
        self._permanent = [] if permanent is None else [permanent]
        self.closed = False
        """Whether `close` was called."""
        self._lock = threading.RLock()  # a signal handler may close the model while its own thread holds the lock
        self._idle: list[_Idle] = []  # the session used last stands at the end
        self._states: list[PromptState] = []
        self._states_of = self  # a sibling begins from the states of the pool that made it
        self._forks = 0  # how many forks lie between this process and the one that made the pool
        watch_forks(self)

    @property
    def idle_bytes(self) -> int:
        """Memory that the caches of idle sessions take."""
        notice_fork()
        with self._lock:
            return self._bytes(self._idle)

    @property
    def states(self) -> list[PromptState]:
        """The permanent state, and the states that were added and not forgotten."""
        notice_fork()
        with self._states_of._lock:
            return [*self._states_of._permanent, *self._states_of._states]

    def sibling(self, limit_bytes: int) -> "SessionPool":
        """A pool of the same graph, prefix and states, whose idle sessions are its own."""
        pool = SessionPool(self._graph, self._prefix, limit_bytes=limit_bytes, owns_graph=False)
        pool._states_of = self._states_of
        return pool

    def add(self, state: PromptState) -> None:
        """Keep `state` for every prompt that begins with its tokens, and drop states that it extends.

        Raises ClosedError if the pool is closed.
        """
        self.check_open()
        notice_fork()
        with self._lock:
            kept = [old for old in self._states if old.ids != state.ids[: len(old.ids)]]
            self._states = [*kept, state]

    def forget(self) -> None:
        """Forget prompts and states."""
        notice_fork()
        with self._lock:
            self._states = []
            for idle in self._idle:
                idle.prompt = ()
            del self._idle[1:]

    def close(self) -> None:
        """Forget everything; a pool that owns its graph closes it once the calls of other threads are finished."""
        self.closed = True
        self._idle, self._states = [], []
        if self._owns_graph:
            self._graph.close()

    def check_open(self) -> None:
        """Raise ClosedError if `close` was called."""
        if self.closed:
            raise ClosedError("the model is closed: load it again")

    @contextmanager
    def borrowed(
        self, prompt: Sequence[int] = (), *, keep: bool = True, key: str = ""
    ) -> Iterator[tuple[Session, int]]:
        """Lend a session that holds exactly the first n tokens of `prompt`; yields the session and n.

        Feed the rest of the prompt first, at least two tokens per call. `keep` says that the session will still begin
        with `prompt` when it comes back. Prompts of one `key` are never continued for another one; states are.

        Raises:
            ClosedError: the pool is closed.
            BundleError: the bundle's files were written into.
            InsufficientMemoryError: there is no memory for another session.
        """
        self.check_open()
        notice_fork()
        self._graph.require_intact_files()
        forks = self._forks
        idle, content, reused = self._take(prompt, key)
        if idle is None:
            idle = _Idle(self._graph.session(self._prefix))
        session = idle.session
        if content is not None:
            session.restore(content)
        else:
            session.rewind(max(0, session.position - reused))
        try:
            yield session, reused
        finally:
            if self._forks == forks:  # a session from before a fork is of no use
                self._take_back(idle, prompt if keep else (), key)

    def _take(self, prompt: Sequence[int], key: str) -> tuple[_Idle | None, KeysValues | None, int]:
        """Choose a session for `prompt`: an idle one, or None for a new one.

        Also returns keys and values to restore in it first, if any, and how many tokens of the prompt it then holds.
        """
        states = self.states
        with self._lock:
            kept = self._idle  # `close` replaces this list and does not change it
            own = (idle for idle in kept if idle.key == key)
            best = max(own, key=lambda idle: shared_tokens(idle.prompt, prompt), default=None)
            reused = 0 if best is None else shared_tokens(best.prompt, prompt)
            content, stored = most_shared(states, prompt) if states else (None, 0)
            if stored <= reused and best is not None and reused:
                kept.remove(best)
                return best, None, reused
            # Prefer a session that remembers nothing, then a new one if both fit, then the least recently used one.
            empty = next((idle for idle in kept if not idle.prompt), None)
            if empty is not None:
                kept.remove(empty)
                return empty, content, stored
            if kept and self._bytes(kept) + len(prompt) * kept[0].session.bytes_per_token > self.limit_bytes:
                return kept.pop(0), content, stored
            return None, content, stored

    def _take_back(self, idle: _Idle, prompt: Sequence[int], key: str) -> None:
        session, held = idle.session, idle.session.position
        if session.prefix is not self._prefix:
            session.begin_after(self._prefix)
            held = 0
        idle.prompt, idle.key = tuple(prompt[:held]) if len(prompt) >= LEAST_TOKENS else (), key
        with self._lock:
            kept = self._idle
            kept.append(idle)
            while len(kept) > 1 and self._bytes(kept) > self.limit_bytes:
                kept.remove(next((other for other in kept if not other.prompt), kept[0]))
        if self.closed:
            self._idle = []

    def _bytes(self, kept: list[_Idle]) -> int:
        return sum(idle.session.high_water_tokens * idle.session.bytes_per_token for idle in kept)

    def after_fork(self) -> None:
        """In a forked child, make a new lock, which another thread may have held, and drop the parent's sessions."""
        self._forks += 1
        self._lock = threading.RLock()
        self._idle = []


def check_limit_bytes(name: str, limit: object) -> None:
    """Raise ConfigError if the argument `name` is no number of bytes."""
    if isinstance(limit, bool) or not (isinstance(limit, int) and limit >= 0):
        raise ConfigError(f"{name} must be a whole number from 0, got {shown(limit)}")
