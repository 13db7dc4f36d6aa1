"""Publishing: a bundle is built beside its place and renamed into it when whole. Imports nothing heavy."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgelm.errors import ExportError


def check_output(output: Path) -> None:
    """Refuse a place that is taken.

    Raises:
        ExportError: `output` is a file, or a folder with something in it.
    """
    if output.is_dir() and any(output.iterdir()):
        raise ExportError(f"the output folder {str(output)!r} is not empty; choose another or remove it first")
    if output.exists() and not output.is_dir():
        raise ExportError(f"the output {str(output)!r} is a file; give a folder that does not exist yet")


@contextmanager
def workshop(output: Path) -> Iterator[tuple[Path, Path]]:
    """A temporary folder near `output`, on its file system: one part to be published, one to be thrown away.

    Raises:
        ExportError: the place is taken or not writable, or writing fails; nothing is left behind.
    """
    check_output(output)
    near = next(folder for folder in output.parents if folder.is_dir())
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=near))
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
        shutil.rmtree(folder, ignore_errors=True)


def publish(draft: Path, output: Path) -> None:
    """Move a finished draft to its place."""
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.exists():
        output.rmdir()  # it is empty; Windows does not rename onto a folder
    draft.rename(output)


def folder_bytes(folder: Path) -> int:
    """The size of all files of a draft."""
    return sum(path.stat().st_size for path in folder.iterdir())
