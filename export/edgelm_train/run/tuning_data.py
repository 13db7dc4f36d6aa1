"""The data of a tuning run: plain text in windows, or prompts with completions, each with a held-out part."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from torch.utils.data import Dataset

from edgelm.errors import TrainingError
from edgelm_export.source.checkpoint import Checkpoint
from edgelm_export.source.fingerprint import model_sha256
from edgelm_train.data.corpus import END_OF_TEXT, counted, read_corpus, read_documents
from edgelm_train.data.examples import Example, pad, read_examples
from edgelm_train.data.packing import BatchStream, Packed, Phase, pack, refuse_too_little
from edgelm_train.data.records import Task
from edgelm_train.run.folder import sha256_of_file
from edgelm_train.run.held_out import Loss, loss_in_windows, loss_on_completions
from edgelm_train.run.loop import Batch, Outcome, Schedule, train

_HELD_OUT_EVERY = 20


@dataclass(frozen=True)
class TextData:
    """Documents end to end, in windows of `window` tokens; every token is learned."""

    training: Packed
    held_out: Packed
    window: int
    notes: tuple[str, ...] = ()
    """Remarks for the user, in sentences."""

    @property
    def rows(self) -> int:
        """Number of windows in the training part."""
        return max(1, len(self.training) // self.window)

    @property
    def tokens_per_row(self) -> int:
        """Mean length of a row, in tokens."""
        return self.window

    def batches(self, steps: int, batch_size: int, seed: int) -> Dataset[Batch]:
        """`steps` batches of `batch_size` rows each, in a new order in every pass over the data."""
        return BatchStream(self.training, [Phase(steps, self.window)], batch_size * self.window, 1, seed)

    def held_out_loss(self, model: Any) -> Loss:
        """Loss of `model` on the held-out part, on the kind of tokens that are learned."""
        return loss_in_windows(model, self.held_out.ids, self.window)

    def first_ids(self, count: int) -> list[int]:
        """The first `count` tokens of the training part, repeated where it is shorter."""
        return [int(token) for token in np.resize(self.training.ids, count)]


@dataclass(frozen=True)
class ExampleData:
    """Prompts with completions, one in each row, with the methods of `TextData`; only the completions are learned."""

    training: tuple[Example, ...]
    held_out: tuple[Example, ...]
    pad_token_id: int
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        return len(self.training)

    @property
    def tokens_per_row(self) -> int:
        return sum(len(example.ids) for example in self.training) // len(self.training)

    def batches(self, steps: int, batch_size: int, seed: int) -> Dataset[Batch]:
        return _ExampleStream(self, steps, batch_size, seed)

    def held_out_loss(self, model: Any) -> Loss:
        return loss_on_completions(model, self.held_out, self.pad_token_id)

    def first_ids(self, count: int) -> list[int]:
        ids = [token for example in self.training[:count] for token in example.ids]
        return [int(token) for token in np.resize(ids, count)]


TuningData = TextData | ExampleData


class _ExampleStream(Dataset[Batch]):  # type: ignore[misc]
    """A torch dataset of a run's batches, each decided by its index alone, as in `BatchStream`."""

    def __init__(self, data: ExampleData, steps: int, batch_size: int, seed: int) -> None:
        self._data, self._steps, self._batch_size, self._seed = data, steps, batch_size, seed

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> dict[str, npt.NDArray[np.int64]]:
        rows = self._data.rows
        places = range(index * self._batch_size, (index + 1) * self._batch_size)
        orders = {epoch: self._order(epoch) for epoch in {place // rows for place in places}}
        chosen = [self._data.training[orders[place // rows][place % rows]] for place in places]
        ids, labels = pad(chosen, self._data.pad_token_id)
        return {"input_ids": np.array(ids, np.int64), "labels": np.array(labels, np.int64)}

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng((self._seed, epoch)).permutation(self._data.rows)


def train_on(
    data: TuningData, model: Any, folder: Path, schedule: Schedule, device: str, say: Callable[[str], None]
) -> Outcome:
    """Train `model` in place on batches of whole rows, as `edgelm_train.run.loop.train` does."""
    batches = data.batches(schedule.steps, schedule.batch_tokens // data.tokens_per_row, schedule.seed)

    def measure(model: Any) -> float:
        return data.held_out_loss(model).per_token

    return train(model, batches, measure, folder, schedule, device=device, say=say)


def read_text(file: Path, held_out: Path | None, checkpoint: Checkpoint, window: int, remedy: str) -> TextData:
    """Plain text, split into documents as by ``edgelm pretrain``, in the tokens of a checkpoint.

    The file `held_out` is held out as a whole. Where it is None, a part of `file` is held out. `window` is the length
    of a window in tokens; `remedy` is as for `refuse_too_little`.

    Raises:
        TrainingError: a file cannot be read or is too short, or the checkpoint has no <|endoftext|>.
    """
    tokenizer = tokenizers.Tokenizer.from_str(checkpoint.tokenizer.to_json())
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        message = f"{checkpoint.name!r} has no token {END_OF_TEXT} to separate documents"
        raise TrainingError(f"{message}; give examples with a prompt and a completion instead of plain text")
    if held_out is None:
        corpus = read_corpus([file])
        training, held = corpus.training, corpus.held_out
    else:
        held = tuple(read_documents(held_out))
        known = set(held)
        training = tuple(document for document in read_documents(file) if document not in known)
    if not held:
        raise TrainingError(f"there is nothing but white space in {held_out}: give a file with text")
    if not training:
        raise TrainingError(
            f"every document of {file} is white space or equals a held-out document: there is nothing left to train on"
        )
    data = TextData(pack(training, tokenizer), pack(held, tokenizer), window)
    parts = {f"of {file} to train on": data.training, f"of {held_out or file} held out": data.held_out}
    refuse_too_little(parts, window, remedy)
    return data


def read_tasks(file: Path, held_out: Path | None, checkpoint: Checkpoint, task: Task, longest: int) -> ExampleData:
    """Examples of a file of records, in the tokens of a checkpoint.

    The records of `held_out` are held out. Where it is None, every 20th example of `file` is held out. Examples of more
    than `longest` tokens are left out.

    Raises:
        TrainingError: a file cannot be read, lacks a column, or has too few usable examples.
    """
    tokenizer, eos = checkpoint.tokenizer, checkpoint.model.config.eos_token_id
    examples = read_examples(file, task, tokenizer, eos_token_id=eos, context_length=longest)
    training, notes = examples.examples, examples.notes
    if held_out is None:
        held = training[::_HELD_OUT_EVERY]
        training = tuple(example for i, example in enumerate(training) if i % _HELD_OUT_EVERY)
    else:
        others = read_examples(held_out, task, tokenizer, eos_token_id=eos, context_length=longest)
        held, notes = others.examples, notes + tuple(f"{held_out}: {note}" for note in others.notes)
    known = set(held)
    fresh = tuple(example for example in training if example not in known)
    if repeated := len(training) - len(fresh):
        notes += (f"left out {counted(repeated, 'example')} because an equal one is held out",)
    if not fresh:
        raise TrainingError(f"{str(file)!r} has no example that is not held out; give more examples")
    # Any token can fill up a short row, because attention never looks at it.
    return ExampleData(fresh, held, 0 if eos is None else eos, notes)


def fingerprints(checkpoint: Checkpoint, data: Path, held_out: Path | None) -> dict[str, object]:
    """Name and hashes (hex) of checkpoint and data, which must not change when a tuning run is resumed."""
    return {
        "base": checkpoint.name,
        "weights": model_sha256(checkpoint.model),
        "tokenizer": hashlib.sha256(checkpoint.tokenizer.to_json().encode()).hexdigest(),
        "data": sha256_of_file(data),
        "held-out data": None if held_out is None else sha256_of_file(held_out),
    }
