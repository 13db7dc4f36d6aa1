"""Sessions lent to one generation each: of one graph, until that is closed, and in a forked child too."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from edgelm.errors import ClosedError, InsufficientMemoryError
from edgelm.session import Session


class SessionPool:
    """Lends empty siblings of a session; several threads may borrow at the same time."""

    def __init__(self, first: Session) -> None:
        self._first = first
        self._idle: list[tuple[int, Session]] = []  # with its process; its cache has its pages already
        self.closed = False
        """Whether `close` was called."""

    @contextmanager
    def borrowed(self) -> Iterator[Session]:
        """An empty session for one generation; at most one is kept for the next.

        Raises:
            ClosedError: the pool is closed.
            InsufficientMemoryError: there is no room for another cache.
        """
        self.check_open()
        process = os.getpid()
        try:
            owner, session = self._idle.pop()  # atomic: two threads never get the same one
        except IndexError:
            owner, session = 0, self._first
        if owner == process:
            session.reset()
        else:  # there is none, or it is from before a fork
            session = self._sibling()
        try:
            yield session
        finally:
            if not self._idle and not self.closed:
                self._idle.append((process, session))

    def _sibling(self) -> Session:
        try:
            return self._first.sibling()
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            raise InsufficientMemoryError(
                "there is no memory left for the keys and values of another text: generate fewer at a time, or raise "
                "the limit"
            ) from None

    def close(self) -> None:
        """Close the graph, once the calls that other threads are computing are done."""
        self.closed = True
        self._idle.clear()
        self._first.close()

    def check_open(self) -> None:
        """Raises ClosedError where `close` was called."""
        if self.closed:
            raise ClosedError("the model is closed: load it again")
