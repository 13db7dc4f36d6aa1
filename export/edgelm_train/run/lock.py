"""One run at a time in an output folder: a lock of the operating system, which ends with the process that holds it.

This file loads without torch, because a second start is told at once.
"""

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgelm.errors import TrainingError

LOCK_FILE = "run.lock"
_LOCKED_BYTE = 2**30  # far behind the content, because Windows lets nobody read a locked byte
_held = threading.local()
_logger = logging.getLogger(__name__)


@contextmanager
def locked(out: Path, command: str) -> Iterator[None]:
    """Hold the lock of the output folder `out`, which is created; a folder that stays empty is removed again.

    Inside a block of the same thread that holds the same folder, this does nothing more. So a command can hold the
    folder before it loads the function that holds it too.

    Args:
        out: output folder of a run.
        command: what the process does, for the message of another process: "edgelm finetune".

    Raises:
        TrainingError: another run holds the lock, or `out` cannot be written.
    """
    place = os.path.realpath(out)
    folders: set[str] = _held.__dict__.setdefault("folders", set())
    if place in folders:
        yield
        return
    new = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = _acquire(out)
        os.ftruncate(handle, 0)
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "command": command, "since": time.time()}
        os.write(handle, json.dumps(holder).encode())
    except OSError as error:
        raise TrainingError(f"cannot write into {out}: {error.strerror or error}; give another --out") from None
    folders.add(place)
    try:
        yield
    finally:
        folders.discard(place)
        _release(handle, out / LOCK_FILE)
        with suppress(OSError):  # it is not empty, or somebody else uses it by now
            for folder in new:
                folder.rmdir()


def is_empty(out: Path) -> bool:
    """Whether nothing is in a folder but the lock of a run, which may have been killed before it wrote anything."""
    return all(path.name == LOCK_FILE for path in out.iterdir())


def _acquire(out: Path) -> int:
    """A descriptor of the lock file of `out`, locked."""
    path = out / LOCK_FILE
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        try:
            if not _try_lock(handle):
                raise TrainingError(
                    f"another run is at work in {out}: {_holder(handle)}; wait for it, stop it, or give another --out"
                )
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # the holder removed the file between our two steps


def _release(handle: int, path: Path) -> None:
    """Remove the file and give up the lock. On Windows only a closed file can be removed."""
    if sys.platform == "win32":
        os.close(handle)
        with suppress(OSError):  # another process has it by now
            path.unlink()
    else:
        with suppress(OSError):
            path.unlink()
        os.close(handle)


def _try_lock(handle: int) -> bool:
    """Lock an open file; False where another process, or another block of this one, has locked it."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(handle, 0, os.SEEK_SET)
    else:
        import fcntl

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:  # some network file systems have no locks
            _logger.warning("two runs in one folder are not noticed here: %s", error.strerror)
    return True


def _holder(handle: int) -> str:
    """Who holds the lock, in words."""
    try:
        holder = json.loads(os.pread(handle, 4096, 0) if hasattr(os, "pread") else os.read(handle, 4096))
        process = f"process {int(holder['pid'])}"
        if holder["host"] != socket.gethostname():
            process += f" on {holder['host']}"
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(holder["since"]))
        return f"{process} ({holder['command']}, since {since})"
    except (OSError, ValueError, KeyError, TypeError):  # it has not written its name yet
        return "a process that has just begun"
