"""Llama, and the families whose modules have the same names: Mistral, Qwen2 and Qwen3.

Shapes: D hidden size, H query heads, G key-value heads, h head dim of the source, p padded head dim, F inner size,
C context.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
import transformers

from edgelm.bundle.manifest import Architecture
from edgelm.bundle.operators import PADDING_TOKENS
from edgelm_export.model.activations import collect_activation, widen_activation
from edgelm_export.model.decoder import Array, DecoderWeights, Layer, Linear, Norm, Rotary, Table

CONTEXT_FIELD = "max_position_embeddings"

CollectNorm: TypeAlias = Callable[[torch.nn.Module], Norm]
"""Makes a `Norm` of a family's module."""

_HEAD_DIM_MULTIPLE = 16
"""GroupQueryAttention turns heads whose size is a multiple of this number; zeros fill the rest."""


def prepare(model: transformers.PreTrainedModel) -> None:
    """Change a loaded model into one that ONNX can compute."""
    for block in model.model.layers:
        widen_activation(block.mlp.act_fn)


def shorten(model: transformers.PreTrainedModel, context_length: int) -> None:
    """Give a model a shorter context. Its rotary embedding was made already, and does not change."""
    model.config.max_position_embeddings = context_length


def describe(config: transformers.PretrainedConfig) -> Architecture:
    """The sizes of a model with this config."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    padded = -(-head_dim // _HEAD_DIM_MULTIPLE) * _HEAD_DIM_MULTIPLE
    return Architecture(
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=padded,
        source_head_dim=head_dim,
        cache_values_per_token=2 * config.num_hidden_layers * kv_heads * padded,
        hidden_size=config.hidden_size,
        widest_activation=max(config.hidden_size, (heads + 2 * kv_heads) * padded, 2 * config.intermediate_size),
        context_length=config.max_position_embeddings,
        vocab_size=config.vocab_size,
    )


def collect(model: transformers.PreTrainedModel) -> DecoderWeights:
    """Copy the weights out of a model."""
    sizes = describe(model.config)
    rotary = collect_rotary("rotary", model.model.rotary_emb, sizes)
    layers = tuple(
        collect_layer(f"model.layers.{index}", block, model.config, sizes, rotary, collect_norm)
        for index, block in enumerate(model.model.layers)
    )
    return collect_around(model, layers, collect_norm)


def collect_around(model: transformers.PreTrainedModel, layers: tuple[Layer, ...], norm: CollectNorm) -> DecoderWeights:
    """The weights of a model whose `layers` are collected already: they, the tables and the final norm."""
    tokens, head = model.model.embed_tokens.weight, model.lm_head.weight
    return DecoderWeights(
        model_type=model.config.model_type,
        architecture=describe(model.config),
        token_table=Table("model.embed_tokens.weight", _array(tokens)),
        position_table=None,
        layers=layers,
        final_norm=norm(model.model.norm),
        head=None if head is tokens else Table("lm_head.weight", _array(head)),
    )


def collect_layer(
    prefix: str,
    block: torch.nn.Module,
    config: transformers.PretrainedConfig,
    sizes: Architecture,
    rotary: Rotary,
    norm: CollectNorm,
) -> Layer:
    """The layer that the module `block`, called `prefix` in the checkpoint, computes; `norm` collects its norms."""
    attention, mlp = block.self_attn, block.mlp

    def norm_of_heads(name: str) -> Norm | None:
        """Of queries or keys; Qwen3 and Gemma 3 have such norms."""
        return _padded_norm(norm(getattr(attention, name)), sizes) if hasattr(attention, name) else None

    return Layer(
        attention_norm=norm(block.input_layernorm),
        qkv=_collect_qkv(f"{prefix}.self_attn.{{q,k,v}}_proj.weight", attention, sizes),
        attention_scale=attention.scaling,
        attention_out=_collect_attention_out(f"{prefix}.self_attn.o_proj.weight", attention, sizes),
        mlp_norm=norm(block.post_attention_layernorm),
        mlp_in=_joined(f"{prefix}.mlp.{{gate,up}}_proj.weight", [mlp.gate_proj, mlp.up_proj]),
        activation=collect_activation(getattr(config, "hidden_activation", None) or config.hidden_act, mlp.act_fn),
        mlp_out=_joined(f"{prefix}.mlp.down_proj.weight", [mlp.down_proj]),
        is_gated=True,
        rotary=rotary,
        window=_window(attention, config),
        query_norm=norm_of_heads("q_norm"),
        key_norm=norm_of_heads("k_norm"),
    )


def collect_norm(module: torch.nn.Module) -> Norm:
    """The RMSNorm that `module` computes."""
    return Norm(_array(module.weight), None, module.variance_epsilon)


def collect_rotary(name: str, module: torch.nn.Module, sizes: Architecture) -> Rotary:
    """The tables of the rotary embedding that `module` computes, for every position of the context."""
    # A chunk that ends at the last position is padded to a whole row group, and the padding is turned too.
    positions = torch.arange(sizes.context_length + PADDING_TOKENS)[None]  # (1, C + PADDING_TOKENS)
    half, padding = sizes.source_head_dim // 2, (sizes.head_dim - sizes.source_head_dim) // 2
    with torch.inference_mode():
        cos, sin = module(torch.zeros(1), positions)  # (1, C + PADDING_TOKENS, h) each, both halves alike
    # Zeros behind each half stay zeros, whatever turns them.
    tables = [np.pad(_array(table[0, :, :half]), [(0, 0), (0, padding)], mode="edge") for table in (cos, sin)]
    return Rotary(name, *tables)


def _window(attention: torch.nn.Module, config: transformers.PretrainedConfig) -> int | None:
    """How many tokens a token sees. Mistral says it for all layers, Qwen for each layer, Llama has no window."""
    if hasattr(attention, "sliding_window"):
        window: int | None = attention.sliding_window
        return window
    return getattr(config, "sliding_window", None)


def _collect_qkv(name: str, attention: torch.nn.Module, sizes: Architecture) -> Linear:
    """Query, key and value side by side. A rotary embedding turns two halves of a head, so each half is padded."""
    half, padding = sizes.source_head_dim // 2, (sizes.head_dim - sizes.source_head_dim) // 2
    parts = []
    for module, turns in ((attention.q_proj, True), (attention.k_proj, True), (attention.v_proj, False)):
        linear = _joined(name, [module])
        parts.append(_padded(linear, (2, half) if turns else (1, 2 * half), padding * (1 if turns else 2)))
    biases = [part.bias if part.bias is not None else np.zeros(part.weight.shape[1], np.float32) for part in parts]
    bias = None if all(part.bias is None for part in parts) else np.concatenate(biases)
    return Linear(name, np.concatenate([part.weight for part in parts], axis=1), bias)


def _padded(linear: Linear, shape: tuple[int, int], padding: int) -> Linear:
    """Pad the columns of `linear`, which are heads of `shape`, with `padding` zeros behind each row of a head."""

    def pad(array: Array) -> Array:
        apart = array.reshape(*array.shape[:-1], -1, *shape)
        return np.pad(apart, [(0, 0)] * (apart.ndim - 1) + [(0, padding)]).reshape(*array.shape[:-1], -1)

    return Linear(linear.name, pad(linear.weight), None if linear.bias is None else pad(linear.bias))


def _collect_attention_out(name: str, attention: torch.nn.Module, sizes: Architecture) -> Linear:
    """The product that joins the heads; the rows that take each head are padded."""
    out = _joined(name, [attention.o_proj])
    heads = out.weight.reshape(sizes.num_heads, sizes.source_head_dim, -1)  # (H, h, D)
    weight = np.pad(heads, [(0, 0), (0, sizes.head_dim - sizes.source_head_dim), (0, 0)])  # (H, p, D)
    return Linear(out.name, weight.reshape(-1, weight.shape[-1]), out.bias)


def _padded_norm(norm: Norm, sizes: Architecture) -> Norm:
    """A norm (h,) of queries or keys, for padded heads (p,).

    The mean over p numbers is smaller than the mean over h numbers by h / p, because the padding is zero. So the
    epsilon becomes smaller, and the weight smaller by the root.
    """
    share = sizes.source_head_dim / sizes.head_dim
    halves = norm.weight.reshape(2, -1)  # (2, h / 2)
    padding = (sizes.head_dim - sizes.source_head_dim) // 2
    weight = np.pad(halves, [(0, 0), (0, padding)]).reshape(-1) * np.float32(share**0.5)
    return Norm(weight, None, norm.epsilon * share)


def _joined(name: str, modules: list[Any]) -> Linear:
    """Products of the same input, side by side."""
    weight = np.concatenate([_array(module.weight).T for module in modules], axis=1)
    biases = [_array(module.bias) for module in modules if module.bias is not None]
    assert len(biases) in (0, len(modules)), "gate and up have biases, or neither has one"
    return Linear(name, np.ascontiguousarray(weight), np.concatenate(biases) if biases else None)


def _array(tensor: torch.Tensor) -> Array:
    return np.array(tensor.detach().numpy(), np.float32)
