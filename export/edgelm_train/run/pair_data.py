"""Pairs of texts with scores as the data of a tuning run; methods as in `edgelm_train.run.tuning_data.TextData`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from edgelm.errors import TrainingError
from edgelm_export.source.checkpoint import Checkpoint
from edgelm_train.data.corpus import without_held_out
from edgelm_train.data.similarity import SimilarityTask, TextPair, read_text_pairs
from edgelm_train.models.similarity_loss import cosent_loss, pair_similarities, spearman
from edgelm_train.run.held_out import measuring
from edgelm_train.run.loop import Batch
from edgelm_train.run.row_stream import RowStream

_PAIRS_AT_ONCE = 256


@dataclass(frozen=True)
class PairData:
    """Pairs of texts, one in each row; what is learned is to rank their similarities as their scores."""

    training: tuple[TextPair, ...]
    held_out: tuple[TextPair, ...]
    task: SimilarityTask
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        return len(self.training)

    @property
    def tokens_per_row(self) -> int:
        return sum(len(pair.first) + len(pair.second) for pair in self.training) // len(self.training)

    @property
    def held_out_size(self) -> dict[str, object]:
        return {"held-out pairs": len(self.held_out)}

    def batches(self, steps: int, batch_size: int, seed: int) -> Dataset[Batch]:
        return RowStream(self.training, pair_batch, steps, batch_size, seed)

    def losses(self, model: Any, batch: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
        yield cosent_loss(pair_similarities(model, batch, self.task.pooling), batch["scores"])

    def held_out_measure(self, model: Any) -> float:
        """1 minus Spearman's correlation of similarities and scores, of `model` in float32 on the held-out pairs."""
        similarities = []
        with measuring(model):
            for begin in range(0, len(self.held_out), _PAIRS_AT_ONCE):
                arrays = pair_batch(self.held_out[begin : begin + _PAIRS_AT_ONCE])
                batch = {name: torch.from_numpy(values).to(model.device) for name, values in arrays.items()}
                similarities += pair_similarities(model, batch, self.task.pooling).tolist()
        return 1 - spearman(similarities, [pair.score for pair in self.held_out])

    def first_ids(self, count: int) -> list[int]:
        ids = [token for pair in self.training[:count] for token in (*pair.first, *pair.second)]
        return [int(token) for token in np.resize(ids, count)]


def pair_batch(pairs: Sequence[TextPair]) -> dict[str, npt.NDArray[Any]]:
    """Arrays of P pairs: "input_ids" (2P, T) with all first texts before all second ones, "lengths" (2P,) in tokens,
    and "scores" (P,)."""
    texts = [pair.first for pair in pairs] + [pair.second for pair in pairs]
    columns = zip_longest(*texts, fillvalue=0)  # any token can fill up a short row, because attention never looks at it
    return {
        "input_ids": np.array(list(columns), np.int64).T.copy(),
        "lengths": np.array([len(ids) for ids in texts], np.int64),
        "scores": np.array([pair.score for pair in pairs], np.float32),
    }


def read_similarities(
    file: Path, held_out: Path | None, checkpoint: Checkpoint, task: SimilarityTask, longest: int, every: int
) -> PairData:
    """Pairs of a file of records, in the tokens of a checkpoint.

    The records of `held_out` are held out. Where it is None, each of `every` records of `file` is held out. Pairs with
    a text of more than `longest` tokens are left out.

    Raises:
        TrainingError: a file cannot be read, lacks a column, or has too few usable pairs.
    """
    found = read_text_pairs(file, task, checkpoint.tokenizer, longest)
    training, notes = found.pairs, found.notes
    if held_out is None:
        held = training[::every]
        training = tuple(pair for i, pair in enumerate(training) if i % every)
    else:
        others = read_text_pairs(held_out, task, checkpoint.tokenizer, longest)
        held = others.pairs
        notes += tuple(f"{held_out}: {note}" for note in others.notes if note not in found.notes)
    fresh, left_out = without_held_out(training, held, "pair", lambda pair: (pair.first, pair.second))
    for what, part in (("to train on", fresh), ("held out", held)):
        if len({pair.score for pair in part}) < 2:
            raise TrainingError(f"the pairs {what} of {str(file)!r} have no two different scores; give more pairs")
    return PairData(fresh, held, task, notes + left_out)
