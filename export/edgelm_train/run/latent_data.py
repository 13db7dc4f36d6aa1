"""The data of a latent model: short texts, one on each line of a file, with a held-out part and its measurements."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from torch.utils.data import Dataset

from edgelm.errors import TrainingError
from edgelm_export.source.checkpoint import Checkpoint
from edgelm_train.data.bpe import encode
from edgelm_train.data.corpus import counted, without_held_out
from edgelm_train.data.examples import Example, pad
from edgelm_train.data.text_file import read_text_file
from edgelm_train.models.latent import LatentGPT2
from edgelm_train.models.latent_loss import (
    active_units,
    kl_divergence,
    kl_weight,
    reconstruction_loss,
    sample,
    with_free_bits,
)
from edgelm_train.run.held_out import Loss, loss_on_completions, measuring
from edgelm_train.run.loop import Batch
from edgelm_train.run.row_stream import RowStream, example_stream

_HELD_OUT_EVERY = 20
_ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class Measured:
    """A latent model on held-out texts. Losses are sums over the texts, in nats."""

    reconstruction: Loss
    """-E_q[log p(x|z)], with one draw of z for each text."""
    of_means: Loss
    """The same with the mean of q(z|x) as z."""
    shuffled: Loss
    """The same with the z of another text."""
    kl_nats: float
    """KL(q(z|x) || p(z)) of a text, on average."""
    with_free_bits_nats: float
    """The same with the free bits that training counts."""
    texts: int
    active_units: int

    @property
    def objective(self) -> float:
        """What training minimizes where the divergence has its full weight, in nats per token."""
        return (self.reconstruction.nats + self.texts * self.with_free_bits_nats) / self.reconstruction.tokens

    @property
    def bound(self) -> float:
        """The negative evidence lower bound, in nats per token: an upper bound of the loss of x without z."""
        return (self.reconstruction.nats + self.texts * self.kl_nats) / self.reconstruction.tokens


@dataclass(frozen=True)
class LatentData:
    """Texts as examples: the end-of-text token, the text and the end-of-text token again."""

    training: tuple[Example, ...]
    held_out: tuple[Example, ...]
    pad_token_id: int
    notes: tuple[str, ...] = ()
    """Remarks for the user, in sentences."""

    @property
    def tokens_per_row(self) -> int:
        """Mean length of a text, in tokens."""
        return sum(len(example.ids) for example in self.training) // len(self.training)

    def batches(self, steps: int, batch_size: int, seed: int, cycles: int | None = None) -> Dataset[Batch]:
        """`steps` batches of `batch_size` texts, each with the weight of the divergence in its step of `cycles`.

        Without `cycles` the batches have no such weight: they suit a plain model.
        """
        stream = example_stream(self.training, self.pad_token_id, steps, batch_size, seed)
        return stream if cycles is None else _Weighted(stream, cycles)

    def plain_loss(self, model: Any) -> Loss:
        """Loss of a plain `model` on the held-out texts."""
        return loss_on_completions(model, self.held_out, self.pad_token_id)

    def measured(self, model: LatentGPT2, seed: int) -> Measured:
        """Measure `model` on the held-out texts. `seed` decides the draws of z and the order of the shuffled ones."""
        by_length = sorted(self.held_out, key=lambda example: len(example.ids))
        nats, divergences, means, tokens = np.zeros(3), [], [], 0
        generator = torch.Generator().manual_seed(seed)
        with measuring(model):
            for start in range(0, len(by_length), _ROWS_AT_ONCE):
                rows = pad(by_length[start : start + _ROWS_AT_ONCE], self.pad_token_id)
                ids, labels = (torch.tensor(values, device=model.device) for values in rows)
                mean, log_variance = model.posterior(ids, labels)
                z = sample(mean, log_variance, torch.randn(mean.shape, generator=generator).to(mean.device))
                for place, vectors in enumerate((z, mean, z.roll(1, dims=0))):
                    nats[place] += float(reconstruction_loss(model.decode(ids, vectors), labels).sum())
                divergences.append(kl_divergence(mean, log_variance).cpu())
                means.append(mean.cpu())
                tokens += sum(len(example.ids) - 1 for example in by_length[start : start + _ROWS_AT_ONCE])
        divergence = torch.cat(divergences)
        of_draws, of_means, shuffled = (Loss(float(sum_nats), tokens) for sum_nats in nats)
        return Measured(
            reconstruction=of_draws,
            of_means=of_means,
            shuffled=shuffled,
            kl_nats=float(divergence.sum(dim=1).mean()),
            with_free_bits_nats=float(with_free_bits(divergence, model.free_bits)),
            texts=len(self.held_out),
            active_units=active_units(torch.cat(means)),
        )


class _Weighted(Dataset[Batch]):  # type: ignore[misc]
    """The batches of another stream, each with the weight that the divergence has in its step."""

    def __init__(self, batches: RowStream[Example], cycles: int) -> None:
        self._batches, self._cycles = batches, cycles

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Batch:
        weight = np.float32(kl_weight(index, len(self), self._cycles))
        return {**self._batches[index], "kl_weight": weight}


def read_lines(file: Path, held_out: Path | None, checkpoint: Checkpoint, end: int, longest: int) -> LatentData:
    """The lines of `file` as texts, in the tokens of a checkpoint; empty lines are left out.

    The lines of `held_out` are held out. Where it is None, every 20th line of `file` is held out. Texts of more than
    `longest` tokens are left out, and so are texts to train on that are held out too.

    Raises:
        TrainingError: a file cannot be read, has a text that the tokenizer cannot encode or the model lacks a token of,
            or has too few usable texts.
    """
    texts = _texts(file)
    if held_out is None:
        held, training = texts[::_HELD_OUT_EVERY], [text for at, text in enumerate(texts) if at % _HELD_OUT_EVERY]
    else:
        held, training = _texts(held_out), texts
    fresh, left_out = without_held_out(training, held, "text", lambda text: text)
    tokenizer = tokenizers.Tokenizer.from_str(checkpoint.tokenizer.to_json())
    size, notes, parts = checkpoint.architecture.vocab_size, list(left_out), list[tuple[Example, ...]]()
    for path, part in ((file, fresh), (held_out or file, held)):
        examples = [Example((end, *encode(tokenizer, text), end), 1) for text in part]
        usable = tuple(example for example in examples if len(example.ids) <= longest)
        if long := len(examples) - len(usable):
            notes.append(f"left out {long:,} of {counted(len(examples), 'text')}: longer than {longest - 2} tokens")
        highest = max((max(example.ids) for example in usable), default=0)
        if highest >= size:
            token = tokenizer.id_to_token(highest)
            raise TrainingError(
                f"{path} needs the token {token!r} (id {highest}), but {checkpoint.name!r} has only {size:,} tokens: "
                "leave it out of the text"
            )
        parts.append(usable)
    for path, what, found in ((file, "to train on", parts[0]), (held_out or file, "held out", parts[1])):
        if len(found) < 2:
            raise TrainingError(f"{path} has {counted(len(found), 'usable text')} {what}: give more lines of text")
    return LatentData(parts[0], parts[1], end, tuple(notes))


def _texts(file: Path) -> list[str]:
    lines = read_text_file(file)[1].splitlines()
    return [text for line in lines if (text := line.strip())]
