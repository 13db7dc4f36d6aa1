"""A student: a smaller GPT-2 that reads its teacher's tokens, new or cut out of the teacher, and learns from it."""

from typing import Any

import torch
import transformers

from edgelm.errors import TrainingError
from edgelm_train.models.distillation_loss import DistillationWeights, distillation_loss, teacher_layer
from edgelm_train.models.sizes import NO_DROPOUT, named_config


def new_student(teacher: Any, size: str, seed: int) -> Any:
    """A student with random weights.

    Args:
        teacher: a ``transformers.GPT2LMHeadModel``; the student has its vocabulary.
        size: a name in `edgelm_train.models.sizes.SIZES`, or the path of a GPT-2 config.json.

    Raises:
        TrainingError: there is no such size, or it has more layers than the teacher.
    """
    config = named_config(size)
    if config.n_layer > teacher.config.n_layer:
        raise TrainingError(
            f"a student has at most its teacher's {teacher.config.n_layer} layers, {size} has {config.n_layer}: give a "
            "smaller size"
        )
    for name in ("vocab_size", "bos_token_id", "eos_token_id"):
        setattr(config, name, getattr(teacher.config, name))
    config.n_positions = min(config.n_positions, teacher.config.n_positions)
    torch.manual_seed(seed)
    return transformers.GPT2LMHeadModel._from_config(config)


def student_from_layers(teacher: Any, layers: int) -> Any:
    """A copy of the teacher with only some of its layers, evenly spaced, as DistilBERT and DistilGPT2 begin.

    Sanh et al., arXiv 1910.01108, section 3: layers of the teacher are a better start than random weights.

    Args:
        teacher: a ``transformers.GPT2LMHeadModel``.
        layers: from 1 to the teacher's number.
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
    """A student whose loss, where labels are given, is that of distillation; otherwise a GPT-2 like any other.

    Its state has one matrix more: the projection of hidden states, which is learned with it and dropped at the end.
    """

    @classmethod
    def of(cls, student: Any, teacher: Any, weights: DistillationWeights) -> "Apprentice":
        """The `student`'s weights, copied, behind the loss that `teacher`, which must be frozen, gives."""
        config = transformers.GPT2Config.from_dict(student.config.to_dict())
        apprentice: Apprentice = cls._from_config(config)
        apprentice.load_state_dict(student.state_dict())
        same = config.n_embd == teacher.config.n_embd
        apprentice.projection = (
            torch.nn.Identity() if same else torch.nn.Linear(config.n_embd, teacher.config.n_embd, bias=False)
        )
        # In a tuple, so that torch does not take the teacher for a part of the student.
        apprentice._teacher, apprentice._weights = (teacher,), weights
        return apprentice

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, use_cache: bool | None = None
    ) -> Any:
        """Logits (B, T, V), and the loss where `labels` (B, T) are given."""
        if labels is None:
            return super().forward(input_ids=input_ids, use_cache=use_cache)
        hidden = self._weights.hidden > 0
        (teacher,) = self._teacher
        with torch.no_grad():
            taught = teacher(input_ids=input_ids, use_cache=False, output_hidden_states=hidden)
        own = super().forward(input_ids=input_ids, labels=labels, use_cache=False, output_hidden_states=hidden)
        loss = distillation_loss(own, taught, labels, self.projection, self._weights)
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=own.logits)

    def student(self) -> Any:
        """A plain GPT-2 with what was learned."""
        plain = transformers.GPT2LMHeadModel._from_config(transformers.GPT2Config.from_dict(self.config.to_dict()))
        state = self.state_dict()
        plain.load_state_dict({name: value for name, value in state.items() if not name.startswith("projection.")})
        return plain
