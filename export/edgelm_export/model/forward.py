"""The function that a decoder's weights compute, in torch, layer by layer. Calibration visits each product.

Shapes: R rows, T tokens, D hidden size, H query heads, G key-value heads, p padded head dim, F inner size,
V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgelm.ids import IdArray
from edgelm_export.model.decoder import DecoderWeights, Layer, Linear, Norm, Rotary, qkv_widths

Visit = Callable[[Linear, Tensor], Linear]
"""Called with each product and its input, (R, T, K), before the product is computed. What it returns is computed."""

_ROWS_AT_ONCE = 8
"""Bounds the memory of attention."""


def _leave(linear: Linear, x: Tensor) -> Linear:
    """A visit that changes nothing."""
    return linear


@dataclass(frozen=True)
class DecoderForward:
    """The weights of a decoder as a function; its activations are float32."""

    weights: DecoderWeights

    def embed(self, rows: IdArray) -> Tensor:
        """The residual stream (R, T, D) that enters the first layer: token plus position of `rows` (R, T)."""
        x = self.weights.token_table.weight[rows] * np.asarray(self.weights.token_factors, np.float32)  # (R, T, D)
        if self.weights.position_table is not None:
            x = x + self.weights.position_table.weight[: rows.shape[1]]
        return torch.from_numpy(x)

    def layer(self, layer: Layer, x: Tensor, visit: Visit = _leave) -> Tensor:
        """The residual stream after the block `layer`, where `x` (R, T, D) enters it; `visit` sees its products."""
        qkv = _product(_norm(layer.attention_norm, x), layer.qkv, visit)  # (R, T, (H + 2·G)·p)
        attended = torch.cat([self._attention(layer, rows) for rows in qkv.split(_ROWS_AT_ONCE)])  # (R, T, H·p)
        x = x + _optional_norm(layer.attention_out_norm, _product(attended, layer.attention_out, visit))
        inner = _product(_norm(layer.mlp_norm, x), layer.mlp_in, visit)  # (R, T, F) or (R, T, 2·F)
        if layer.is_gated:
            gate, up = inner.chunk(2, dim=-1)
            active = layer.activation.function(gate) * up
        else:
            active = layer.activation.function(inner)
        return x + _optional_norm(layer.mlp_out_norm, _product(active, layer.mlp_out, visit))

    def keys_and_values(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and the values of `layer`, (R, G, T, p) each, where `x` (R, T, D) enters it."""
        _, key, value = self._split(layer, _product(_norm(layer.attention_norm, x), layer.qkv))
        return key, value

    def _split(self, layer: Layer, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The queries (R, H, T, p), keys and values (R, G, T, p) of the product `qkv` (R, T, (H + 2·G)·p)."""
        query, key, value = (self._heads(part) for part in qkv.split(qkv_widths(self.weights.architecture), dim=-1))
        query, key = (
            _turned(_optional_norm(norm, part), layer.rotary)
            for norm, part in ((layer.query_norm, query), (layer.key_norm, key))
        )
        return query, key, value

    def _attention(self, layer: Layer, qkv: Tensor) -> Tensor:
        """What the heads of `layer` give, (R, T, H·p), for queries, keys and values side by side."""
        sizes = self.weights.architecture
        query, key, value = self._split(layer, qkv)
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if layer.window is None else _window_mask(qkv.shape[1], layer.window),
            is_causal=layer.window is None,
            scale=layer.attention_scale,
            enable_gqa=sizes.num_heads != sizes.num_key_value_heads,
        )
        return attended.transpose(1, 2).flatten(2)

    def _heads(self, part: Tensor) -> Tensor:
        """A part (R, T, heads·p) of the qkv product as (R, heads, T, p)."""
        return part.unflatten(-1, (-1, self.weights.architecture.head_dim)).transpose(1, 2)

    def final(self, x: Tensor) -> Tensor:
        """The final norm of `x` (R, T, D)."""
        return _norm(self.weights.final_norm, x)

    def into_head(self, x: Tensor) -> Tensor:
        """What the head multiplies where the final norm is `x` (R, T, D)."""
        return x * torch.from_numpy(np.asarray(self.weights.head_factors, np.float32))

    def log_probabilities(self, x: Tensor) -> Tensor:
        """Log-probabilities (R, T, V) of the next token, where the final norm is `x` (R, T, D)."""
        return torch.log_softmax(self.into_head(x) @ torch.from_numpy(self.weights.output_table.weight).T, dim=-1)


def _norm(norm: Norm, x: Tensor) -> Tensor:
    weight = torch.from_numpy(norm.weight)
    if norm.bias is None:
        return F.rms_norm(x, weight.shape, weight, norm.epsilon)
    return F.layer_norm(x, weight.shape, weight, torch.from_numpy(norm.bias), norm.epsilon)


def _optional_norm(norm: Norm | None, x: Tensor) -> Tensor:
    return x if norm is None else _norm(norm, x)


def _turned(heads: Tensor, rotary: Rotary | None) -> Tensor:
    """Queries or keys (R, heads, T, p) turned by the angles of their positions."""
    if rotary is None:
        return heads
    cos, sin = (torch.from_numpy(table[: heads.shape[2]]) for table in (rotary.cos, rotary.sin))  # (T, p / 2)
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _window_mask(tokens: int, window: int) -> Tensor:
    """Which of T tokens (columns) each of them (rows) sees, (T, T)."""
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    return (distance >= 0) & (distance < window)


def _product(x: Tensor, linear: Linear, visit: Visit = _leave) -> Tensor:
    linear = visit(linear, x)
    product = x @ torch.from_numpy(linear.weight)
    return product if linear.bias is None else product + torch.from_numpy(linear.bias)
