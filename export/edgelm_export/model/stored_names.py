"""How checkpoints of every family name their weights, under whatever wrapper."""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from edgelm.errors import ExportError

_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
"""Parts of a name that DataParallel, torch.compile, FSDP, activation checkpointing and Fabric put in."""
_LOW_RANK = re.compile(r"\.(lora_\w+|base_layer)\.")


def without_wrappers(weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The weights of the checkpoint `name` under names without wrappers.

    Raises:
        ExportError: two weights have one name then, or a LoRA adapter was not merged.
    """
    plain: dict[str, Tensor] = {}
    for key, value in weights.items():
        short = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
        if short in plain:
            raise ExportError(f"{name!r} has two weights for {short!r}; keep one of them")
        if _LOW_RANK.search(f".{short}"):
            raise ExportError(
                f"{name!r} contains a LoRA adapter that was not merged ({short!r}); save it after peft's "
                "merge_and_unload(), or export its base with --adapter"
            )
        plain[short] = value
    return plain


def name_weights(names: Sequence[str]) -> str:
    """The number of these weights and the first of their names, for a message."""
    return f"the weight {names[0]!r}" if len(names) == 1 else f"{len(names)} weights, the first is {names[0]!r}"
