"""What a student pays for differing from its teacher, and from the text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from edgelm_train.data.packing import IGNORED


@dataclass(frozen=True)
class DistillationWeights:
    """The weights of the three losses and the temperature of the first."""

    soft: float
    """Of the teacher's distribution."""
    hidden: float
    """Of the hidden states; 0 leaves them out."""
    hard: float
    """Of the text itself."""
    temperature: float


def soft_target_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor, temperature: float
) -> torch.Tensor:
    """KL divergence of the student from the teacher in nats, times T², over the tokens that are learned.

    Both distributions are softened by the temperature T; T² keeps the gradient's size (Hinton, Vinyals and Dean,
    "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, section 2).

    Args:
        student_logits: (B, T, V).
        teacher_logits: (B, T, V).
        labels: (B, T), as for the model itself: the logits of one position answer to the label of the next, and
            those of -100 are left out.
    """
    learned = labels[:, 1:] != IGNORED  # (B, T-1)
    student = functional.log_softmax(student_logits[:, :-1][learned].float() / temperature, dim=-1)  # (N, V)
    teacher = functional.log_softmax(teacher_logits[:, :-1][learned].float() / temperature, dim=-1)
    divergence = functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return divergence * temperature**2


def hidden_state_loss(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], projection: torch.nn.Module
) -> torch.Tensor:
    """One minus the cosine between hidden states, averaged over tokens and layers.

    The cosine is DistilBERT's (Sanh et al., arXiv 1910.01108). A student of another width is first taken to the
    teacher's by a learned matrix, and layers are paired evenly, as TinyBERT does (Jiao et al., arXiv 1909.10351).

    Args:
        student: the output of every layer, each (B, T, D).
        teacher: the output of every layer, each (B, T, D'); at least as many as the student has.
        projection: D to D'.
    """
    losses = []
    for layer, own in enumerate(student):
        taught = teacher[teacher_layer(layer, len(student), len(teacher))]
        losses.append(1 - functional.cosine_similarity(projection(own).float(), taught.float(), dim=-1).mean())
    return torch.stack(losses).mean()


def teacher_layer(layer: int, student_layers: int, teacher_layers: int) -> int:
    """Which of the teacher's layers a student's layer answers to: evenly spaced, the last to the last."""
    return (layer + 1) * teacher_layers // student_layers - 1


def distillation_loss(
    student: Any, teacher: Any, labels: torch.Tensor, projection: torch.nn.Module, weights: DistillationWeights
) -> torch.Tensor:
    """The weighted sum of the three.

    Args:
        student: a transformers output with ``loss``, ``logits`` and ``hidden_states``.
        teacher: another with the last two.
    """
    loss = weights.hard * student.loss + weights.soft * soft_target_loss(
        student.logits, teacher.logits, labels, weights.temperature
    )
    if weights.hidden:
        # The first hidden state is the embedding, no layer's output.
        loss = loss + weights.hidden * hidden_state_loss(
            student.hidden_states[1:], teacher.hidden_states[1:], projection
        )
    return loss
