"""The function that a decoder's weights compute, in torch, layer by layer. Calibration watches each product's input.

Shapes: R rows, T tokens, D hidden size, H query heads, G key-value heads, p padded head dim, F inner size,
V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from edgelm.ids import IdArray
from edgelm_export.model.decoder import DecoderWeights, Layer, Linear, Norm, qkv_widths

Watch = Callable[[Linear, Tensor], None]
"""Called with each product and its input, (R, T, K), before the product is computed."""

_ROWS_AT_ONCE = 8
"""Bounds the memory of attention."""


@dataclass(frozen=True)
class DecoderForward:
    """The weights of a decoder as a function; its activations are float32."""

    weights: DecoderWeights

    def embed(self, rows: IdArray) -> Tensor:
        """The residual stream (R, T, D) that enters the first layer: token plus position of `rows` (R, T)."""
        positions = self.weights.position_table.weight[: rows.shape[1]]  # (T, D)
        return torch.from_numpy(self.weights.token_table.weight[rows] + positions)

    def layer(self, layer: Layer, x: Tensor, watch: Watch | None = None) -> Tensor:
        """The residual stream after the block `layer`, where `x` (R, T, D) enters it."""
        return torch.cat([self._layer(layer, part, watch) for part in x.split(_ROWS_AT_ONCE)])

    def _layer(self, layer: Layer, x: Tensor, watch: Watch | None) -> Tensor:
        qkv = _product(self._norm(layer.attention_norm, x), layer.qkv, watch)  # (R, T, (H + 2·G)·p)
        query, key, value = (self._heads(part) for part in qkv.split(qkv_widths(self.weights.architecture), dim=-1))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=layer.attention_scale)
        attended = attended.transpose(1, 2).flatten(2)  # (R, T, H·p)
        x = x + _product(attended, layer.attention_out, watch)
        inner = _product(self._norm(layer.mlp_norm, x), layer.mlp_in, watch)  # (R, T, F)
        return x + _product(layer.activation.function(inner), layer.mlp_out, watch)

    def _heads(self, part: Tensor) -> Tensor:
        """A part (R, T, heads·p) of the qkv product as (R, heads, T, p)."""
        return part.unflatten(-1, (-1, self.weights.architecture.head_dim)).transpose(1, 2)

    def final(self, x: Tensor) -> Tensor:
        """The input of the head: the final norm of `x` (R, T, D)."""
        return self._norm(self.weights.final_norm, x)

    def log_probabilities(self, x: Tensor) -> Tensor:
        """Log-probabilities (R, T, V) of the next token, where `x` (R, T, D) enters the head."""
        return torch.log_softmax(x @ torch.from_numpy(self.weights.output_table.weight).T, dim=-1)

    def _norm(self, norm: Norm, x: Tensor) -> Tensor:
        weight, bias = torch.from_numpy(norm.weight), torch.from_numpy(norm.bias)
        return F.layer_norm(x, weight.shape, weight, bias, self.weights.epsilon)


def _product(x: Tensor, linear: Linear, watch: Watch | None) -> Tensor:
    if watch is not None:
        watch(linear, x)
    return x @ torch.from_numpy(linear.weight) + torch.from_numpy(linear.bias)
