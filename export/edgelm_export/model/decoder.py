"""A decoder's weights as arrays, described without naming its architecture.

Every other room of the build side works on this description. The file of a family fills it in: it pads the heads, makes
the scale of attention explicit and names each matrix as the checkpoint does.

Shapes: D hidden size, H query heads, G key-value heads, p padded head dim, F inner size, C context, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from edgelm.bundle.manifest import Architecture
from edgelm_export.model.activations import Activation

Array: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Norm:
    """A LayerNorm: scale and shift, (D,) each."""

    weight: Array
    bias: Array


@dataclass(frozen=True)
class Linear:
    """``x @ weight + bias``: weight (K, N), bias (N,)."""

    name: str
    """Name of the weight in the checkpoint."""
    weight: Array
    bias: Array


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
    """(D, F)."""
    activation: Activation
    mlp_out: Linear
    """(F, D)."""
    value_divisors: Array | None = None
    """The factors by which smoothing divided the values, (G·p,)."""

    @property
    def products(self) -> tuple[Linear, ...]:
        """The matrix products of the layer, in the order of `PRODUCTS`."""
        return tuple(self.product(field) for field in PRODUCTS)

    def product(self, field: ProductField) -> Linear:
        """The matrix product called `field`."""
        linear: Linear = getattr(self, field)
        return linear

    def with_weight(self, field: ProductField, weight: Array) -> "Layer":
        """A copy of the layer whose product `field` has another weight, (K, N)."""
        return replace(self, **{field: replace(self.product(field), weight=weight)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class DecoderWeights:
    """All weights of a decoder."""

    model_type: str
    """Name of the family, as ``model_type`` in ``config.json`` says it."""
    architecture: Architecture
    epsilon: float
    """What each LayerNorm adds to the variance."""
    token_table: Table
    """(V, D)."""
    position_table: Table
    """(C, D)."""
    layers: tuple[Layer, ...]
    final_norm: Norm
    head: Table | None
    """(V, D); None where the token table is the head too."""

    @property
    def output_table(self) -> Table:
        """The head, or the token table where that is the head too."""
        return self.token_table if self.head is None else self.head

    @property
    def tables(self) -> tuple[Table, ...]:
        """The token table, and the head where that is a matrix of its own."""
        return (self.token_table,) if self.head is None else (self.token_table, self.head)

    @property
    def products(self) -> Iterator[Linear]:
        """The matrix products of all layers, in the order in which a token passes them."""
        return (linear for layer in self.layers for linear in layer.products)


def qkv_widths(architecture: Architecture) -> tuple[int, int, int]:
    """How many columns of `Layer.qkv` are the query, the key and the value."""
    key_value = architecture.num_key_value_heads * architecture.head_dim
    return architecture.num_heads * architecture.head_dim, key_value, key_value
