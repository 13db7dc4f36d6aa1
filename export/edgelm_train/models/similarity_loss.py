"""Texts as vectors, as the runtime makes them, and a loss that ranks the similarities of pairs as their scores.

Shapes: N texts, T tokens, D hidden size, P pairs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgelm_train.data.parts import parts_of_rows
from edgelm_train.data.similarity import Pooling
from edgelm_train.models.completion_loss import tokens_at_once

SCALE = 20.0
"""The inverse temperature of `cosent_loss`, as in sentence-transformers."""


def pooled_states(model: Any, ids: torch.Tensor, lengths: Sequence[int], pooling: Pooling) -> torch.Tensor:
    """The vectors (N, D) of texts: their last hidden states pooled as by `edgelm.scoring.token_scores.embed`.

    Args:
        model: a model of transformers with a language head, or peft's model around it.
        ids: (N, T), padded on the right, where causal attention never looks.
        lengths: of the texts, in tokens.
        pooling: "mean" over the tokens of a text, or its "last" token.
    """
    parts = parts_of_rows(lengths, tokens_at_once(ids.device))
    vectors = []
    for rows in parts:
        hidden = last_hidden_states(model, ids[rows, : lengths[rows[0]]]).float()  # (R, T, D)
        ends = torch.tensor([lengths[row] for row in rows], device=ids.device)
        if pooling == "last":
            vectors.append(hidden[torch.arange(len(rows), device=ids.device), ends - 1])
        else:
            inside = torch.arange(hidden.shape[1], device=ids.device)[None] < ends[:, None]
            vectors.append((hidden * inside[..., None]).sum(dim=1) / ends[:, None])
    order = torch.tensor([row for rows in parts for row in rows], device=ids.device)
    return torch.cat(vectors)[order.argsort()]


def last_hidden_states(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What the language head gets of `ids` (N, T), the output of the final norm: (N, T, D). It computes no logits."""
    seen: list[torch.Tensor] = []

    def keep(head: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        seen.append(arguments[0])
        return (arguments[0][:, :0],)

    hook = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        hook.remove()
    return seen[0]


def pair_similarities(model: Any, batch: Mapping[str, torch.Tensor], pooling: Pooling) -> torch.Tensor:
    """The cosine (P,) of the vectors of each pair; `batch` is of `edgelm_train.run.pair_data.pair_batch`."""
    vectors = pooled_states(model, batch["input_ids"], batch["lengths"].tolist(), pooling)
    first, second = vectors.chunk(2)
    return torch.nn.functional.cosine_similarity(first, second)


def cosent_loss(similarities: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """log(1 + the sum of exp(20·(s_j - s_i)) over all pairs i of texts with a higher score than pairs j).

    `similarities` s and `scores` are (P,). The loss is 0 where the similarities rank the pairs as their scores do, by
    a wide margin (CoSENT: Su 2022, kexue.fm/archives/8847; CoSENTLoss in sentence-transformers).
    """
    scaled = SCALE * similarities
    wrong = (scaled[None, :] - scaled[:, None])[scores[:, None] > scores[None, :]]
    return torch.logsumexp(torch.cat([scaled.new_zeros(1), wrong]), dim=0)


def spearman(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Spearman's correlation: that of the ranks, where equal numbers share their mean rank; 0 where all are equal."""
    one, other = (_ranks(np.asarray(values, np.float64)) for values in (first, second))
    return float(np.corrcoef(one, other)[0, 1]) if np.ptp(one) and np.ptp(other) else 0.0


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    ranks: npt.NDArray[np.float64] = (np.cumsum(count) - (count - 1) / 2)[place]
    return ranks
