"""The cross entropy of a model on the tokens that are learned. No logits are computed where nothing is learned."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from edgelm_train.data.packing import IGNORED
from edgelm_train.data.parts import parts_of_rows

_TOKENS_AT_ONCE = {"cpu": 1024, "cuda": 16384}
"""More tokens at once need more memory."""


def losses_in_parts(model: Any, batch: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    """Losses whose sum is the mean cross entropy of the learned tokens of a batch, in nats.

    A backward pass of each before the next is computed needs the memory of one part. `batch` has "input_ids" and
    "labels" (B, T), as `learned_logits` takes them; what follows the last label of a row is padding.
    """
    learned = int((batch["labels"][:, 1:] != IGNORED).sum())
    for ids, labels in _parts(batch["input_ids"], batch["labels"]):
        yield summed_cross_entropy(model, ids, labels) / learned


def summed_cross_entropy(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The sum of the cross entropies of the learned tokens, in nats. The arguments are those of `learned_logits`."""
    logits, targets = learned_logits(model, ids, labels)
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")


def learned_logits(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, V) that predict the N learned tokens, and these tokens (N,).

    Args:
        model: a model of transformers with a language head, or peft's model around it.
        ids: (B, T), padded on the right, where causal attention never looks.
        labels: (B, T), -100 where a token is not learned. The first token of a row never is.
    """
    learned = labels[:, 1:] != IGNORED  # (B, T - 1)

    def pick(head: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (arguments[0][:, :-1][learned][None],)  # (1, N, D) out of (B, T, D)

    hook = model.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        logits = model(input_ids=ids, use_cache=False).logits[0]
    finally:
        hook.remove()
    return logits, labels[:, 1:][learned]


def tokens_at_once(device: torch.device) -> int:
    """How many tokens are computed at once on `device`, with their padding."""
    return _TOKENS_AT_ONCE[device.type]


def _parts(ids: torch.Tensor, labels: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    places = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    lengths = ((labels != IGNORED) * places).amax(dim=1).tolist()
    for rows in parts_of_rows(lengths, tokens_at_once(ids.device)):
        yield ids[rows, : lengths[rows[0]]], labels[rows, : lengths[rows[0]]]
