"""A bundle becomes one file, and such a file a folder again."""

import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from edgelm.bundle.folder import Bundle
from edgelm.bundle.manifest import MANIFEST_NAME
from edgelm.bundle.packed import members_of
from edgelm.bundle.small_files import status_of
from edgelm.bundle.stored_zip import Member, directory
from edgelm.bundle.whole_file import whole_file
from edgelm.bundle.whole_folder import new_folder
from edgelm.errors import BundleError, pass_interrupts_on


def pack(bundle: Bundle, target: str | os.PathLike[str]) -> None:
    """Write `bundle` as the one file `target`; the same bundle makes the same bytes.

    Every file is hashed while it is copied. An existing file is replaced in one step, or stays unchanged. Raises
    BundleError if the bundle differs from its manifest, or if the file cannot be written.
    """
    with named_errors(target), whole_file(Path(target)) as stream:
        manifest = bundle.manifest_bytes()
        files = (bundle.blocks(name) for name in bundle.manifest.files)
        write_archive(stream, members_of(bundle.manifest, len(manifest)), [[manifest], *files])


def unpack(bundle: Bundle, target: str | os.PathLike[str]) -> None:
    """Write the files of `bundle` into the new folder `target`.

    Every file is hashed while it is copied, and the folder appears when it is whole. Raises BundleError if something
    stands at `target` already, if the bundle differs from its manifest, or if the folder cannot be written.
    """
    if status_of(target) is not None:
        raise BundleError(f"there is something at {os.fspath(target)!r} already: choose another folder, or remove it")
    with named_errors(target), new_folder(Path(target)) as draft:
        (draft / MANIFEST_NAME).write_bytes(bundle.manifest_bytes())
        for name in bundle.manifest.files:
            with (draft / name).open("xb") as stream:
                for block in bundle.blocks(name):
                    stream.write(block)


def write_archive(stream: IO[bytes], members: Sequence[Member], contents: Iterable[Iterable[bytes]]) -> None:
    """Write an archive of `members`, whose `contents` come in blocks, into an empty file."""
    crc32s = []
    for member, blocks in zip(members, contents, strict=True):
        stream.seek(member.offset)
        crc32 = 0
        for block in blocks:
            crc32 = zlib.crc32(block, crc32)
            stream.write(block)
        crc32s.append(crc32)
        stream.seek(member.header_offset)
        stream.write(member.header(crc32))
    stream.seek(members[-1].end)
    stream.write(directory(members, crc32s))


@contextmanager
def named_errors(target: str | os.PathLike[str]) -> Iterator[None]:
    """Turn the errors of writing `target` into a BundleError that names it."""
    try:
        yield
    except OSError as error:  # it may name a temporary file
        pass_interrupts_on(error)
        raise BundleError(f"cannot write {os.fspath(target)!r}: {error.strerror or error}") from None
    except ValueError as error:
        pass_interrupts_on(error)
        raise BundleError(f"cannot write {os.fspath(target)!r}: {error}") from None
