"""What a checkpoint is tuned on: running text in windows, or prompts with completions; and how well it predicts it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tokenizers
import torch
from torch.utils.data import Dataset

from edgelm.errors import TrainingError
from edgelm_export.source.checkpoint import Checkpoint
from edgelm_train.data.corpus import END_OF_TEXT, read_corpus, read_documents
from edgelm_train.data.examples import Example, Task, pad, read_examples
from edgelm_train.data.packing import IGNORED, BatchStream, Packed, Phase, pack, refuse_too_little
from edgelm_train.run.held_out import Loss, loss_in_windows, measuring
from edgelm_train.run.loop import Batch

HELD_OUT_EVERY = 20
"""Without a file of its own, every 20th example is held out."""
_ROWS_AT_ONCE = 16


class TuningData(Protocol):
    """Training batches by index, and a held-out part."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the person should know."""

    @property
    def rows(self) -> int:
        """Windows or examples of one pass over the training part."""

    @property
    def tokens_a_row(self) -> int:
        """About so many, for progress."""

    def batches(self, steps: int, batch_size: int, seed: int) -> Dataset[Batch]:
        """`steps` batches of `batch_size` rows, in a new order every pass."""

    def held_out_loss(self, model: Any) -> Loss:
        """Of the tokens that are learned."""

    def first_ids(self, count: int) -> list[int]:
        """Real tokens to begin a learned prefix with."""


@dataclass(frozen=True)
class TextData:
    """Documents end to end, in windows; every token is learned."""

    training: Packed
    held_out: Packed
    window: int
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        return max(1, len(self.training) // self.window)

    @property
    def tokens_a_row(self) -> int:
        return self.window

    def batches(self, steps: int, batch_size: int, seed: int) -> Dataset[Batch]:
        stream = BatchStream(self.training, [Phase(steps, self.window)], batch_size * self.window, 1, seed)
        return stream

    def held_out_loss(self, model: Any) -> Loss:
        return loss_in_windows(model, self.held_out.ids, self.window)

    def first_ids(self, count: int) -> list[int]:
        return [int(token) for token in np.resize(self.training.ids, count)]


@dataclass(frozen=True)
class ExampleData:
    """Prompts with completions, a row each; only completions are learned."""

    training: tuple[Example, ...]
    held_out: tuple[Example, ...]
    pad_token_id: int
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        return len(self.training)

    @property
    def tokens_a_row(self) -> int:
        return sum(len(example.ids) for example in self.training) // len(self.training)

    def batches(self, steps: int, batch_size: int, seed: int) -> Dataset[Batch]:
        return _ExampleStream(self, steps, batch_size, seed)

    def held_out_loss(self, model: Any) -> Loss:
        return loss_on_completions(model, self.held_out, self.pad_token_id)

    def first_ids(self, count: int) -> list[int]:
        ids = [token for example in self.training[:count] for token in example.ids]
        return [int(token) for token in np.resize(ids, count)]


class _ExampleStream(Dataset[Batch]):  # type: ignore[misc]
    """Every batch of a run by index alone, as `BatchStream` has it: a resumed run reads what another would."""

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


def loss_on_completions(model: Any, examples: Sequence[Example], pad_token_id: int) -> Loss:
    """The loss of `model`, float32 and without dropout, on the completions' tokens; its mode stays as it is."""
    nats, tokens = 0.0, 0
    by_length = sorted(examples, key=lambda example: len(example.ids))
    with measuring(model):
        for start in range(0, len(by_length), _ROWS_AT_ONCE):
            rows, targets = pad(by_length[start : start + _ROWS_AT_ONCE], pad_token_id)
            ids = torch.tensor(rows, device=model.device)
            labels = torch.tensor(targets, device=model.device)[:, 1:]
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()  # (B, T - 1, V)
            learned = labels != IGNORED
            nats += float(torch.nn.functional.cross_entropy(logits[learned], labels[learned], reduction="sum"))
            tokens += int(learned.sum())
    return Loss(nats, tokens)


def read_text(file: Path, held_out: Path | None, checkpoint: Checkpoint, window: int, remedy: str) -> TextData:
    """Plain text as `pretrain` reads it, in the checkpoint's tokens.

    Args:
        held_out: another file, all of which is held out; None: a part of `file`.
        remedy: what to give instead of more text, where there is less than a window.

    Raises:
        TrainingError: a file cannot be read, is too short, or the checkpoint has no token between documents.
    """
    tokenizer = tokenizers.Tokenizer.from_str(checkpoint.tokenizer.to_json())
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise TrainingError(
            f"{checkpoint.name!r} has no token {END_OF_TEXT} to put between documents; give examples with a prompt "
            "and a completion instead of plain text"
        )
    if held_out is None:
        corpus = read_corpus([file])
        training, spared = list(corpus.training), list(corpus.held_out)
    else:
        spared = read_documents(held_out)
        known = set(spared)
        training = [document for document in read_documents(file) if document not in known]
    if not spared:
        raise TrainingError(f"nothing but white space in {held_out}: there is no text to measure on")
    if not training:
        raise TrainingError(
            f"every document of {file} is white space or the same as a held-out one: there is nothing left to train on"
        )
    data = TextData(pack(training, tokenizer), pack(spared, tokenizer), window)
    parts = {f"of {file} to train on": data.training, f"of {held_out or file} held out": data.held_out}
    refuse_too_little(parts, window, remedy)
    return data


def read_tasks(file: Path, held_out: Path | None, checkpoint: Checkpoint, task: Task, longest: int) -> ExampleData:
    """Examples of a file of records.

    Args:
        held_out: another such file; None: every 20th example of `file`.
        longest: in tokens; longer examples are left out.

    Raises:
        TrainingError: a file cannot be read, lacks a column, or has too few usable examples.
    """
    eos = checkpoint.model.config.eos_token_id
    found = read_examples(file, task, checkpoint.tokenizer, eos_token_id=eos, context_length=longest)
    notes = found.notes
    if held_out is None:
        spared = found.examples[::HELD_OUT_EVERY]
        training = tuple(example for i, example in enumerate(found.examples) if i % HELD_OUT_EVERY)
    else:
        other = read_examples(held_out, task, checkpoint.tokenizer, eos_token_id=eos, context_length=longest)
        training, spared = found.examples, other.examples
        notes += tuple(f"{held_out}: {note}" for note in other.notes)
    known = set(spared)
    fresh = tuple(example for example in training if example not in known)
    if len(fresh) < len(training):
        notes += (f"left out {len(training) - len(fresh):,} examples that are the same as held-out ones",)
    if not fresh:
        raise TrainingError(f"{str(file)!r} has no example that is not held out: there is nothing left to train on")
    # What a short row is filled up with is never looked at; any token does.
    return ExampleData(fresh, spared, 0 if eos is None else eos, notes)
