"""The loss of a model on held-out data: on windows of a packed stream, or on the completions of examples."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edgelm_train.data.examples import Example, pad
from edgelm_train.data.packing import IGNORED, Ids
from edgelm_train.data.parts import parts_of_rows
from edgelm_train.models.completion_loss import summed_cross_entropy, tokens_at_once


@dataclass(frozen=True)
class Loss:
    """Cross entropy of a text: the sum over its predicted tokens, and their number."""

    nats: float
    tokens: int

    @property
    def per_token(self) -> float:
        """Mean cross entropy of a token, in nats."""
        return self.nats / self.tokens


def loss_in_windows(model: Any, ids: Ids, window: int) -> Loss:
    """The loss of `model`, in float32 without dropout, on a packed stream that is cut into windows.

    `ids` (T,) fills at least one window of `window` tokens. The first token of a window does not count, because no
    token predicts it. Nor do the tokens after the last whole window. The model's mode and torch's random state stay as
    they are.
    """
    return _loss(model, ((batch, batch) for batch in whole_windows(ids, window, model.device)))


def whole_windows(ids: Ids, window: int, device: torch.device) -> Sequence[torch.Tensor]:
    """The whole windows of a packed stream `ids` (T,), as int64 batches (B, window) of what `device` takes at once."""
    rows = torch.from_numpy(ids[: len(ids) // window * window].astype(np.int64)).view(-1, window)
    batches: tuple[torch.Tensor, ...] = rows.split(max(1, tokens_at_once(device) // window))
    return batches


def loss_on_completions(model: Any, examples: Sequence[Example], pad_token_id: int) -> Loss:
    """The loss of `model`, in float32 without dropout, on the tokens of completions; the model's mode stays."""
    parts = parts_of_rows([len(example.ids) for example in examples], tokens_at_once(model.device))
    groups = ([examples[row] for row in rows] for rows in parts)
    return _loss(model, (map(torch.tensor, pad(group, pad_token_id)) for group in groups))


def _loss(model: Any, batches: Iterable[Iterable[torch.Tensor]]) -> Loss:
    """The loss on batches of ids (B, T) and labels (B, T), as training takes them."""
    nats, tokens = 0.0, 0
    with measuring(model):
        for ids, labels in batches:
            nats += float(summed_cross_entropy(model, ids.to(model.device), labels.to(model.device)))
            tokens += int((labels[:, 1:] != IGNORED).sum())
    return Loss(nats, tokens)


@contextmanager
def measuring(model: Any) -> Iterator[None]:
    """In this context `model` computes in float32, without dropout and gradients; its state is restored afterwards.

    accelerate replaces the forward method of a model by one in mixed precision, and never restores it.
    """
    was_training, prepared = model.training, model.__dict__.get("forward")
    original = model.__dict__.get("_original_forward")
    model.eval()
    if original is not None:
        model.forward = original
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        if original is not None:
            model.forward = prepared
