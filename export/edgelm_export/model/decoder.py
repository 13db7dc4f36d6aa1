"""A decoder's weights as arrays, described without naming its architecture.

Every other room of the build side works on this description. The file of a family fills it in: it pads the heads, makes
the scale of attention explicit and names each matrix as the checkpoint does.

Shapes: D hidden size, H query heads, G key-value heads, p padded head dim, F inner size, C context, V vocabulary.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from edgelm.bundle.manifest import Architecture
from edgelm_export.model.activations import Activation

Array: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Norm:
    """A LayerNorm, or an RMSNorm: the latter divides by the root mean square alone, and has no shift."""

    weight: Array
    """The scale, (D,)."""
    bias: Array | None
    """The shift, (D,); None in an RMSNorm."""
    epsilon: float
    """What is added to the variance, or to the mean square."""

    @property
    def vectors(self) -> tuple[Array, ...]:
        """The arrays of the norm."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def divided(self, factors: Array) -> "Norm":
        """The norm whose output channels are divided by `factors` (D,)."""
        return replace(self, weight=self.weight / factors, bias=None if self.bias is None else self.bias / factors)


@dataclass(frozen=True)
class Linear:
    """``x @ weight + bias``: weight (K, N), bias (N,) or None."""

    name: str
    """Name of the weight in the checkpoint. ``{q,k,v}`` stands for matrices that are joined side by side."""
    weight: Array
    bias: Array | None

    @property
    def source_names(self) -> tuple[str, ...]:
        """The names of the joined matrices in the checkpoint, in their order."""
        match = re.fullmatch(r"(.*)\{(.*)\}(.*)", self.name)
        return (self.name,) if match is None else tuple(f"{match[1]}{part}{match[3]}" for part in match[2].split(","))


@dataclass(frozen=True)
class Rotary:
    """Rotary position embeddings (Su et al., arXiv 2104.09864) of queries and keys: number i of a head turns with
    number i + p / 2. Zeros that pad a head stand behind each half."""

    name: str
    """A name for the tables in the graph."""
    cos: Array
    """(C, p / 2)."""
    sin: Array
    """(C, p / 2)."""


@dataclass(frozen=True)
class Table:
    """A matrix whose rows belong to tokens or to positions, (rows, D)."""

    name: str
    """Name of the weight in the checkpoint."""
    weight: Array


ProductField = Literal["qkv", "attention_out", "mlp_in", "mlp_out"]
PRODUCTS: tuple[ProductField, ...] = get_args(ProductField)
"""The matrix products of a layer, in the order in which a token passes them."""


@dataclass(frozen=True)
class Layer:
    """One Transformer block, in the order in which a token passes it."""

    attention_norm: Norm
    qkv: Linear
    """(D, (H + 2·G)·p): query, key and value side by side; `qkv_widths` says where each ends."""
    attention_scale: float
    attention_out: Linear
    """(H·p, D)."""
    mlp_norm: Norm
    mlp_in: Linear
    """(D, F); or (D, 2·F), gate and up side by side, where the MLP is gated."""
    activation: Activation
    mlp_out: Linear
    """(F, D)."""
    is_gated: bool = False
    """Whether the activation of the gate multiplies up (Shazeer, arXiv 2002.05202)."""
    rotary: Rotary | None = None
    window: int | None = None
    """How many tokens a token sees, itself included; None where it sees all tokens before it."""
    query_norm: Norm | None = None
    """Of each head of the query, (p,), before it is turned; `key_norm` likewise."""
    key_norm: Norm | None = None
    attention_out_norm: Norm | None = None
    """Of what attention adds to the residual stream; `mlp_out_norm` likewise for the MLP."""
    mlp_out_norm: Norm | None = None
    value_divisors: Array | None = None
    """The factors by which smoothing divided the values, (G·p,)."""

    @property
    def norms(self) -> tuple[Norm, ...]:
        """All norms of the layer."""
        optional = self.query_norm, self.key_norm, self.attention_out_norm, self.mlp_out_norm
        return (self.attention_norm, self.mlp_norm, *(norm for norm in optional if norm is not None))

    @property
    def products(self) -> tuple[Linear, ...]:
        """The matrix products of the layer, in the order of `PRODUCTS`."""
        return tuple(self.product(field) for field in PRODUCTS)

    def product(self, field: ProductField) -> Linear:
        """The matrix product called `field`."""
        linear: Linear = getattr(self, field)
        return linear

    def with_products(self, products: Sequence[Linear]) -> "Layer":
        """A copy of the layer with other matrix products, in the order of `PRODUCTS`."""
        return replace(self, **dict(zip(PRODUCTS, products, strict=True)))  # type: ignore[arg-type]

    def with_weight(self, field: ProductField, weight: Array) -> "Layer":
        """A copy of the layer whose product `field` has another weight, (K, N)."""
        return replace(self, **{field: replace(self.product(field), weight=weight)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class DecoderWeights:
    """All weights of a decoder."""

    model_type: str
    """Name of the family, as ``model_type`` in ``config.json`` says it."""
    architecture: Architecture
    token_table: Table
    """(V, D)."""
    position_table: Table | None
    """(C, D); None where positions are not added to the tokens."""
    layers: tuple[Layer, ...]
    final_norm: Norm
    head: Table | None
    """(V, D); None where the token table is the head too."""
    token_scale: float = 1.0
    """By which the rows of the token table are multiplied where they enter the residual stream."""
    logits_scale: float = 1.0
    """By which the logits are multiplied."""
    head_divisors: Array | None = None
    """By which what enters the head is divided, (D,), where smoothing multiplied the columns of its table by them."""

    @property
    def token_factors(self) -> float | Array:
        """By which the looked-up rows are multiplied, one number or (D,)."""
        if self.head_divisors is None or self.head is not None:
            return self.token_scale
        return np.float32(self.token_scale) / self.head_divisors

    @property
    def head_factors(self) -> float | Array:
        """By which what enters the head is multiplied, one number or (D,)."""
        return self.logits_scale if self.head_divisors is None else np.float32(self.logits_scale) / self.head_divisors

    @property
    def output_table(self) -> Table:
        """The head, or the token table where that is the head too."""
        return self.token_table if self.head is None else self.head

    @property
    def tables(self) -> tuple[Table, ...]:
        """The token table, and the head where that is a matrix of its own."""
        return (self.token_table,) if self.head is None else (self.token_table, self.head)

    @property
    def rotaries(self) -> tuple[Rotary, ...]:
        """The different rotary embeddings of the layers."""
        return tuple({layer.rotary.name: layer.rotary for layer in self.layers if layer.rotary is not None}.values())

    @property
    def products(self) -> Iterator[Linear]:
        """The matrix products of all layers, in the order in which a token passes them."""
        return (linear for layer in self.layers for linear in layer.products)


def qkv_widths(architecture: Architecture) -> tuple[int, int, int]:
    """How many columns of `Layer.qkv` are the query, the key and the value."""
    key_value = architecture.num_key_value_heads * architecture.head_dim
    return architecture.num_heads * architecture.head_dim, key_value, key_value
