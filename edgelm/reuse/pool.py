"""Sessions lent to one generation each, until the graph is closed; what they remember of prompts is used again."""

import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from edgelm.engine.call import KeysValues
from edgelm.engine.session import Session
from edgelm.errors import ClosedError
from edgelm.ids import LEAST_TOKENS, shared_tokens
from edgelm.reuse.state import PromptState, most_shared


@dataclass
class _Idle:
    """A session that nobody uses, and the prompt whose tokens it begins with."""

    session: Session
    prompt: tuple[int, ...] = ()


class SessionPool:
    """Lends each generation a session that holds as much of its prompt as is there. Threads may share it.

    Only tokens of prompts are kept for others: those that came one at a time differ in the last bits from what a
    prompt makes of the same tokens, and results must not depend on what was computed before. A forked child keeps the
    states and makes sessions of its own. All sessions begin behind the prefix of the first.
    """

    def __init__(self, first: Session, limit_bytes: int = 0, always: PromptState | None = None) -> None:
        """Args: a session of the graph; how much memory idle sessions may hold, one of which is kept in any case; a
        state that is never forgotten."""
        self._first = first
        self._always = [] if always is None else [always]
        self.limit_bytes = limit_bytes
        """How much memory idle sessions may hold."""
        self.closed = False
        """Whether `close` was called."""
        self._lock = threading.RLock()  # a signal handler may close the model while its own thread holds it
        self._idle: list[_Idle] = []  # the one used last at the end
        self._states: list[PromptState] = []
        _pools.add(self)

    @property
    def idle_bytes(self) -> int:
        """Memory of idle sessions' caches."""
        with self._lock:
            return self._bytes(self._idle)

    @property
    def states(self) -> list[PromptState]:
        """What was added and not forgotten, and what never is."""
        with self._lock:
            return [*self._always, *self._states]

    def add(self, state: PromptState) -> None:
        """Keep a state for every prompt that begins like it; one that it goes on from is dropped.

        Raises:
            ClosedError: the pool is closed.
        """
        self.check_open()
        with self._lock:
            others = [old for old in self._states if old.ids != state.ids[: len(old.ids)]]
            self._states = [*others, state]

    def forget(self) -> None:
        """Forget prompts and states."""
        with self._lock:
            self._states = []
            for idle in self._idle:
                idle.prompt = ()
            del self._idle[1:]

    def close(self) -> None:
        """Close the graph, once the calls that other threads are computing are done; forget everything."""
        self.closed = True
        self._idle, self._states = [], []
        self._first.close()

    def check_open(self) -> None:
        """Raises ClosedError where `close` was called."""
        if self.closed:
            raise ClosedError("the model is closed: load it again")

    @contextmanager
    def borrowed(self, prompt: Sequence[int] = (), *, keep: bool = True) -> Iterator[tuple[Session, int]]:
        """A session that holds the first n tokens of `prompt` and nothing else, and n.

        Whoever gives tokens gives the rest of them first, two or more at a time.

        Args:
            keep: whether the session will still begin with `prompt` when it comes back.

        Raises:
            ClosedError: the pool is closed.
            InsufficientMemoryError: there is no room for another cache.
        """
        self.check_open()
        process = os.getpid()
        found, content, reused = self._take(prompt)
        idle = found or _Idle(self._first.sibling())
        session = idle.session
        if content is not None:
            session.restore(content)
        else:
            session.rewind(max(0, session.position - reused))
        try:
            yield session, reused
        finally:
            if os.getpid() == process:  # else it is from before a fork
                self._take_back(idle, prompt if keep else ())

    def _take(self, prompt: Sequence[int]) -> tuple[_Idle | None, KeysValues | None, int]:
        """An idle session, None for a new one; what it has to be given first; how much of the prompt it holds then."""
        with self._lock:
            kept = self._idle  # `close` leaves this list alone
            best = max(kept, key=lambda idle: shared_tokens(idle.prompt, prompt), default=None)
            reused = 0 if best is None else shared_tokens(best.prompt, prompt)
            content, stored = most_shared([*self._always, *self._states], prompt)
            if stored <= reused and best is not None and reused:
                kept.remove(best)
                return best, None, reused
            # One that remembers nothing, or a new one where there is room for both, or the one used least lately.
            empty = next((idle for idle in kept if not idle.prompt), None)
            if empty is not None:
                kept.remove(empty)
                return empty, content, stored
            if kept and self._bytes(kept) + len(prompt) * self._first.bytes_per_token > self.limit_bytes:
                return kept.pop(0), content, stored
            return None, content, stored

    def _take_back(self, idle: _Idle, prompt: Sequence[int]) -> None:
        session, held = idle.session, idle.session.position
        if session.prefix is not self._first.prefix:
            session.begin_after(self._first.prefix)
            held = 0
        idle.prompt = tuple(prompt[:held]) if len(prompt) >= LEAST_TOKENS else ()
        with self._lock:
            kept = self._idle
            kept.append(idle)
            while len(kept) > 1 and self._bytes(kept) > self.limit_bytes:
                kept.remove(next((other for other in kept if not other.prompt), kept[0]))
        if self.closed:
            self._idle = []

    def _bytes(self, kept: list[_Idle]) -> int:
        return sum(idle.session.most_tokens for idle in kept) * self._first.bytes_per_token

    def _after_fork(self) -> None:
        """In the child: the sessions' threads stayed behind, and another thread may have held the lock."""
        self._lock = threading.RLock()
        self._idle = []


_pools: weakref.WeakSet[SessionPool] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for pool in list(_pools):
        pool._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
