"""Sessions between generations: what they remember of prompts is not computed again."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from edgelm.graph_call import KeysValues
from edgelm.prefix import LEAST_TOKENS, shared_tokens
from edgelm.prompt_state import PromptState, most_shared
from edgelm.session import Session


@dataclass
class _Idle:
    """A session that nobody uses, the prompt whose tokens it begins with, and how many tokens it ever held."""

    session: Session
    prompt: tuple[int, ...] = ()
    most_tokens: int = 0


class SessionPool:
    """Lends each generation a session that holds as much of its prompt as is there. Threads may share it.

    Only tokens of prompts are kept for others: those that came one at a time differ in the last bits from what a
    prompt makes of the same tokens, and results must not depend on what was computed before.
    """

    def __init__(self, session: Session, limit_bytes: int = 0) -> None:
        """Args: a session of the graph; how much memory idle sessions may hold. One is kept in any case."""
        self._session = session
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._idle: list[_Idle] = []  # the one used last at the end
        self._states: list[PromptState] = []

    @property
    def idle_bytes(self) -> int:
        """Memory of idle sessions' caches."""
        with self._lock:
            return self._bytes()

    @property
    def states(self) -> list[PromptState]:
        """What was added and not forgotten."""
        with self._lock:
            return list(self._states)

    def add(self, state: PromptState) -> None:
        """Keep a state for every prompt that begins like it; one that it goes on from is dropped."""
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

    @contextmanager
    def borrowed(self, prompt: Sequence[int] = ()) -> Iterator[tuple[Session, int]]:
        """A session that holds the first n tokens of `prompt` and nothing else, and n.

        Whoever gives tokens gives the rest of them first, two or more at a time.
        """
        idle, content, reused = self._take(prompt)
        session = idle.session
        if content is not None:
            session.restore(content)
        else:
            session.rewind(max(0, session.position - reused))
        try:
            yield session, reused
        finally:
            idle.most_tokens = max(idle.most_tokens, session.position)
            kept = prompt[: session.position] if len(prompt) >= LEAST_TOKENS else ()
            idle.prompt = tuple(kept)
            with self._lock:
                self._idle.append(idle)
                self._shrink(self._limit_bytes)

    def _take(self, prompt: Sequence[int]) -> tuple[_Idle, KeysValues | None, int]:
        with self._lock:
            best = max(self._idle, key=lambda idle: shared_tokens(idle.prompt, prompt), default=None)
            reused = 0 if best is None else shared_tokens(best.prompt, prompt)
            content, stored = most_shared(self._states, prompt)
            if stored > reused:
                return self._unneeded(len(prompt)), content, stored
            if best is not None and reused:
                self._idle.remove(best)
                return best, None, reused
            return self._unneeded(len(prompt)), None, 0

    def _unneeded(self, tokens: int) -> _Idle:
        """The idle session used least lately, or a new one where there is room for both."""
        if self._idle and self._bytes() + tokens * self._session.bytes_per_token > self._limit_bytes:
            return self._idle.pop(0)
        return _Idle(self._session.sibling())

    def _shrink(self, limit_bytes: int) -> None:
        while len(self._idle) > 1 and self._bytes() > limit_bytes:
            del self._idle[0]

    def _bytes(self) -> int:
        return sum(idle.most_tokens for idle in self._idle) * self._session.bytes_per_token
