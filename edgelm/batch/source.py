"""The input of a run: a file of lines, and what tells whether it is still the same."""

import hashlib
import os
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from edgelm.batch.lines import MAX_LINE_BYTES, next_line
from edgelm.bundle.small_files import SmallFileError, open_regular_file
from edgelm.errors import PromptError, pass_interrupts_on

_PIECE_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Source:
    """A file of lines, read once to the end."""

    path: Path
    sha256: str
    lines: int
    size_bytes: int
    changed_ns: int
    """When it was changed last, in nanoseconds."""

    @classmethod
    def read(cls, path: Path) -> "Source":
        """Read the file `path`. Raises PromptError if it is no regular file, or cannot be read."""
        digest, lines, last = hashlib.sha256(), 0, b"\n"
        with _opened(path) as stream:
            info = os.fstat(stream.fileno())
            while piece := stream.read(_PIECE_BYTES):
                digest.update(piece)
                lines += piece.count(b"\n")
                last = piece[-1:]
        return cls(path, digest.hexdigest(), lines + (last != b"\n"), info.st_size, info.st_mtime_ns)

    def rows(self, done: Container[int]) -> Iterator[tuple[int, bytes]]:
        """The number, from 1, and the bytes of each line that is not `done`. Raises PromptError if the file changed."""
        with _opened(self.path) as stream:
            self._check(stream)
            number = 0
            while (line := next_line(stream, MAX_LINE_BYTES)) is not None:
                number += 1
                if number not in done:
                    yield number, line
            self._check(stream)

    def _check(self, stream: IO[bytes]) -> None:
        info = os.fstat(stream.fileno())
        if (info.st_size, info.st_mtime_ns) != (self.size_bytes, self.changed_ns):
            raise PromptError(
                f"{str(self.path)!r} was changed while it was read: begin again, with another output file"
            )


class _opened:
    """The file `path`, open for reading; PromptError in place of OSError."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, open_regular_file(path)

    def __enter__(self) -> IO[bytes]:
        try:
            return self._file.__enter__()
        except SmallFileError as error:
            reason = f"{str(self._path)!r} {error}: a run goes on where it stopped, so save its input in a file"
            raise PromptError(reason) from None
        except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
            pass_interrupts_on(error)
            words = (isinstance(error, OSError) and error.strerror) or error
            raise PromptError(f"cannot read {str(self._path)!r}: {words}") from None

    def __exit__(self, *exception: object) -> None:
        self._file.__exit__(None, None, None)
