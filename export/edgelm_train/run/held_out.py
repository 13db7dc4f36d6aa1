"""How well a model predicts text it has not seen: the loss in windows of a packed stream."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edgelm_train.data.packing import Ids

_TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class Loss:
    """Cross entropy of one text."""

    nats: float
    """Summed over all predicted tokens."""
    tokens: int
    """How many were predicted."""

    @property
    def per_token(self) -> float:
        """Mean cross entropy in nats."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Its exponential."""
        return float(np.exp(self.per_token))


def loss_in_windows(model: Any, ids: Ids, window: int) -> Loss:
    """The loss of `model`, float32 and without dropout, on a packed stream cut every `window` tokens.

    A window has no tokens before it to look at, so its first token is predicted by nothing and does not count; nor do
    the tokens left over after the last whole window. The model's mode, and torch's random state, stay as they are.
    `ids` must have a whole window.
    """
    rows = torch.from_numpy(ids[: len(ids) // window * window].astype(np.int64)).view(-1, window)
    nats, tokens = 0.0, 0
    with measuring(model):
        for batch in rows.split(max(1, _TOKENS_AT_ONCE // window)):
            batch = batch.to(model.device)
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()  # (B, W - 1, V)
            labels = batch[:, 1:]
            nats += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
            tokens += labels.numel()
    return Loss(nats, tokens)


@contextmanager
def measuring(model: Any) -> Iterator[None]:
    """While this runs, `model` is in float32, without dropout and without gradients; then it is as it was.

    accelerate puts mixed precision into the forward of the model it prepares, for good.
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
