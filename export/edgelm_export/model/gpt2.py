"""GPT-2: with `gpt2_checkpoint.py` the only file that knows the names of its config fields and modules.

Shapes: D hidden size, H heads, h head dim of the source, p padded head dim.
"""

from collections.abc import Sequence

import numpy as np
import torch
import transformers
from torch import Tensor

from edgelm.bundle.manifest import Architecture
from edgelm_export.model.activations import collect_activation, widen_activation
from edgelm_export.model.decoder import Array, DecoderWeights, Layer, Linear, Norm, Table

CONTEXT_FIELD = "n_positions"

_HEAD_DIM_MULTIPLE = 8
"""GroupQueryAttention takes head dims that are a multiple of this number; zeros fill the rest."""


def prepare(model: transformers.GPT2LMHeadModel) -> None:
    """Change a loaded model into one that ONNX can compute, and whose layers all have the same size."""
    for block in model.transformer.h:
        widen_activation(block.mlp.act)
    _restore_pruned_heads(model)


def shorten(model: transformers.GPT2LMHeadModel, context_length: int) -> None:
    """Give a model a shorter context."""
    positions = model.transformer.wpe
    positions.weight = torch.nn.Parameter(positions.weight.detach()[:context_length].clone(), requires_grad=False)
    positions.num_embeddings = model.config.n_positions = context_length


def describe(config: transformers.GPT2Config) -> Architecture:
    """The sizes of a model with this config."""
    heads, head_dim = config.n_head, config.n_embd // config.n_head
    padded = -(-head_dim // _HEAD_DIM_MULTIPLE) * _HEAD_DIM_MULTIPLE
    return Architecture(
        num_layers=config.n_layer,
        num_heads=heads,
        num_key_value_heads=heads,
        head_dim=padded,
        source_head_dim=head_dim,
        cache_values_per_token=2 * config.n_layer * heads * padded,
        hidden_size=config.n_embd,
        widest_activation=max(config.n_embd, 3 * heads * padded, config.n_inner or 4 * config.n_embd),
        context_length=config.n_positions,
        vocab_size=config.vocab_size,
    )


def collect(model: transformers.GPT2LMHeadModel) -> DecoderWeights:
    """Copy the weights out of a model."""
    config, sizes = model.config, describe(model.config)
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}

    def array(name: str) -> Array:
        return np.array(state[name], np.float32)

    def table(name: str) -> Table:
        return Table(name, array(name))

    def norm(name: str) -> Norm:
        epsilon = float(config.layer_norm_epsilon)  # JSON may have 0 or 1
        return Norm(array(f"{name}.weight"), array(f"{name}.bias"), epsilon)

    def linear(name: str) -> Linear:
        return Linear(f"{name}.weight", array(f"{name}.weight"), array(f"{name}.bias"))

    def layer(index: int) -> Layer:
        prefix = f"transformer.h.{index}"
        scale = sizes.source_head_dim**-0.5 if config.scale_attn_weights else 1.0
        return Layer(
            attention_norm=norm(f"{prefix}.ln_1"),
            qkv=_pad_qkv(linear(f"{prefix}.attn.c_attn"), sizes),
            attention_scale=scale / (index + 1) if config.scale_attn_by_inverse_layer_idx else scale,
            attention_out=_pad_attention_out(linear(f"{prefix}.attn.c_proj"), sizes),
            mlp_norm=norm(f"{prefix}.ln_2"),
            mlp_in=linear(f"{prefix}.mlp.c_fc"),
            activation=collect_activation(config.activation_function, model.transformer.h[index].mlp.act),
            mlp_out=linear(f"{prefix}.mlp.c_proj"),
        )

    tied = model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    return DecoderWeights(
        model_type=config.model_type,
        architecture=sizes,
        token_table=table("transformer.wte.weight"),
        position_table=table("transformer.wpe.weight"),
        layers=tuple(layer(index) for index in range(config.n_layer)),
        final_norm=norm("transformer.ln_f"),
        head=None if tied else table("lm_head.weight"),
    )


def _pad_qkv(qkv: Linear, sizes: Architecture) -> Linear:
    """Pad each head of the query, the key and the value, which are three equal parts in GPT-2."""
    parts, padding = (3, sizes.num_heads, sizes.source_head_dim), (0, sizes.head_dim - sizes.source_head_dim)
    assert qkv.bias is not None
    weight = np.pad(qkv.weight.reshape(-1, *parts), [(0, 0)] * 3 + [padding])  # (D, 3, H, p)
    bias = np.pad(qkv.bias.reshape(parts), [(0, 0)] * 2 + [padding])  # (3, H, p)
    return Linear(qkv.name, weight.reshape(len(weight), -1), bias.reshape(-1))


def _pad_attention_out(out: Linear, sizes: Architecture) -> Linear:
    """Pad the rows that take each head."""
    heads = out.weight.reshape(sizes.num_heads, sizes.source_head_dim, -1)  # (H, h, D)
    weight = np.pad(heads, [(0, 0), (0, sizes.head_dim - sizes.source_head_dim), (0, 0)])  # (H, p, D)
    return Linear(out.name, weight.reshape(-1, weight.shape[-1]), out.bias)


def _restore_pruned_heads(model: transformers.GPT2LMHeadModel) -> None:
    """Give every layer all its heads again. A head of zeros adds exactly nothing."""
    heads = model.config.n_head
    for block in model.transformer.h:
        attention = block.attn
        kept = [head for head in range(heads) if head not in attention.pruned_heads]
        if len(kept) == heads:
            continue
        dim = attention.head_dim
        attention.c_attn.weight.data = _spread(attention.c_attn.weight.data, kept, heads, dim)  # (D, 3·H·h)
        attention.c_attn.bias.data = _spread(attention.c_attn.bias.data[None], kept, heads, dim)[0]  # (3·H·h,)
        attention.c_proj.weight.data = _spread(attention.c_proj.weight.data.T, kept, heads, dim).T.contiguous()
        attention.c_attn.nf = 3 * attention.embed_dim
        attention.split_size, attention.num_heads, attention.pruned_heads = attention.embed_dim, heads, set()
    model.config.pruned_heads = {}


def _spread(columns: Tensor, kept: Sequence[int], heads: int, head_dim: int) -> Tensor:
    """The columns (N, parts·kept·h) of the heads `kept`, spread to (N, parts·H·h) with zeros for the other heads."""
    present = columns.reshape(len(columns), -1, len(kept), head_dim)
    full = present.new_zeros(*present.shape[:2], heads, head_dim)
    full[:, :, kept] = present
    return full.reshape(len(columns), -1)
