"""The families of architectures that edgelm exports, by the ``model_type`` of their configs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import transformers
from torch import Tensor

from edgelm.bundle.manifest import Architecture
from edgelm_export.model import gemma3, gpt2, gpt2_checkpoint, granite, llama, llama_checkpoint
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
    shorten: Callable[[transformers.PreTrainedModel, int], None]
    context_field: str
    """Name of the field of the config that states the context."""


def _like_llama(
    title: str,
    config_class: type[transformers.PretrainedConfig],
    model_class: type[transformers.PreTrainedModel],
    collect: Callable[[transformers.PreTrainedModel], DecoderWeights] = llama.collect,
) -> Family:
    return Family(
        title,
        model_class,
        partial(llama_checkpoint.read_config, config_class=config_class),
        partial(llama_checkpoint.fit, model_class=model_class),
        llama.prepare,
        llama.describe,
        collect,
        llama.shorten,
        llama.CONTEXT_FIELD,
    )


FAMILIES = {
    "gpt2": Family(
        "GPT-2",
        transformers.GPT2LMHeadModel,
        gpt2_checkpoint.read_config,
        gpt2_checkpoint.fit,
        gpt2.prepare,
        gpt2.describe,
        gpt2.collect,
        gpt2.shorten,
        gpt2.CONTEXT_FIELD,
    ),
    "llama": _like_llama("Llama", transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": _like_llama("Mistral", transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": _like_llama("Qwen2", transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": _like_llama("Qwen3", transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "granite": _like_llama("Granite", transformers.GraniteConfig, transformers.GraniteForCausalLM, granite.collect),
    "gemma3_text": _like_llama(
        "Gemma 3", transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM, gemma3.collect
    ),
}


def describe(model: transformers.PreTrainedModel) -> Architecture:
    """The sizes of a loaded model of any family."""
    return FAMILIES[model.config.model_type].describe(model.config)


def collect_weights(model: transformers.PreTrainedModel) -> DecoderWeights:
    """Copy the weights out of a loaded model of any family."""
    return FAMILIES[model.config.model_type].collect(model)
