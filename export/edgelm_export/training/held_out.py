"""How well a model predicts text it has not seen: the loss in windows of a packed stream."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edgelm_export.training.packing import Ids

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
    was_training = model.training
    model.eval()
    rows = torch.from_numpy(ids[: len(ids) // window * window].astype(np.int64)).view(-1, window)
    nats, tokens = 0.0, 0
    with torch.no_grad():
        for batch in rows.split(max(1, _TOKENS_AT_ONCE // window)):
            batch = batch.to(model.device)
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()  # (B, W - 1, V)
            labels = batch[:, 1:]
            nats += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
            tokens += labels.numel()
    model.train(was_training)
    return Loss(nats, tokens)
