"""What a file of weights must contain to become a GPT2LMHeadModel, under whatever names its writer stored them."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor

from edgelm.errors import ExportError
from edgelm_export.model.config_fields import check_activation, check_shares, check_sizes, config_of
from edgelm_export.model.stored_names import name_weights, without_wrappers

_BODY, _TABLE, _HEAD = "transformer.", "transformer.wte.weight", "lm_head.weight"
_ANCHORS = ("wpe.weight", "ln_f.weight", "wte.weight")
"""Weights that stand directly in a body. The first that a file has tells the prefix of its body."""
_MASK = re.compile(r"transformer\.h\.\d+\.(attn|crossattention)\.(bias|masked_bias)")
"""Buffers of old versions of transformers, which hold no weight."""
_LAYER = re.compile(r"transformer\.h\.(\d+)\.")
_TASK_CLASSES = ("GPT2ForSequenceClassification", "GPT2ForTokenClassification", "GPT2ForQuestionAnswering")
_TASK_HEADS = re.compile(r"(score|classifier|qa_outputs)\.(weight|bias)")

_COUNTS = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
_SHARES = ("layer_norm_epsilon", "resid_pdrop", "embd_pdrop", "attn_pdrop", "initializer_range")


def read_config(fields: Mapping[str, Any], name: str) -> transformers.GPT2Config:
    """The configuration that transformers reads from these fields.

    Args:
        fields: content of the checkpoint's ``config.json``.
        name: name of the checkpoint, for messages.

    Raises:
        ExportError: a size is no positive integer or does not fit another size, or the model has an unknown
            activation, no layers, or cross attention.
    """
    config = config_of(transformers.GPT2Config, fields, name)
    check_activation(config.activation_function, name)
    if config.n_layer == 0:
        raise ExportError(f"{name!r} has no layers (n_layer 0): there is nothing to export")
    if config.add_cross_attention:
        raise ExportError(f"{name!r} has cross attention (add_cross_attention), which edgelm does not export")
    check_sizes(config, (*_COUNTS, *(() if config.n_inner is None else ("n_inner",))), name)
    check_shares(config, _SHARES, name)
    if config.n_embd % config.n_head:
        raise ExportError(
            f"config.json of {name!r}: n_embd {config.n_embd} is not a multiple of n_head {config.n_head}"
        )
    return config


def fit(
    weights: Mapping[str, Tensor], config: transformers.GPT2Config, name: str
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The weights under the names of GPT2LMHeadModel, exactly those that a model with `config` has.

    Args:
        weights: of the checkpoint's files.
        config: of the model; `read_config` made it.
        name: name of the checkpoint, for messages.

    Returns:
        The weights, of which a tied head is none, and notes on weights that were left out.

    Raises:
        ExportError: a weight is missing, has a different shape, or is no floating-point tensor; or the weights are
            those of a model without a language head, or of an adapter that was not merged.
    """
    found = _renamed(weights, name)
    if crossed := [key for key in found if ".crossattention." in key and not _MASK.fullmatch(key)]:
        raise ExportError(
            f"{name!r} has cross attention ({crossed[0]!r}): it is the decoder of a larger model, which edgelm does "
            "not export"
        )
    _refuse_task_heads(found, config, name)
    notes = _tie(found, config)
    layers = 1 + max((int(match[1]) for match in map(_LAYER.match, found) if match), default=-1)
    expected = _expected_shapes(config, min(config.n_layer, layers + 1), name)
    if missing := [key for key in expected if key not in found]:
        kind = f" ({layers} layers, but config.json states n_layer {config.n_layer})" if config.n_layer > layers else ""
        raise ExportError(f"{name!r} lacks {name_weights(missing)}: it is incomplete{kind}")
    for key, shape in expected.items():
        if trouble := _trouble(key, found[key], shape, config):
            raise ExportError(f"cannot load the weights of {name!r}: {trouble}")
    if layers > config.n_layer:
        notes += (
            f"left out {layers - config.n_layer} of {layers} layers: config.json states n_layer {config.n_layer}",
        )
    extra = [
        key
        for key in found.keys() - expected.keys()
        if not _MASK.fullmatch(key) and not ((layer := _LAYER.match(key)) and int(layer[1]) >= config.n_layer)
    ]
    if extra:
        notes += (f"left out {name_weights(sorted(extra))}, because GPT2LMHeadModel has no place for it",)
    return {key: found[key] for key in expected}, notes


