"""The data of a tuning run: plain text in windows, or prompts with completions, each with a held-out part."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from torch.utils.data import Dataset

from edgelm.errors import TrainingError
from edgelm_export.source.checkpoint import Checkpoint
from edgelm_export.source.fingerprint import model_sha256
from edgelm_train.data.corpus import read_parts, without_held_out
from edgelm_train.data.end_of_text import EndOfText
from edgelm_train.data.examples import Example, Examples, read_examples
from edgelm_train.data.packing import BatchStream, Packed, Phase, pack, refuse_too_little
from edgelm_train.data.templates import ChatTask, Task
from edgelm_train.models.completion_loss import losses_in_parts
from edgelm_train.run.folder import sha256_of_file, sha256_of_weights
from edgelm_train.run.held_out import Loss, loss_in_windows, loss_on_completions
from edgelm_train.run.loop import Batch, Objective, Outcome, Schedule, train
from edgelm_train.run.pair_data import PairData
from edgelm_train.run.row_stream import example_stream

HELD_OUT_EVERY = 20


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

    def losses(self, model: Any, batch: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
        """What is learned of a batch, as in `edgelm_train.run.loop.Objective`."""
        return losses_in_parts(model, batch)

    @property
    def held_out_size(self) -> dict[str, object]:
        """How much is held out, as a fact of the report."""
        return {"held-out tokens": len(self.held_out) // self.window * (self.window - 1)}

    def held_out_measure(self, model: Any) -> float:
        """What training lowers on the held-out part: the loss of `model`, in nats per token."""
        return self.held_out_loss(model).per_token

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
    task: Task | ChatTask | None = None
    """How the rows became examples, with the roles of the data if they are chats."""

    @property
    def rows(self) -> int:
        return len(self.training)

    @property
    def tokens_per_row(self) -> int:
        return sum(len(example.ids) for example in self.training) // len(self.training)

    def batches(self, steps: int, batch_size: int, seed: int) -> Dataset[Batch]:
        return example_stream(self.training, self.pad_token_id, steps, batch_size, seed)

    def losses(self, model: Any, batch: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
        return losses_in_parts(model, batch)

    @property
    def held_out_size(self) -> dict[str, object]:
        return {"held-out tokens": sum(len(e.ids) - max(1, e.prompt_length) for e in self.held_out)}

    def held_out_measure(self, model: Any) -> float:
        return self.held_out_loss(model).per_token

    def held_out_loss(self, model: Any) -> Loss:
        return loss_on_completions(model, self.held_out, self.pad_token_id)

    def first_ids(self, count: int) -> list[int]:
        ids = [token for example in self.training[:count] for token in example.ids]
        return [int(token) for token in np.resize(ids, count)]


TuningData = TextData | ExampleData | PairData


def train_on(
    data: TuningData,
    model: Any,
    folder: Path,
    schedule: Schedule,
    device: str,
    say: Callable[[str], None],
    *,
    objective: Objective | None,
) -> Outcome:
    """Train `model` in place on batches of whole rows, as `edgelm_train.run.loop.train` does.

    `objective` is the method `losses` of `data`, or None for the model's own loss.
    """
    batches = data.batches(schedule.steps, schedule.batch_tokens // data.tokens_per_row, schedule.seed)
    return train(model, batches, data.held_out_measure, folder, schedule, objective=objective, device=device, say=say)


def read_text(file: Path, held_out: Path | None, checkpoint: Checkpoint, window: int, remedy: str) -> TextData:
    """Plain text, split into documents as by ``edgelm pretrain``, in the tokens of a checkpoint.

    The file `held_out` is held out as a whole. Where it is None, a part of `file` is held out. `window` is the length
    of a window in tokens; `remedy` is as for `refuse_too_little`.

    Raises:
        TrainingError: a file cannot be read or is too short, or has a token that the model lacks.
    """
    tokenizer = tokenizers.Tokenizer.from_str(checkpoint.tokenizer.to_json())
    training, held = read_parts(file, held_out)
    end, size = EndOfText.of(checkpoint), checkpoint.architecture.vocab_size
    packed = [pack(documents, tokenizer, end.token_id) for documents in (training, held)]
    data = TextData(packed[0], packed[1], window, end.notes)
    for path, part in ((file, data.training), (held_out or file, data.held_out)):
        if (highest := int(part.ids.max())) >= size:
            token = tokenizer.id_to_token(highest)
            message = (
                f"{path} needs the token {token!r} (id {highest}), but {checkpoint.name!r} has only {size:,} tokens"
            )
            raise TrainingError(f"{message}: leave it out of the text")
    parts = {f"of {file} to train on": data.training, f"of {held_out or file} held out": data.held_out}
    refuse_too_little(parts, window, remedy)
    return data


def read_tasks(
    file: Path, held_out: Path | None, checkpoint: Checkpoint, task: Task | ChatTask, longest: int
) -> ExampleData:
    """Examples of a file of records, in the tokens of a checkpoint.

    The records of `held_out` are held out. Where it is None, every 20th record of `file` is held out, a chat with all
    its answers. Examples of more than `longest` tokens are left out.

    Raises:
        TrainingError: a file cannot be read, lacks a column, or has too few usable examples.
    """
    end = EndOfText.of(checkpoint)

    def read(path: Path) -> Examples:
        return read_examples(path, task, checkpoint.tokenizer, eos_token_id=end.token_id, context_length=longest)

    examples = read(file)
    training, notes = examples.examples, end.notes + examples.notes
    if held_out is None:
        rows = examples.by_row
        held = tuple(example for row in rows[::HELD_OUT_EVERY] for example in row)
        training = tuple(example for i, row in enumerate(rows) if i % HELD_OUT_EVERY for example in row)
    else:
        others = read(held_out)
        held = others.examples
        notes += tuple(f"{held_out}: {note}" for note in others.notes if note not in examples.notes)
    fresh, left_out = without_held_out(training, held, "example", lambda example: example)
    if not fresh:
        raise TrainingError(f"{str(file)!r} has no example that is not held out; give more examples")
    # Any token can fill up a short row, because attention never looks at it.
    return ExampleData(fresh, held, end.token_id or 0, notes + left_out, examples.task)


def fingerprints(
    checkpoint: Checkpoint, data: Path, held_out: Path | None, adapter: Path | None = None
) -> dict[str, object]:
    """Name and hashes (hex) of checkpoint, adapter and data, which must not change when a tuning run is resumed."""
    return {
        "base": checkpoint.name,
        "weights": model_sha256(checkpoint.model),
        "tokenizer": hashlib.sha256(checkpoint.tokenizer.to_json().encode()).hexdigest(),
        "adapter": None if adapter is None else sha256_of_weights(adapter),
        "data": sha256_of_file(data),
        "held-out data": None if held_out is None else sha256_of_file(held_out),
    }
