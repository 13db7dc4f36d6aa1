"""What a config and a file of weights must contain to become a model of Llama's kind."""

import re
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor

from edgelm.errors import ExportError
from edgelm_export.model.config_fields import check_activation, check_shares, check_sizes, config_of
from edgelm_export.model.stored_names import name_weights, without_wrappers

_TABLE, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_BUFFER = re.compile(r".*\.rotary_emb(_local)?\.inv_freq")
"""Buffers of old versions of transformers, which the config determines."""

_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings"),
)
_ROTARY_KINDS = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embeddings whose angles depend on the position alone. The others depend on the length of the text."""
_LAYER_KINDS = ("full_attention", "sliding_attention")
_MUST_BE = {  # fields that change what the model computes, and their only value that edgelm exports
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_bidirectional_attention": (False, None),
    "partial_rotary_factor": (1, None),
}


def read_config(
    fields: Mapping[str, Any], name: str, config_class: type[transformers.PretrainedConfig]
) -> transformers.PretrainedConfig:
    """The configuration that transformers reads from these fields.

    Args:
        fields: content of the checkpoint's ``config.json``.
        name: name of the checkpoint, for messages.
        config_class: of the family.

    Raises:
        ExportError: a size is no positive integer or does not fit another size, or a field has a value that edgelm
            does not export.
    """
    config, what = config_of(config_class, fields, name), f"config.json of {name!r}"
    check_sizes(config, (*_SIZES, *(() if getattr(config, "head_dim", None) is None else ("head_dim",))), name)
    check_shares(config, ("rms_norm_eps", "initializer_range", "attention_dropout"), name)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % groups:
        raise ExportError(f"{what}: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None and config.hidden_size % heads:
        raise ExportError(f"{what}: hidden_size {config.hidden_size} is not a multiple of num_attention_heads {heads}")
    if (head_dim or config.hidden_size // heads) % 2:
        raise ExportError(f"{what}: heads of {head_dim or config.hidden_size // heads} numbers have no two halves")
    check_activation(getattr(config, "hidden_activation", None) or config.hidden_act, name)
    for field, allowed in _MUST_BE.items():
        if (value := getattr(config, field, allowed[0])) not in allowed:
            raise ExportError(f"{what}: {field} is {value!r:.80}, which edgelm does not export")
    scaling = config.rope_scaling if isinstance(getattr(config, "rope_scaling", None), dict) else {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in _ROTARY_KINDS:
        raise ExportError(
            f"{what}: rope_scaling has the type {kind!r:.80}; edgelm exports types whose angles depend on the position "
            f"alone: {', '.join(_ROTARY_KINDS)}"
        )
    _check_windows(config, what)
    if type(config.pad_token_id) is not int or not 0 <= config.pad_token_id < config.vocab_size:
        config.pad_token_id = None  # training alone asks for it, and torch builds no table whose padding is outside it
    return config


def _check_windows(config: transformers.PretrainedConfig, what: str) -> None:
    """Refuse a window that is no number of tokens, and kinds of layers that see other tokens."""
    window = getattr(config, "sliding_window", None)
    if window is not None and not (type(window) is int and 1 <= window < 2**31):
        raise ExportError(f"{what}: sliding_window must be a positive integer or null, not {window!r:.80}")
    kinds = getattr(config, "layer_types", None) or []
    for kind in kinds:
        if kind not in _LAYER_KINDS:
            raise ExportError(f"{what}: layer_types has {kind!r:.80}; edgelm exports {', '.join(_LAYER_KINDS)}")
    if "sliding_attention" in kinds and window is None:
        raise ExportError(f"{what}: layer_types has 'sliding_attention', but there is no sliding_window")


def fit(
    weights: Mapping[str, Tensor],
    config: transformers.PretrainedConfig,
    name: str,
    model_class: type[transformers.PreTrainedModel],
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The weights under the names of `model_class`, exactly those that a model with `config` has.

    Args:
        weights: of the checkpoint's files.
        config: of the model; `read_config` made it.
        name: name of the checkpoint, for messages.
        model_class: the class of transformers with a language head.

    Returns:
        The weights without a tied head, and notes on weights that were left out.

    Raises:
        ExportError: a weight is missing, has a different shape, or is no floating-point tensor.
    """
    found = _renamed(weights, name)
    notes: tuple[str, ...] = ()
    if config.tie_word_embeddings and _HEAD in found:
        head = found.pop(_HEAD)
        table = found.setdefault(_TABLE, head)
        if table is not head and not (table.shape == head.shape and torch.equal(table, head)):
            notes += (f"left out {_HEAD!r}, which differs from the token table: config.json ties them",)
    layers = 1 + max((int(match[1]) for match in map(_LAYER.match, found) if match), default=-1)
    with torch.device("meta"):
        model = model_class(config)
    expected = {key: value.shape for key, value in model.named_parameters()}
    if config.tie_word_embeddings:
        expected.pop(_HEAD, None)
    if missing := [key for key in expected if key not in found]:
        count = config.num_hidden_layers
        kind = f" ({layers} layers, but config.json states num_hidden_layers {count})" if count > layers else ""
        raise ExportError(f"{name!r} lacks {name_weights(missing)}: it is incomplete{kind}")
    for key, shape in expected.items():
        value = found[key]
        if value.is_meta or not value.is_floating_point() or value.layout != torch.strided:
            raise ExportError(f"cannot load the weights of {name!r}: {key!r} is no plain floating-point tensor")
        if value.shape != shape:
            raise ExportError(
                f"cannot load the weights of {name!r}: {key!r} has the shape {tuple(value.shape)}, but config.json "
                f"makes it {tuple(shape)}"
            )
    if extra := sorted(key for key in found.keys() - expected.keys() if not _BUFFER.fullmatch(key)):
        notes += (f"left out {name_weights(extra)}, because {model_class.__name__} has no place for it",)
    return {key: found[key] for key in expected}, notes


def _renamed(weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The weights with the body under ``model.`` and the head at ``lm_head.weight``."""
    plain = without_wrappers(weights, name)
    anchor = "embed_tokens.weight"
    prefixes = [key.removesuffix(anchor) for key in plain if key == anchor or key.endswith(f".{anchor}")]
    if len(prefixes) > 1:
        raise ExportError(f"{name!r} contains {len(prefixes)} models; save one of them alone")
    body = prefixes[0] if prefixes else "model."
    outer = body.removesuffix("model.")
    return {
        "model." + key.removeprefix(body)
        if key.startswith(body) and not key.startswith(f"{outer}lm_head.")
        else key.removeprefix(outer): value
        for key, value in plain.items()
    }