def _renamed(weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The weights with the body under ``transformer.`` and the head at ``lm_head.weight``."""
    plain = without_wrappers(weights, name)
    body = _body(plain, name)
    if body is None:
        return plain
    outer = body.removesuffix(_BODY)
    renamed = {}
    for key, value in plain.items():
        inside = key.removeprefix(body)
        if key.startswith(body) and not (outer == body and inside.startswith("lm_head.")):
            renamed[_BODY + inside] = value
        else:
            renamed[key.removeprefix(outer)] = value
    # A body that its owner calls "gpt2." stands beside the head.
    renamed.setdefault(_HEAD, plain.get(_HEAD, torch.empty(0)))
    if not renamed[_HEAD].numel():
        del renamed[_HEAD]
    return renamed


def _body(keys: Iterable[str], name: str) -> str | None:
    """The prefix of the names in the only body; None where there is no body."""
    for anchor in _ANCHORS:
        bodies = sorted(key.removesuffix(anchor) for key in keys if key == anchor or key.endswith(f".{anchor}"))
        if usual := [prefix for prefix in (_BODY, "") if prefix in bodies]:
            return usual[0]
        if len(bodies) > 1:
            raise ExportError(
                f"{name!r} contains {len(bodies)} models ({', '.join(map(repr, bodies[:4]))}); save one of them alone"
            )
        if bodies:
            return bodies[0]
    return None


def _refuse_task_heads(found: Mapping[str, Tensor], config: transformers.GPT2Config, name: str) -> None:
    """Refuse a classifier: transformers ties a language head to its body, but nobody trained it to generate."""
    if _HEAD in found:
        return
    stated = config.architectures if isinstance(config.architectures, list) else []
    if task := [kind for kind in stated if kind in _TASK_CLASSES]:
        raise ExportError(f"{name!r} is a {task[0]}, which generates no text; export needs a GPT2LMHeadModel")
    if heads := [key for key in found if _TASK_HEADS.fullmatch(key)]:
        raise ExportError(
            f"{name!r} has the head of a classifier ({heads[0]!r}) and no language head (lm_head.weight), so it "
            "generates no text; export needs a GPT2LMHeadModel"
        )


def _tie(found: dict[str, Tensor], config: transformers.GPT2Config) -> tuple[str, ...]:
    """Reduce a tied pair to the token table. Returns a note where the head was another matrix."""
    if not config.tie_word_embeddings or _HEAD not in found:
        return ()
    head = found.pop(_HEAD)
    table = found.setdefault(_TABLE, head)
    if table is head or (table.shape == head.shape and (table.is_meta or head.is_meta or torch.equal(table, head))):
        return ()
    return (f"left out {_HEAD!r}, which differs from the token table: config.json ties them (tie_word_embeddings)",)


def _expected_shapes(config: transformers.GPT2Config, layers: int, name: str) -> dict[str, torch.Size]:
    """The weights that a model with this config has in its first layers, without a tied head, in the model's order."""
    pruned = {layer: heads for layer, heads in config.pruned_heads.items() if int(layer) < layers}
    part = transformers.GPT2Config.from_dict(config.to_dict() | {"n_layer": layers, "pruned_heads": pruned})
    # Pruning heads and xielu read numbers while the model is built, and the meta device holds no numbers.
    device = "cpu" if pruned or part.activation_function == "xielu" else "meta"
    try:
        with torch.device(device):
            model = transformers.GPT2LMHeadModel(part)
    except Exception as error:  # torch and transformers each raise their own kinds
        raise ExportError(f"transformers cannot make a model from config.json of {name!r}: {error}") from None
    shapes = {key: value.shape for key, value in model.named_parameters()}
    if config.tie_word_embeddings:
        shapes.pop(_HEAD, None)
    return shapes


def _trouble(key: str, value: Tensor, shape: torch.Size, config: transformers.GPT2Config) -> str | None:
    """What is wrong with a weight, and what to do about it."""
    if value.is_meta:
        return f"{key!r} is a meta tensor, which has a shape but no content; save the model again from memory"
    if not value.numel():
        return f"{key!r} is empty, as DeepSpeed's ZeRO stage 3 leaves it; convert its checkpoint with zero_to_fp32.py"
    if not value.is_floating_point() or value.layout != torch.strided:
        return f"{key!r} has the type {value.dtype}, layout {value.layout}; save the model in float32"
    if value.shape == shape:
        return None
    fact = f"{key!r} has the shape {tuple(value.shape)}, but config.json makes it {tuple(shape)}"
    if value.ndim != len(shape):
        return fact
    if value.T.shape == shape and value.shape[0] != value.shape[1]:
        return f"{fact}: the matrix is transposed, as in nanoGPT; convert it to the layout of transformers"
    rows = {"transformer.wpe.weight": "n_positions", _TABLE: "vocab_size", _HEAD: "vocab_size"}.get(key)
    if rows and value.shape[1:] == shape[1:]:
        return f"{fact}; set {rows} to {value.shape[0]} in config.json"
    if rows:
        return f"{fact}; set n_embd to {value.shape[1]} in config.json"
    if key.endswith("mlp.c_fc.weight") and value.shape[0] == config.n_embd:
        return f"{fact}; set n_inner to {value.shape[1]} in config.json"
    return f"{fact}; these weights belong to another config.json"
