"""A bundle is built in a draft folder beside its place, sealed, and renamed into its place when it is whole.

A killed export leaves its draft behind. A draft has a lock file, whose lock ends with its process, so that the next
export beside it knows which drafts nobody works on.

The command line imports this file before it loads torch, so nothing heavy is imported here.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from edgelm.bundle.folder import file_fact
from edgelm.bundle.manifest import MANIFEST_NAME, Manifest
from edgelm.bundle.whole_file import lock as lock_file
from edgelm.errors import ExportError

_LOCK = "edgelm-export.lock"


def check_output(output: Path) -> None:
    """Refuse a place that is taken.

    Raises:
        ExportError: `output` is a file, or a folder that is not empty.
    """
    if output.is_dir() and any(output.iterdir()):
        raise ExportError(f"the output folder {str(output)!r} is not empty; choose another or remove it first")
    if output.exists() and not output.is_dir():
        raise ExportError(f"the output {str(output)!r} is a file; give a folder that does not exist yet")


@contextmanager
def workshop(output: Path) -> Iterator[tuple[Path, Path]]:
    """Yield two temporary folders on the file system of `output`: the draft to publish, and scratch to throw away.

    Raises:
        ExportError: the place is taken or not writable, or writing fails. Nothing is left behind.
    """
    check_output(output)
    near = next(folder for folder in output.parents if folder.is_dir())
    try:
        _remove_abandoned(near)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name[:100]}.", dir=near))
        lock = (folder / _LOCK).open("wb")
        lock_file(lock)
    except OSError as error:
        raise ExportError(f"cannot write into {str(near)!r}: {error.strerror}") from None
    try:
        draft, scratch = folder / "draft", folder / "scratch"
        draft.mkdir()
        scratch.mkdir()
        yield draft, scratch
    except OSError as error:
        raise ExportError(f"cannot write the bundle: {error.strerror or error}") from None
    finally:
        lock.close()
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(near: Path) -> None:
    """Remove the drafts in the folder `near` whose exports were killed."""
    for mark in near.glob(f".*/{_LOCK}"):
        folder = mark.parent
        with suppress(OSError):  # another export works on it, or removes it now, or it belongs to somebody else
            if folder.is_symlink() or not {path.name for path in folder.iterdir()} <= {_LOCK, "draft", "scratch"}:
                continue
            with mark.open("r+b") as lock:
                lock_file(lock)
            shutil.rmtree(folder)


def seal(draft: Path, manifest: Manifest) -> Manifest:
    """Write ``bundle.json`` for the files in `draft`; returns the manifest that lists them.

    Files that `manifest` lists already must not have changed, because only the other files are hashed.
    """
    present = [path for path in sorted(draft.iterdir()) if path.name != MANIFEST_NAME]
    files = {path.name: manifest.files.get(path.name) or file_fact(path) for path in present}
    sealed = replace(manifest, files=files).sealed()
    (draft / MANIFEST_NAME).write_text(sealed.to_json(), encoding="utf-8")
    return sealed


def publish(draft: Path, output: Path) -> None:
    """Move a finished draft to its place."""
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.exists():
        output.rmdir()  # it is empty; Windows does not rename onto a folder
    draft.rename(output)


def folder_bytes(folder: Path) -> int:
    """The size of all files of a draft."""
    return sum(path.stat().st_size for path in folder.iterdir())
