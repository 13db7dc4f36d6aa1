"""The batches of a run over rows, each decided by its index alone, so that a run can be resumed."""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from edgelm_train.data.examples import Example, pad
from edgelm_train.run.loop import Batch

Row = TypeVar("Row")


_BATCHES_SORTED = 32
"""Batches whose rows are sorted by length together: rows of similar length need little padding."""


class RowStream(Dataset[Batch], Generic[Row]):  # type: ignore[misc]
    """A torch dataset of `steps` batches of `batch_size` rows, in a new order in every pass over the rows.

    Where `length` tells the tokens of a row, rows of similar length come into a batch, and the batches of a pass are
    still in any order. Without it, any rows can meet in a batch.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        collate: Callable[[Sequence[Row]], Batch],
        steps: int,
        batch_size: int,
        seed: int,
        *,
        length: Callable[[Row], int] | None = None,
    ) -> None:
        self._rows, self._collate = rows, collate
        self._steps, self._batch_size, self._seed = steps, batch_size, seed
        self._lengths = None if length is None else np.array([length(row) for row in rows])
        self._orders: dict[int, npt.NDArray[np.int64]] = {}  # of the passes that the last batch was in

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> Batch:
        count = len(self._rows)
        places = range(index * self._batch_size, (index + 1) * self._batch_size)
        passes = {place // count for place in places}
        self._orders = {epoch: self._orders[epoch] if epoch in self._orders else self._order(epoch) for epoch in passes}
        return self._collate([self._rows[self._orders[place // count][place % count]] for place in places])

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        """The rows of a pass, by their places in the data."""
        count, size = len(self._rows), self._batch_size
        rng = np.random.default_rng((self._seed, epoch))
        order = rng.permutation(count)
        if self._lengths is None:
            return order
        begin = -epoch * count % size  # the last batch of the pass before takes rows of this one
        end = count - (count - begin) % size
        if begin >= end:
            return order
        for group in range(begin, end, _BATCHES_SORTED * size):
            part = order[group : min(group + _BATCHES_SORTED * size, end)]
            part[:] = part[np.argsort(self._lengths[part], kind="stable")]
        order[begin:end] = rng.permutation(order[begin:end].reshape(-1, size)).reshape(-1)
        return order


def example_stream(
    examples: Sequence[Example], pad_token_id: int, steps: int, batch_size: int, seed: int
) -> RowStream[Example]:
    """Batches of examples, those of similar length together: "input_ids" and "labels", int64 (B, T)."""

    def collate(chosen: Sequence[Example]) -> Batch:
        ids, labels = pad(chosen, pad_token_id)
        return {"input_ids": np.array(ids, np.int64), "labels": np.array(labels, np.int64)}

    return RowStream(examples, collate, steps, batch_size, seed, length=lambda example: len(example.ids))
