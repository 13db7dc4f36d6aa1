"""The loss of a student: its distance from its teacher's distribution and hidden states, and its loss on the text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from edgelm_train.data.packing import IGNORED


@dataclass(frozen=True)
class DistillationWeights:
    """Weights of `soft_target_loss`, of `hidden_state_loss` and of the cross entropy of the text, in this order.

    Hidden states are not computed where their weight is 0. The temperature is that of `soft_target_loss`.
    """

    soft: float
    hidden: float
    hard: float
    temperature: float


def soft_target_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Mean KL divergence of student from teacher over the learned tokens, in nats, times the squared temperature.

    The temperature softens both distributions. Its square keeps the size of the gradient (Hinton, Vinyals and Dean,
    "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, section 2).

    Logits are (B, T, V). `labels` (B, T) are as the model takes them: the logits of a position predict the label of the
    next position, and a label of -100 is left out.
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

    The cosine is DistilBERT's (Sanh et al., arXiv 1910.01108). As in TinyBERT (Jiao et al., arXiv 1909.10351), layers
    are paired evenly, and a learned matrix projects the student's states to the teacher's width where the two differ.
    Each state is the output of a layer, (B, T, D) or (B, T, D'); `projection` maps D to D'. `teacher` has at least as
    many states as `student`.
    """
    losses = []
    for layer, states in enumerate(student):
        target = teacher[teacher_layer(layer, len(student), len(teacher))]
        losses.append(1 - functional.cosine_similarity(projection(states).float(), target.float(), dim=-1).mean())
    return torch.stack(losses).mean()


def teacher_layer(layer: int, student_layers: int, teacher_layers: int) -> int:
    """The teacher's layer that is paired with the student's `layer`: evenly spaced, the last with the last."""
    return (layer + 1) * teacher_layers // student_layers - 1


def distillation_loss(
    student: Any, teacher: Any, labels: torch.Tensor, projection: torch.nn.Module, weights: DistillationWeights
) -> torch.Tensor:
    """The weighted sum of the three losses.

    `student` and `teacher` are outputs of transformers with ``logits`` and ``hidden_states``; that of the student has
    the cross entropy as its ``loss``. `labels` is as for `soft_target_loss`, `projection` as for `hidden_state_loss`.
    """
    soft = soft_target_loss(student.logits, teacher.logits, labels, weights.temperature)
    loss = weights.hard * student.loss + weights.soft * soft
    if weights.hidden:
        # The first hidden state is the embedding, which no layer has computed.
        hidden = hidden_state_loss(student.hidden_states[1:], teacher.hidden_states[1:], projection)
        loss = loss + weights.hidden * hidden
    return loss
