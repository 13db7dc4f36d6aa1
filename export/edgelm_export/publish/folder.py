"""A bundle is built in a draft folder beside its place, and sealed when it is whole.

The command line imports this file before it loads torch, so nothing heavy is imported here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from edgelm.bundle.folder import file_fact
from edgelm.bundle.manifest import MANIFEST_NAME, Manifest
from edgelm.bundle.whole_folder import workplace
from edgelm.errors import ExportError


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
    ready = False
    try:
        with workplace(near, output.name) as folders:
            ready = True
            yield folders
    except OSError as error:
        what = "the bundle" if ready else f"into {str(near)!r}"
        raise ExportError(f"cannot write {what}: {error.strerror or error}") from None


def seal(draft: Path, manifest: Manifest) -> Manifest:
    """Write ``bundle.json`` for the files in `draft`; returns the manifest that lists them.

    Files that `manifest` lists already must not have changed, because only the other files are hashed.
    """
    present = [path for path in sorted(draft.iterdir()) if path.name != MANIFEST_NAME]
    files = {path.name: manifest.files.get(path.name) or file_fact(path) for path in present}
    sealed = replace(manifest, files=files).sealed()
    (draft / MANIFEST_NAME).write_text(sealed.to_json(), encoding="utf-8", newline="\n")
    return sealed


def folder_bytes(folder: Path) -> int:
    """The size of all files of a draft."""
    return sum(path.stat().st_size for path in folder.iterdir())
