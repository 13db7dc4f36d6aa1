"""The families of architectures that edgelm exports, by the ``model_type`` of their configs.

A new family is a file beside `gpt2.py` and an entry of `FAMILIES`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from torch import Tensor

from edgelm.bundle.manifest import Architecture
from edgelm_export.model import gpt2, gpt2_checkpoint
from edgelm_export.model.decoder import DecoderWeights


@dataclass(frozen=True)
class Family:
    """What the build side asks of a family; `gpt2.py` and `gpt2_checkpoint.py` document each function."""

    title: str
    """Name of the family, for messages."""
    model_class: type[transformers.PreTrainedModel]
    """The class of transformers that loads a checkpoint with its language head."""
    read_config: Callable[[Mapping[str, Any], str], transformers.PretrainedConfig]
    fit: Callable[[Mapping[str, Tensor], transformers.PretrainedConfig, str], tuple[dict[str, Tensor], tuple[str, ...]]]
    prepare: Callable[[transformers.PreTrainedModel], None]
    describe: Callable[[transformers.PretrainedConfig], Architecture]
    collect: Callable[[transformers.PreTrainedModel], DecoderWeights]


FAMILIES = {
    "gpt2": Family(
        "GPT-2",
        transformers.GPT2LMHeadModel,
        gpt2_checkpoint.read_config,
        gpt2_checkpoint.fit,
        gpt2.prepare,
        gpt2.describe,
        gpt2.collect,
    ),
}


def describe(model: transformers.PreTrainedModel) -> Architecture:
    """The sizes of a loaded model of any family."""
    return FAMILIES[model.config.model_type].describe(model.config)


def collect_weights(model: transformers.PreTrainedModel) -> DecoderWeights:
    """Copy the weights out of a loaded model of any family."""
    return FAMILIES[model.config.model_type].collect(model)
