"""The memory of a loaded graph in huge pages (Linux). Decoding reads all weights for every token, and in pages of 4 KB
it waits for address translation. Measured in docs/performance.md.
"""

import logging
import mmap
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgelm.errors import pass_interrupts_on

logger = logging.getLogger(__name__)

HUGE_PAGE_BYTES = 2 * 2**20
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MADV_COLLAPSE = 25
"""Since Linux 6.1. It copies into huge pages at once; MADV_HUGEPAGE would wait for a kernel thread."""

Range = tuple[int, int]
"""First address, and the address behind the last byte."""


class LoadedMemory:
    """The memory that loading a graph added to the process."""

    def __init__(self) -> None:
        self._added: list[Range] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record the memory that is added inside this context."""
        earlier = _private_ranges()
        yield
        self._added = ranges_without(_private_ranges(), earlier)

    def move_into_huge_pages(self) -> int:
        """Move the recorded memory that is in use and fills whole huge pages; returns the number of bytes moved.

        It takes a few milliseconds per 100 MB, and no memory. Nothing happens where the system has no huge pages, or
        where its administrator forbids them.
        """
        if not self._added or huge_page_setting() in (None, "never"):
            return 0
        moved = _collapse(self._added)
        logger.debug("moved %.0f MB of weights into huge pages", moved / 1e6)
        return moved


def ranges_without(ranges: list[Range], excluded: list[Range]) -> list[Range]:
    """The parts of `ranges` outside all of `excluded`. Both are sorted and without overlap."""
    left = []
    for start, stop in ranges:
        for other_start, other_stop in excluded:
            if other_stop <= start or other_start >= stop:
                continue
            if start < other_start:
                left.append((start, other_start))
            start = max(start, other_stop)
        if start < stop:
            left.append((start, stop))
    return left


def whole_pages(resident: bytes, start: int, small_page_bytes: int) -> list[Range]:
    """Ranges of huge pages whose small pages are all resident, from the address `start` of a huge page on.

    `resident` has a byte for each small page, whose bit 0 tells whether the page is resident.
    """
    count = HUGE_PAGE_BYTES // small_page_bytes
    whole: list[Range] = []
    for first in range(0, len(resident) - count + 1, count):
        if all(page & 1 for page in resident[first : first + count]):
            address = start + first * small_page_bytes
            joins = bool(whole) and whole[-1][1] == address
            begin = whole.pop()[0] if joins else address
            whole.append((begin, address + HUGE_PAGE_BYTES))
    return whole


def _private_ranges() -> list[Range]:
    """The process's anonymous, writable, private memory, sorted; empty on other systems than Linux."""
    if not sys.platform.startswith("linux"):
        return []
    ranges = []
    try:
        with Path("/proc/self/maps").open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if " rw-p " not in line:  # most lines
                    continue
                addresses, access, _, _, inode = line.split(maxsplit=5)[:5]
                if access == "rw-p" and inode == "0":
                    start, stop = addresses.split("-")
                    ranges.append((int(start, 16), int(stop, 16)))
    except (OSError, ValueError) as error:
        pass_interrupts_on(error)
        return []
    return ranges


def huge_page_setting() -> str | None:
    """The administrator's setting: "always", "madvise" or "never"; None where the system has no huge pages."""
    try:
        match = re.search(r"\[(\w+)\]", _SETTING.read_text(encoding="ascii"))
    except (OSError, ValueError) as error:
        pass_interrupts_on(error)
        return None
    return None if match is None else match[1]


def _collapse(ranges: list[Range]) -> int:
    import ctypes

    libc = ctypes.CDLL(None)
    address, size = ctypes.c_void_p, ctypes.c_size_t
    small_page_bytes = mmap.PAGESIZE
    moved = 0
    for first, last in ranges:
        start, stop = -(-first // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES, last // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        if stop <= start:
            continue
        resident = (ctypes.c_ubyte * ((stop - start) // small_page_bytes))()
        if libc.mincore(address(start), size(stop - start), resident):
            continue  # freed in the meantime
        for whole_start, whole_stop in whole_pages(bytes(resident), start, small_page_bytes):
            whole = whole_stop - whole_start
            if libc.madvise(address(whole_start), size(whole), _MADV_COLLAPSE) == 0:
                moved += whole
    return moved
