"""The order of answers, and how many rows are under way."""

from collections.abc import Iterator
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from edgelm.batch import pool as pool_module
from edgelm.batch.answers import Answer
from edgelm.batch.pool import answers


class FakePool:
    """Workers that finish rows in an order that `luck` decides."""

    def __init__(self, capacity: int, luck: Random) -> None:
        self.capacity, self._luck = capacity, luck
        self._rows: list[int] = []

    @property
    def free(self) -> int:
        return self.capacity - len(self._rows)

    @property
    def open_rows(self) -> int:
        return len(self._rows)

    def submit(self, number: int, line: bytes) -> None:
        assert self.free > 0 and line == b"%d" % number
        self._rows.append(number)

    def finished(self) -> list[Answer]:
        ended = [number for number in self._rows if self._luck.random() < 0.4]
        self._rows = [number for number in self._rows if number not in ended]
        return [Answer(number, "") for number in ended]

    def close(self) -> None:
        raise AssertionError("whoever made the pool closes it")


@given(st.integers(0, 40), st.integers(1, 4), st.booleans(), st.integers())
def test_every_row_is_answered_once(count: int, capacity: int, ordered: bool, seed: int) -> None:
    rows = [(number, b"%d" % number) for number in range(1, count * 2, 2)]  # the others are answered already
    numbers = [one.number for one in answers(FakePool(capacity, Random(seed)), iter(rows), ordered=ordered)]
    assert (numbers if ordered else sorted(numbers)) == [number for number, _ in rows]


def test_a_slow_row_holds_up_only_so_many() -> None:
    """Rows are read from the file as they are needed, also where the first one takes long."""

    class SlowFirst(FakePool):
        def finished(self) -> list[Answer]:
            ended = [number for number in self._rows if number != 1 or read[0] == most]
            self._rows = [number for number in self._rows if number not in ended]
            return [Answer(number, "") for number in ended]

    read = [0]

    def rows() -> Iterator[tuple[int, bytes]]:
        for number in range(1, 1000):
            read[0] = number
            yield number, b"%d" % number

    most = 2 * pool_module.HELD_ROWS + 1
    come = answers(SlowFirst(2, Random()), rows(), ordered=True)
    assert next(come).number == 1 and read[0] == most
