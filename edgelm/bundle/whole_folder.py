"""A folder is made beside its place and renamed into it when it is whole.

A killed writer leaves its folder behind. Such a folder has a lock file, whose lock ends with its process, so that the
next writer beside it knows on which of them nobody works.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgelm.bundle.small_files import is_folder
from edgelm.bundle.whole_file import lock as lock_file
from edgelm.errors import pass_interrupts_on

_LOCK = "edgelm-draft.lock"
_CONTENT = {_LOCK, "draft", "scratch"}


@contextmanager
def workplace(near: Path, name: str) -> Iterator[tuple[Path, Path]]:
    """Yield two new folders inside the folder `near`, "draft" and "scratch", which are removed at the end.

    `name` is part of the name of the folder around them. Raises OSError if they cannot be made.
    """
    _remove_abandoned(near)
    folder = Path(tempfile.mkdtemp(prefix=f".{name[:100]}.", dir=near))
    try:
        with (folder / _LOCK).open("wb") as lock:
            lock_file(lock)
            draft, scratch = folder / "draft", folder / "scratch"
            draft.mkdir()
            scratch.mkdir()
            yield draft, scratch
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a folder that becomes `target` at the end, unless an error is raised.

    Raises:
        FileExistsError: `target` is something else than an empty folder.
        OSError: the folder cannot be made.
    """
    target = target.absolute()
    near = next(folder for folder in target.parents if is_folder(folder))
    with workplace(near, target.name) as (draft, _):
        yield draft
        move_into_place(draft, target)


def move_into_place(folder: Path, target: Path) -> None:
    """Rename `folder` to `target`, where an empty folder may stand; raises OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_folder(target):
        target.rmdir()  # only an empty one; Windows does not rename onto a folder
    folder.rename(target)


def _remove_abandoned(near: Path) -> None:
    """Remove the folders in `near` whose writers were killed."""
    for mark in near.glob(f".*/{_LOCK}"):
        folder = mark.parent
        try:
            if folder.is_symlink() or not {path.name for path in folder.iterdir()} <= _CONTENT:
                continue
            with mark.open("r+b") as lock:
                lock_file(lock)
            shutil.rmtree(folder)
        except OSError as error:  # another process works on it, or removes it now, or it belongs to somebody else
            pass_interrupts_on(error)
