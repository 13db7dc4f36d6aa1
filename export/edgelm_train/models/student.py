"""A student: a smaller GPT-2 with its teacher's tokens, either new or cut out of the teacher, that learns from it."""

from typing import Any

import torch
import transformers

from edgelm.errors import TrainingError
from edgelm_train.models.distillation_loss import DistillationWeights, distillation_loss, teacher_layer
from edgelm_train.models.sizes import NO_DROPOUT, named_config


def new_student(teacher: Any, size: str, seed: int) -> Any:
    """A student with random weights and with the vocabulary of `teacher`, a ``transformers.GPT2LMHeadModel``.

    Its shape is that of `size`, as for `named_config`, with at most the teacher's context.

    Raises:
        TrainingError: there is no such size, or the student would have more layers than the teacher.
    """
    config = named_config(size)
    if config.n_layer > teacher.config.n_layer:
        layers = f"{teacher.config.n_layer} layers, {size} has {config.n_layer}"
        raise TrainingError(f"a student has at most its teacher's {layers}: give a smaller size")
    for name in ("vocab_size", "bos_token_id", "eos_token_id"):
        setattr(config, name, getattr(teacher.config, name))
    config.n_positions = min(config.n_positions, teacher.config.n_positions)
    torch.manual_seed(seed)
    return transformers.GPT2LMHeadModel._from_config(config)


def student_from_layers(teacher: Any, layers: int) -> Any:
    """A copy of `layers` evenly spaced layers of `teacher`, a ``transformers.GPT2LMHeadModel``.

    It is the start of DistilBERT and DistilGPT2, and better than random weights (Sanh et al., arXiv 1910.01108,
    section 3).
    """
    config = transformers.GPT2Config.from_dict(teacher.config.to_dict() | NO_DROPOUT | {"n_layer": layers})
    student = transformers.GPT2LMHeadModel._from_config(config)
    kept = {teacher_layer(layer, layers, teacher.config.n_layer): layer for layer in range(layers)}
    state = {}
    for name, value in teacher.state_dict().items():
        parts = name.split(".")
        if parts[1] != "h":
            state[name] = value
        elif int(parts[2]) in kept:
            state[".".join(["transformer", "h", str(kept[int(parts[2])]), *parts[3:]])] = value
    student.load_state_dict(state)
    return student


class Apprentice(transformers.GPT2LMHeadModel):  # type: ignore[misc]
    """A GPT-2 whose loss is the loss of distillation, where labels are given.

    Its state has one matrix more than a GPT-2's: the projection of hidden states, which `student` drops.
    """

    @classmethod
    def of(cls, student: Any, teacher: Any, weights: DistillationWeights) -> "Apprentice":
        """An apprentice with a copy of `student`'s weights; `teacher` must be frozen."""
        config = transformers.GPT2Config.from_dict(student.config.to_dict())
        apprentice: Apprentice = cls._from_config(config)
        apprentice.load_state_dict(student.state_dict())
        same_width = config.n_embd == teacher.config.n_embd
        apprentice.projection = (
            torch.nn.Identity() if same_width else torch.nn.Linear(config.n_embd, teacher.config.n_embd, bias=False)
        )
        # The tuple hides the teacher from torch, which would make it a part of the student.
        apprentice._teacher, apprentice._weights = (teacher,), weights
        return apprentice

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, use_cache: bool | None = None
    ) -> Any:
        """Logits (B, T, V) for `input_ids` (B, T), and the loss where `labels` (B, T) are given."""
        if labels is None:
            return super().forward(input_ids=input_ids, use_cache=use_cache)
        hidden = self._weights.hidden > 0
        (teacher,) = self._teacher
        with torch.no_grad():
            target = teacher(input_ids=input_ids, use_cache=False, output_hidden_states=hidden)
        output = super().forward(input_ids=input_ids, labels=labels, use_cache=False, output_hidden_states=hidden)
        loss = distillation_loss(output, target, labels, self.projection, self._weights)
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=output.logits)

    def student(self) -> Any:
        """A plain GPT-2 with the learned weights."""
        plain = transformers.GPT2LMHeadModel._from_config(transformers.GPT2Config.from_dict(self.config.to_dict()))
        state = self.state_dict()
        plain.load_state_dict({name: value for name, value in state.items() if not name.startswith("projection.")})
        return plain
