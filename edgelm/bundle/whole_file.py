"""A file is written beside its place and renamed into it when it is whole.

A killed writer leaves its temporary file behind. The next writer into the same folder removes it, as soon as no process
works on it: on POSIX a lock tells, which ends with its process; on Windows the open file itself cannot be removed.
"""

import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from edgelm.bundle.small_files import status_of
from edgelm.errors import pass_interrupts_on

_TEMPORARY = re.compile(r"\.edgelm-[0-9a-f]{16}\.tmp")
_CLOSED_SECONDS = 60.0
"""Windows does not rename an open file, so it is closed shortly before; a younger file may be one of these."""


def write_whole_file(target: Path, content: bytes) -> None:
    """Write `content` to the file `target` in one step; an existing file is replaced, or stays unchanged.

    Raises:
        OSError: the file cannot be written. It may name the temporary file.
    """
    with whole_file(target) as stream:
        stream.write(content)


@contextmanager
def whole_file(target: Path) -> Iterator[IO[bytes]]:
    """Yield a new file that becomes `target` at the end, unless an error is raised. Raises as `write_whole_file`."""
    _remove_abandoned(target.parent)
    with _temporary_file(target.parent) as stream:
        yield stream
        stream.flush()
        if sys.platform == "win32":
            stream.close()
        Path(stream.name).replace(target)


def lock(file: IO[bytes]) -> None:
    """Lock an open file until it is closed, or its process ends; raises OSError where another process has the lock."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def _temporary_file(folder: Path) -> Iterator[IO[bytes]]:
    """Yield a new file in `folder` that no other writer removes; it is removed if it is still there at the end."""
    while True:
        # A file of the module tempfile could be read by its owner only, whatever the umask says.
        path = folder / f".edgelm-{secrets.token_hex(8)}.tmp"
        with path.open("xb") as stream:
            if not _is_ours(stream, path):
                continue
            try:
                yield stream
            finally:
                if sys.platform == "win32":
                    stream.close()
                path.unlink(missing_ok=True)
            return


def _is_ours(stream: IO[bytes], path: Path) -> bool:
    """Lock a new file, unless another writer found it before it was locked, and takes it for abandoned."""
    if sys.platform == "win32":
        return True
    try:
        lock(stream)
    except BlockingIOError:
        return False
    except OSError as error:  # a file system without locks, where nobody removes the files of others
        pass_interrupts_on(error)
    return status_of(path) is not None


def _remove_abandoned(folder: Path) -> None:
    """Remove the temporary files in `folder` whose writers were killed."""
    try:
        paths = [path for path in folder.iterdir() if _TEMPORARY.fullmatch(path.name)]
    except OSError as error:  # a folder into which one may write, but not look
        pass_interrupts_on(error)
        return
    for path in paths:
        try:
            _remove_if_abandoned(path)
        except OSError as error:  # another process works on it, or removes it now, or it belongs to somebody else
            pass_interrupts_on(error)


def _remove_if_abandoned(path: Path) -> None:
    """Remove a temporary file; raises OSError if its writer lives, or if it cannot be removed."""
    info = path.lstat()
    if not stat.S_ISREG(info.st_mode):
        return
    if sys.platform == "win32":
        if abs(time.time() - info.st_mtime) > _CLOSED_SECONDS:
            path.unlink()
        return
    # Neither a link nor a pipe that stands there meanwhile is followed or waited for.
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as stream:  # noqa: PTH123
        lock(stream)
        path.unlink()
