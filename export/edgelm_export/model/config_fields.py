"""Reads the config.json of every family, and checks the kinds of fields that every family has."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import transformers

from edgelm.errors import ExportError
from edgelm_export.model.activations import ACTIVATIONS

Config = TypeVar("Config", bound=transformers.PretrainedConfig)

_CALLER_FIELDS = frozenset(
    (
        *("model_type", "auto_map", "transformers_weights", "torch_dtype", "dtype", "use_bfloat16", "problem_type"),
        *("return_dict", "use_return_dict", "torchscript", "output_attentions", "output_hidden_states", "use_cache"),
        *(
            "id2label",
            "label2id",
            "num_labels",
            "attn_implementation",
            "_attn_implementation",
            "gradient_checkpointing",
        ),
        *("_attn_implementation_internal", "_attn_implementation_autoset", "name_or_path", "_name_or_path"),
    )
)
"""Fields of config.json that say how to call a model, or where its weights are, and nothing about the model itself."""


def config_of(config_class: type[Config], fields: Mapping[str, Any], name: str) -> Config:
    """The configuration that transformers reads from the `fields` of the checkpoint `name`; raises ExportError."""
    try:
        config: Config = config_class.from_dict({k: v for k, v in fields.items() if k not in _CALLER_FIELDS})
    except Exception as error:  # the fields may hold anything, and transformers raises whatever that leads to
        raise ExportError(f"cannot read config.json of {name!r}: {type(error).__name__}: {error}") from None
    return config


def check_sizes(config: transformers.PretrainedConfig, fields: Iterable[str], name: str) -> None:
    """Raise ExportError unless each of the `fields` is a positive integer."""
    for field in fields:
        value = getattr(config, field)
        if type(value) is not int or not 1 <= value < 2**31:
            raise ExportError(f"config.json of {name!r}: {field} must be a positive integer, not {value!r:.80}")


def check_shares(config: transformers.PretrainedConfig, fields: Iterable[str], name: str) -> None:
    """Raise ExportError unless each of the `fields` is a number from 0 to 1."""
    for field in fields:
        value = getattr(config, field)
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise ExportError(f"config.json of {name!r}: {field} must be a number from 0 to 1, not {value!r:.80}")


def check_activation(activation: object, name: str) -> None:
    """Raise ExportError unless the `activation` of the checkpoint `name` is one that edgelm exports."""
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ExportError(
            f"{name!r} uses the activation {activation!r:.80}, which transformers {transformers.__version__} does not "
            f"know; edgelm exports {', '.join(sorted(ACTIVATIONS))}"
        )
