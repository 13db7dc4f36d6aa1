"""A bundle in one file: a zip archive of stored members, ``bundle.json`` first and then the files in its order.

`edgelm.bundle.stored_zip` says why such a file is read by comparing it with what `edgelm.bundle.packing` would write.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from edgelm.bundle.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, read_manifest
from edgelm.bundle.small_files import open_regular_file
from edgelm.bundle.stored_zip import Member, directory, directory_bytes, layout, stated_crc32s
from edgelm.errors import BundleError

PACKED_SUFFIX = ".edgelm"
"""Of the names that `edgelm pack` gives. A packed file may have any name."""

_SIGNATURE = b"PK\x03\x04"
_PACK_AGAIN = "make it again with `edgelm pack`"
_START = struct.Struct("<4s18xL")
"""The first bytes of a packed file: the signature of a member's header, and the size of ``bundle.json``."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed file whose headers have been checked."""

    manifest_bytes: bytes
    members: dict[str, Member]
    """All members by name, ``bundle.json`` among them."""


def read_packed(path: Path) -> tuple[Packed, Manifest]:
    """Read the manifest in the packed file `path`, and check that the file holds nothing but what the manifest lists.

    The contents of the other members are not read. Raises BundleError if the file is no packed bundle, is truncated, or
    differs from what `edgelm pack` writes; OSError if it cannot be read.
    """
    with open_regular_file(path) as stream:
        manifest_bytes = _manifest_bytes(stream)
        manifest = read_manifest(manifest_bytes)
        members = members_of(manifest, len(manifest_bytes))
        length = members[-1].end + directory_bytes(members)
        size = os.fstat(stream.fileno()).st_size
        if size != length:
            words = "it is truncated or altered; pack or download it again"
            raise BundleError(f"it has {size:,} bytes instead of {length:,}: {words}")
        tail = _read_at(stream, members[-1].end, length - members[-1].end)
        crc32s = stated_crc32s(members, tail)
        if directory(members, crc32s) != tail:
            raise BundleError(f"its zip directory is not what bundle.json says: it was altered; {_PACK_AGAIN}")
        for member, crc32 in zip(members, crc32s, strict=True):
            header = _read_at(stream, member.header_offset, member.offset - member.header_offset)
            if header != member.header(crc32):
                raise BundleError(f"the zip header of {member.name!r} was altered; {_PACK_AGAIN}")
    return Packed(manifest_bytes, {member.name: member for member in members}), manifest


def members_of(manifest: Manifest, manifest_bytes: int) -> list[Member]:
    """The members of the packed file of a bundle whose ``bundle.json`` has `manifest_bytes`."""
    files = ((name, fact.size_bytes) for name, fact in manifest.files.items())
    return layout([(MANIFEST_NAME, manifest_bytes), *files])


def _manifest_bytes(stream: IO[bytes]) -> bytes:
    start = stream.read(_START.size)
    if len(start) < _START.size or not start.startswith(_SIGNATURE):
        raise BundleError("it is a file, but neither a bundle folder nor a bundle that `edgelm pack` wrote")
    size_bytes = _START.unpack(start)[1]
    if size_bytes > MAX_MANIFEST_BYTES:
        raise BundleError(f"its first member has {size_bytes:,} bytes, more than {MAX_MANIFEST_BYTES:,}")
    member = layout([(MANIFEST_NAME, size_bytes)])[0]
    header = _read_at(stream, 0, member.offset)
    crc32 = struct.unpack_from("<L", header, 14)[0]
    if header != member.header(crc32):
        raise BundleError(f"it is a zip archive, but not one that `edgelm pack` wrote: unpack it, or {_PACK_AGAIN}")
    return _read_at(stream, member.offset, size_bytes)


def _read_at(stream: IO[bytes], offset: int, count: int) -> bytes:
    stream.seek(offset)
    content = stream.read(count)
    if len(content) != count:
        raise BundleError("it is truncated; pack or download it again")
    return content
