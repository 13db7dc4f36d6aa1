"""Small files are read whole, but only if they are regular files of at most a stated size."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from edgelm.errors import ConfigError, pass_interrupts_on, shown

MAX_TEXT_BYTES = 2**28
"""Of a file of text that a command reads whole."""


class SmallFileError(ValueError):
    """The file is no regular file, or too large. The message completes a sentence that begins with its name."""


def read_small_file(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """The content of the regular file `path`, or of the one that a symbolic link leads to.

    Its size is known before anything is read: a sparse file, a pipe that nobody writes and a device that never ends
    cost nothing.

    Raises:
        SmallFileError: it is no regular file, or has more than `max_bytes`.
        OSError: it cannot be read.
        ValueError: the path has a NUL character.
    """
    with _opened(path) as stream:
        info = os.fstat(stream.fileno())
        check_small_file(info, max_bytes)
        content = stream.read(info.st_size + 1)  # Python takes memory for as many bytes as are asked for
        if len(content) > info.st_size:  # it grew meanwhile, or the system does not tell the size (/proc)
            content += stream.read(max_bytes)
    if len(content) > max_bytes:
        raise SmallFileError(f"has more than {max_bytes:,} bytes")
    return content


@contextmanager
def open_regular_file(path: str | os.PathLike[str], max_bytes: int = 2**62) -> Iterator[IO[bytes]]:
    """Yield the regular file `path`, open for reading. Raises as `read_small_file`."""
    with _opened(path) as stream:
        check_small_file(os.fstat(stream.fileno()), max_bytes)
        yield stream


def status_of(path: str | os.PathLike[str]) -> os.stat_result | None:
    """The status of what `path` leads to; None where nothing is there, or nothing that this process may see.

    `Path.exists` and its siblings take an exception of a signal handler that interrupts them for a "no".
    """
    try:
        return os.stat(path)  # noqa: PTH116 (a path may be a text)
    except (OSError, ValueError) as error:  # a NUL character is a ValueError
        pass_interrupts_on(error)
        return None


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether `path` leads to a folder."""
    status = status_of(path)
    return status is not None and stat.S_ISDIR(status.st_mode)


def check_path(name: str, value: object) -> None:
    """Raise ConfigError unless the option `name` is a path; a number, for one, would be taken for an open file."""
    if not isinstance(value, (str, os.PathLike)):
        raise ConfigError(f"{name} must be a path, got {shown(value)}")


def check_small_file(info: os.stat_result, max_bytes: int) -> None:
    """Raise SmallFileError unless `info` is of a regular file of at most `max_bytes`."""
    if not stat.S_ISREG(info.st_mode):
        raise SmallFileError(f"is {_kind(info.st_mode)}, not a regular file")
    if info.st_size > max_bytes:
        raise SmallFileError(f"has {info.st_size:,} bytes, more than {max_bytes:,}")


def _opened(path: str | os.PathLike[str]) -> IO[bytes]:
    # Without O_NONBLOCK, opening a pipe would wait for somebody who writes into it.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOCTTY", 0)
    return open(os.open(path, flags), "rb")  # noqa: PTH123 (a descriptor, not a path)


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a pipe" if stat.S_ISFIFO(mode) else "a device"
