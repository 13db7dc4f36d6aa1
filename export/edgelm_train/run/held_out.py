"""The loss of a model on held-out data: on windows of a packed stream, or on the completions of examples."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edgelm_train.data.examples import Example, pad
from edgelm_train.data.packing import IGNORED, Ids

_TOKENS_AT_ONCE = 4096
_ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class Loss:
    """Cross entropy of a text."""

    nats: float
    """Sum over all predicted tokens."""
    tokens: int
    """Number of predicted tokens."""

    @property
    def per_token(self) -> float:
        """Mean cross entropy of a token, in nats."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Exponential of the mean cross entropy."""
        return float(np.exp(self.per_token))


def loss_in_windows(model: Any, ids: Ids, window: int) -> Loss:
    """The loss of `model`, in float32 without dropout, on a packed stream that is cut into windows.

    The first token of a window does not count, because no token predicts it. Nor do the tokens after the last whole
    window. The mode of the model and torch's random state stay as they are.

    Args:
        model: a causal language model.
        ids: the stream (T,); it fills at least one window.
        window: length of a window, in tokens.
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


def loss_on_completions(model: Any, examples: Sequence[Example], pad_token_id: int) -> Loss:
    """The loss of `model`, in float32 without dropout, on the tokens of completions; its mode stays as it is."""
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


@contextmanager
def measuring(model: Any) -> Iterator[None]:
    """In this context `model` is in float32, without dropout and without gradients; afterwards it is as before.

    accelerate replaces the forward of a model that it prepares by one in mixed precision, and never restores it.
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
