"""The batches of a run over rows: every row once in a pass, whatever their lengths."""

from collections.abc import Sequence

import numpy as np
import pytest

from edgelm_train.run.row_stream import RowStream


def stream(count: int, batch_size: int, steps: int, *, sort: bool, seed: int = 0) -> RowStream[int]:
    """Rows 0 to `count` - 1, each as long as its number."""

    def collate(rows: Sequence[int]) -> dict[str, object]:
        return {"rows": list(rows)}

    return RowStream(range(count), collate, steps, batch_size, seed, length=(lambda row: row) if sort else None)


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize(("count", "batch_size"), [(10, 3), (64, 8), (7, 7), (5, 8), (1000, 16), (1, 1)])
def test_each_pass_has_every_row_once(count: int, batch_size: int, sort: bool) -> None:
    batches = stream(count, batch_size, 3 * count, sort=sort)
    rows = [row for index in range(3 * count) for row in batches[index]["rows"]]
    passes = [rows[begin : begin + count] for begin in range(0, 3 * count, count)]
    assert all(sorted(one) == list(range(count)) for one in passes)
    if count > 9:
        assert passes[0] != passes[1] != passes[2] != passes[0]


def test_rows_of_similar_length_come_together_in_any_order() -> None:
    batches = stream(1000, 16, 180, sort=True)
    spans = [max(rows) - min(rows) for rows in (batches[index]["rows"] for index in range(180))]
    assert np.median(spans) < 60  # of any 16 rows: about 880
    firsts = [min(batches[index]["rows"]) for index in range(60)]
    assert firsts != sorted(firsts) and firsts != sorted(firsts, reverse=True)
    assert [stream(1000, 16, 180, sort=True)[index] for index in (0, 100)] == [batches[0], batches[100]]
    assert stream(1000, 16, 180, sort=True, seed=1)[0] != batches[0]
