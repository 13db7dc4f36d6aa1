"""A GPT-2's weights as arrays, ready for the graph: heads padded, the scale of attention made explicit.

D hidden size, H heads, h head dim of the source, p padded head dim, F inner size, C context, V vocabulary.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from edgelm.bundle.manifest import Architecture
from edgelm_export.graph.activations import Activation, collect_activation

Array = npt.NDArray[np.float32]

HEAD_DIM_MULTIPLE = 8
"""GroupQueryAttention takes head dims that are a multiple of this; zeros fill the rest."""


@dataclass(frozen=True)
class Norm:
    """LayerNorm: scale and shift, (D,) each."""

    weight: Array
    bias: Array


@dataclass(frozen=True)
class Linear:
    """``x @ weight + bias``: weight (K, N), bias (N,)."""

    name: str
    """Name of the weight in the checkpoint."""
    weight: Array
    bias: Array


ProductField = Literal["qkv", "attention_out", "mlp_in", "mlp_out"]
PRODUCTS: tuple[ProductField, ...] = get_args(ProductField)
"""The products of a layer, in the order a token passes them."""


@dataclass(frozen=True)
class Layer:
    """One Transformer block, in the order a token passes it."""

    attention_norm: Norm
    qkv: Linear
    """(D, 3·H·p): query, key and value side by side."""
    attention_scale: float
    attention_out: Linear
    """(H·p, D)."""
    mlp_norm: Norm
    mlp_in: Linear
    """(D, F)."""
    activation: Activation
    mlp_out: Linear
    """(F, D)."""
    value_divisors: Array | None = None
    """What smoothing divided the values by, (H·p,)."""

    def product(self, field: ProductField) -> Linear:
        """One of its products."""
        found: Linear = getattr(self, field)
        return found

    def with_weight(self, field: ProductField, weight: Array) -> "Layer":
        """The same layer with another weight (K, N) in one of its products."""
        return replace(self, **{field: replace(self.product(field), weight=weight)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Gpt2Weights:
    """A whole GPT-2."""

    architecture: Architecture
    epsilon: float
    token_table: Array
    """(V, D)."""
    position_table: Array
    """(C, D)."""
    layers: tuple[Layer, ...]
    final_norm: Norm
    head: Array | None
    """(V, D); None where the head is the token table."""


def collect_weights(model: Any) -> Gpt2Weights:
    """Copy the weights out of a ``GPT2LMHeadModel``."""
    config = model.config
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    heads, head_dim = config.n_head, config.n_embd // config.n_head
    padded = -(-head_dim // HEAD_DIM_MULTIPLE) * HEAD_DIM_MULTIPLE

    def array(name: str) -> Array:
        return np.array(state[name], np.float32)

    def norm(name: str) -> Norm:
        return Norm(array(f"{name}.weight"), array(f"{name}.bias"))

    def linear(name: str) -> Linear:
        return Linear(f"{name}.weight", array(f"{name}.weight"), array(f"{name}.bias"))

    def layer(index: int) -> Layer:
        prefix = f"transformer.h.{index}"
        scale = head_dim**-0.5 if config.scale_attn_weights else 1.0
        return Layer(
            attention_norm=norm(f"{prefix}.ln_1"),
            qkv=_pad_qkv(linear(f"{prefix}.attn.c_attn"), heads, head_dim, padded),
            attention_scale=scale / (index + 1) if config.scale_attn_by_inverse_layer_idx else scale,
            attention_out=_pad_attention_out(linear(f"{prefix}.attn.c_proj"), heads, head_dim, padded),
            mlp_norm=norm(f"{prefix}.ln_2"),
            mlp_in=linear(f"{prefix}.mlp.c_fc"),
            activation=collect_activation(config.activation_function, model.transformer.h[index].mlp.act),
            mlp_out=linear(f"{prefix}.mlp.c_proj"),
        )

    table = array("transformer.wte.weight")
    tied = model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    return Gpt2Weights(
        architecture=Architecture(
            num_layers=config.n_layer,
            num_heads=heads,
            num_key_value_heads=heads,
            head_dim=padded,
            source_head_dim=head_dim,
            cache_values_per_token=2 * config.n_layer * heads * padded,
            hidden_size=config.n_embd,
            widest_activation=max(3 * heads * padded, config.n_inner or 4 * config.n_embd),
            context_length=config.n_positions,
            vocab_size=table.shape[0],
        ),
        epsilon=config.layer_norm_epsilon,
        token_table=table,
        position_table=array("transformer.wpe.weight"),
        layers=tuple(layer(index) for index in range(config.n_layer)),
        final_norm=norm("transformer.ln_f"),
        head=None if tied else array("lm_head.weight"),
    )


def _pad_qkv(qkv: Linear, heads: int, head_dim: int, padded: int) -> Linear:
    if padded == head_dim:
        return qkv
    width = [(0, padded - head_dim)]
    weight = qkv.weight.reshape(-1, 3, heads, head_dim)
    bias = qkv.bias.reshape(3, heads, head_dim)
    return Linear(
        qkv.name,
        np.pad(weight, [(0, 0)] * 3 + width).reshape(len(qkv.weight), -1),  # (D, 3·H·p)
        np.pad(bias, [(0, 0)] * 2 + width).reshape(-1),  # (3·H·p,)
    )


def _pad_attention_out(out: Linear, heads: int, head_dim: int, padded: int) -> Linear:
    if padded == head_dim:
        return out
    weight = out.weight.reshape(heads, head_dim, -1)
    return Linear(
        out.name, np.pad(weight, [(0, 0), (0, padded - head_dim), (0, 0)]).reshape(heads * padded, -1), out.bias
    )
