"""The memory that a load has added moves into huge pages."""

import mmap
import os
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm import Bundle
from edgelm.engine.graph import LONG_USE_RUNS, Graph
from edgelm.engine.huge_pages import HUGE_PAGE_BYTES, LoadedMemory, Range, _collapse, ranges_without, whole_pages
from tests.conftest import TINY_BUNDLE


@pytest.mark.parametrize(
    ("ranges", "others", "left"),
    [
        ([(0, 10)], [], [(0, 10)]),
        ([(0, 10)], [(0, 10)], []),
        ([(0, 10)], [(2, 4), (6, 7)], [(0, 2), (4, 6), (7, 10)]),
        ([(5, 10), (20, 30)], [(0, 6), (8, 25)], [(6, 8), (25, 30)]),
        ([(5, 10)], [(0, 5), (10, 20)], [(5, 10)]),
        ([], [(0, 5)], []),
    ],
)
def test_what_was_added(ranges: list[Range], others: list[Range], left: list[Range]) -> None:
    assert ranges_without(ranges, others) == left


def cut(edges: set[int]) -> list[Range]:
    ordered = sorted(edges)
    return list(zip(ordered[0::2], ordered[1::2], strict=False))


@given(st.sets(st.integers(0, 60)), st.sets(st.integers(0, 60)))
def test_what_was_added_is_a_difference_of_sets(mine: set[int], others: set[int]) -> None:
    def numbers(ranges: list[Range]) -> set[int]:
        return {number for start, stop in ranges for number in range(start, stop)}

    left = ranges_without(cut(mine), cut(others))
    assert numbers(left) == numbers(cut(mine)) - numbers(cut(others))
    assert all(start < stop for start, stop in left)


def test_only_pages_in_use_are_moved() -> None:
    small = HUGE_PAGE_BYTES // 4
    start = 10 * HUGE_PAGE_BYTES
    resident = bytes([1, 1, 1, 1, 255, 1, 3, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1])
    assert whole_pages(resident, start, small) == [
        (start, start + 2 * HUGE_PAGE_BYTES),
        (start + 3 * HUGE_PAGE_BYTES, start + 4 * HUGE_PAGE_BYTES),
    ]


def test_a_part_of_a_huge_page_is_none() -> None:
    small = HUGE_PAGE_BYTES // 4
    for length in range(4):
        assert whole_pages(b"\1" * length, 0, small) == []
    assert whole_pages(b"\1" * 7, 0, small) == [(0, HUGE_PAGE_BYTES)]


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="calls of POSIX")
def test_whole_huge_pages_of_a_range_are_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of the system are (name, address, size), in huge pages."""
    calls: list[tuple[str, float, float]] = []
    answers = {"mincore": 0, "madvise": 0}

    def call(name: str, address: Any, size: Any) -> int:
        calls.append((name, (address.value or 0) / HUGE_PAGE_BYTES, size.value / HUGE_PAGE_BYTES))
        return answers[name]

    def mincore(address: Any, size: Any, resident: Any) -> int:
        resident[:] = [1] * len(resident)
        return call("mincore", address, size)

    def madvise(address: Any, size: Any, advice: int) -> int:
        assert advice == 25  # MADV_COLLAPSE of Linux
        return call("madvise", address, size)

    monkeypatch.setattr("ctypes.CDLL", lambda name: SimpleNamespace(mincore=mincore, madvise=madvise))
    page = HUGE_PAGE_BYTES
    too_small = [(page + 1, 2 * page), (5 * page, 6 * page - 1)]
    assert _collapse([*too_small, (8 * page - 1, 11 * page + 1)]) == 3 * page
    assert calls == [("mincore", 8, 3), ("madvise", 8, 3)]
    answers["madvise"] = -1
    assert _collapse([(0, page), (4 * page, 6 * page)]) == 0
    assert calls[2:] == [("mincore", 0, 1), ("madvise", 0, 1), ("mincore", 4, 2), ("madvise", 4, 2)]
    answers |= {"mincore": -1, "madvise": 0}
    assert _collapse([(0, page)]) == 0
    assert calls[6:] == [("mincore", 0, 1)]


def test_moving_changes_nothing_but_the_pages() -> None:
    memory = LoadedMemory()
    with memory.recorded():
        array = np.arange(4 * HUGE_PAGE_BYTES // 8)
        untouched = np.empty(8 * HUGE_PAGE_BYTES, np.uint8)
    moved = memory.move_into_huge_pages()
    assert moved % HUGE_PAGE_BYTES == 0 and 0 <= moved <= array.nbytes + HUGE_PAGE_BYTES
    assert (array == np.arange(array.size)).all()
    assert untouched.size
    if not sys.platform.startswith("linux"):
        assert moved == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_new_private_memory_is_recorded() -> None:
    memory = LoadedMemory()
    with memory.recorded():  # numpy may take memory that the process has already
        mapped = mmap.mmap(-1, 4 * HUGE_PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = np.frombuffer(mapped, np.uint8).ctypes.data
    assert any(start <= address and address + 4 * HUGE_PAGE_BYTES <= stop for start, stop in memory._added)


def test_nothing_recorded_nothing_moved() -> None:
    assert LoadedMemory().move_into_huge_pages() == 0


def test_a_graph_settles_once_and_only_in_long_use(monkeypatch: pytest.MonkeyPatch) -> None:
    settled: list[int] = []
    runs = 0
    monkeypatch.setattr(LoadedMemory, "move_into_huge_pages", lambda self: settled.append(runs))
    session = Graph.open(Bundle.read(TINY_BUNDLE), device="cpu", threads=1).session()
    for runs in range(LONG_USE_RUNS + 50):
        assert settled == ([] if runs < LONG_USE_RUNS else [LONG_USE_RUNS - 1])
        session.step([1])
        session.rewind(1)
