"""The zip archives that edgelm writes: members are stored as they are, so that they can be mapped where they lie.

The names and the sizes of the members decide every byte of such an archive except the members and their CRC-32. So the
same content makes the same file, and a reader compares: it computes all headers and accepts no other ones. What a lax
reader has to guard against (names that leave a folder, links, compressed bombs, members that overlap, a directory that
contradicts the headers, bytes that belong to nobody) differs from the computed headers in some byte.

The format is PKWARE's APPNOTE 6.3.10. Each member begins at a multiple of ALIGNMENT_BYTES. The space before it is in an
extra field of the kind 0xD935, which Android's zipalign introduced.
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

ALIGNMENT_BYTES = 4096
"""A page of the systems that edgelm runs on, or a part of one."""

_ALIGNMENT_EXTRA, _ZIP64_EXTRA = 0xD935, 1
_LOCAL, _CENTRAL, _END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_END64, _LOCATOR64 = b"PK\x06\x06", b"PK\x06\x07"
_LOCAL_BYTES = 30
_MOST = 2**32 - 1
"""A size or an offset from here on stands in a ZIP64 field."""
_PLAIN_VERSION, _ZIP64_VERSION = 20, 45
_MADE_ON_UNIX = 3 << 8
_FILE_MODE = 0o100644 << 16
_DATE = 1 << 5 | 1
"""1 January 1980, at midnight, is the date of every member."""


@dataclass(frozen=True, slots=True)
class Member:
    """A member of an archive that begins with its members in order."""

    name: str
    """ASCII."""
    size_bytes: int
    header_offset: int
    """Where its header begins."""
    offset: int
    """Where its content begins."""

    @property
    def end(self) -> int:
        """Where its content ends, and the next header begins."""
        return self.offset + self.size_bytes

    def header(self, crc32: int) -> bytes:
        """The bytes from `header_offset` to `offset`."""
        large = self.size_bytes >= _MOST
        size = _MOST if large else self.size_bytes
        name = self.name.encode("ascii")
        zip64 = struct.pack("<HHQQ", _ZIP64_EXTRA, 16, self.size_bytes, self.size_bytes) if large else b""
        filling = self.offset - self.header_offset - _LOCAL_BYTES - len(name) - len(zip64) - 6
        extra = zip64 + struct.pack("<HHH", _ALIGNMENT_EXTRA, 2 + filling, ALIGNMENT_BYTES) + bytes(filling)
        version = _ZIP64_VERSION if large else _PLAIN_VERSION
        fields = (_LOCAL, version, 0, 0, 0, _DATE, crc32, size, size, len(name), len(extra))
        return struct.pack("<4s5H3L2H", *fields) + name + extra

    def directory_entry(self, crc32: int) -> bytes:
        """The entry of the member in the directory at the archive's end."""
        large = self.size_bytes >= _MOST
        size = _MOST if large else self.size_bytes
        far = self.header_offset >= _MOST
        numbers = [self.size_bytes] * 2 * large + [self.header_offset] * far
        extra = struct.pack(f"<HH{len(numbers)}Q", _ZIP64_EXTRA, 8 * len(numbers), *numbers) if numbers else b""
        version = _ZIP64_VERSION if numbers else _PLAIN_VERSION
        name = self.name.encode("ascii")
        fields = (_CENTRAL, _MADE_ON_UNIX | version, version, 0, 0, 0, _DATE, crc32, size, size, len(name), len(extra))
        place = (0, 0, 0, _FILE_MODE, _MOST if far else self.header_offset)
        return struct.pack("<4s6H3L2H", *fields) + struct.pack("<3HLL", *place) + name + extra


def layout(members: Iterable[tuple[str, int]], first_offset: int = 0) -> list[Member]:
    """Where the members of an archive lie, given their names and sizes in bytes, in order."""
    placed, at = [], first_offset
    for name, size_bytes in members:
        extra = 6 + (20 if size_bytes >= _MOST else 0)
        start = at + _LOCAL_BYTES + len(name) + extra
        member = Member(name, size_bytes, at, -(-start // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
        placed.append(member)
        at = member.end
    return placed


def directory(members: Sequence[Member], crc32s: Sequence[int]) -> bytes:
    """All bytes behind the last of `members`, whose CRC-32 are `crc32s`."""
    entries = b"".join(member.directory_entry(crc32) for member, crc32 in zip(members, crc32s, strict=True))
    start, count = members[-1].end, len(members)
    tail = b""
    if start >= _MOST:
        versions = (_MADE_ON_UNIX | _ZIP64_VERSION, _ZIP64_VERSION)
        tail = struct.pack("<4sQ2H2L4Q", _END64, 44, *versions, 0, 0, count, count, len(entries), start)
        tail += struct.pack("<4sLQL", _LOCATOR64, 0, start + len(entries), 1)
    end = (_END, 0, 0, count, count, len(entries), min(start, _MOST), 0)
    return entries + tail + struct.pack("<4s4H2LH", *end)


def directory_bytes(members: Sequence[Member]) -> int:
    """The length of `directory`."""
    return len(directory(members, [0] * len(members)))


def stated_crc32s(members: Sequence[Member], content: bytes) -> list[int]:
    """The CRC-32 that a directory with the bytes `content` states for each of `members`.

    It is right only if `directory` makes the same bytes of them.
    """
    lengths = [len(member.directory_entry(0)) for member in members]
    starts = accumulate(lengths[:-1], initial=0)
    return [struct.unpack_from("<L", content, start + 16)[0] for start in starts]
