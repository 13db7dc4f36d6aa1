"""The batches of a run over rows, each decided by its index alone, so that a run can be resumed."""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from edgelm_train.run.loop import Batch

Row = TypeVar("Row")


class RowStream(Dataset[Batch], Generic[Row]):  # type: ignore[misc]
    """A torch dataset of `steps` batches of `batch_size` rows, in a new order in every pass over the rows."""

    def __init__(
        self, rows: Sequence[Row], collate: Callable[[Sequence[Row]], Batch], steps: int, batch_size: int, seed: int
    ) -> None:
        self._rows, self._collate = rows, collate
        self._steps, self._batch_size, self._seed = steps, batch_size, seed

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> Batch:
        count = len(self._rows)
        places = range(index * self._batch_size, (index + 1) * self._batch_size)
        orders = {epoch: self._order(epoch) for epoch in {place // count for place in places}}
        return self._collate([self._rows[orders[place // count][place % count]] for place in places])

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng((self._seed, epoch)).permutation(len(self._rows))
