"""A student: a smaller GPT-2 that reads its teacher's tokens, new or cut out of the teacher."""

from typing import Any

import torch
import transformers

from edgelm_export.training.distillation_loss import teacher_layer


def student_from_layers(teacher: Any, layers: int) -> Any:
    """A copy of the teacher with only some of its layers, evenly spaced, as DistilBERT and DistilGPT2 begin.

    Sanh et al., arXiv 1910.01108, section 3: layers of the teacher are a better start than random weights.

    Args:
        teacher: a ``transformers.GPT2LMHeadModel``.
        layers: from 1 to the teacher's number.
    """
    config = transformers.GPT2Config.from_dict(teacher.config.to_dict() | {"n_layer": layers})
    config._attn_implementation = "eager"
    student = transformers.GPT2LMHeadModel(config)
    kept = {teacher_layer(layer, layers, teacher.config.n_layer): layer for layer in range(layers)}
    state = {}
    for name, value in teacher.state_dict().items():
        parts = name.split(".")
        if parts[1] != "h":
            state[name] = value
        elif int(parts[2]) in kept:
            state[".".join(["transformer", "h", str(kept[int(parts[2])]), *parts[3:]])] = value
    student.load_state_dict(state)
    return student.to(torch.float32)
