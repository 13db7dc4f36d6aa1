"""The function a `Gpt2Weights` computes, in torch, layer by layer: for calibration, where every product's input counts.

Shapes: R rows, T tokens, D hidden size, H heads, p padded head dim, F inner size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from edgelm_export.model.gpt2 import Gpt2Weights, Layer, Linear, Norm

Activation = Callable[[Tensor], Tensor]
Watch = Callable[[Linear, Tensor], None]
"""Called with each product and its input, (R, T, K), before it is computed."""

_ROWS_AT_ONCE = 8
"""Bounds the memory of attention and of logits."""


@dataclass(frozen=True)
class Gpt2Forward:
    """A GPT-2 of arrays as a function; activations are float32."""

    weights: Gpt2Weights
    activations: Sequence[Activation]
    """Of every layer's MLP."""

    def embed(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """Token plus position of `rows` (R, T): the residual stream (R, T, D) that enters the first layer."""
        positions = self.weights.position_table[: rows.shape[1]]  # (T, D)
        return torch.from_numpy(self.weights.token_table[rows] + positions)

    def layer(self, index: int, layer: Layer, x: Tensor, watch: Watch | None = None) -> Tensor:
        """Block `index`, with the weights of `layer`, on the residual stream `x` (R, T, D)."""
        act = self.activations[index]
        return torch.cat([self._layer(layer, act, part, watch) for part in x.split(_ROWS_AT_ONCE)])

    def _layer(self, layer: Layer, act: Activation, x: Tensor, watch: Watch | None) -> Tensor:
        rows, tokens, _ = x.shape
        heads = self.weights.architecture.num_heads
        qkv = _product(self._norm(layer.attention_norm, x), layer.qkv, watch)  # (R, T, 3·H·p)
        query, key, value = qkv.reshape(rows, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)  # (R, H, T, p) each
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=layer.attention_scale)
        attended = attended.transpose(1, 2).reshape(rows, tokens, -1)  # (R, T, H·p)
        x = x + _product(attended, layer.attention_out, watch)
        inner = _product(self._norm(layer.mlp_norm, x), layer.mlp_in, watch)  # (R, T, F)
        return x + _product(act(inner), layer.mlp_out, watch)

    def final(self, x: Tensor) -> Tensor:
        """The final norm of `x` (R, T, D): what enters the head."""
        return self._norm(self.weights.final_norm, x)

    def log_probabilities(self, x: Tensor) -> Tensor:
        """Log-probabilities (R, T, V) of the next token, of what enters the head (R, T, D)."""
        head = self.weights.token_table if self.weights.head is None else self.weights.head
        return torch.log_softmax(x @ torch.from_numpy(head).T, dim=-1)

    def _norm(self, norm: Norm, x: Tensor) -> Tensor:
        weight, bias = torch.from_numpy(norm.weight), torch.from_numpy(norm.bias)
        return F.layer_norm(x, weight.shape, weight, bias, self.weights.epsilon)


def _product(x: Tensor, linear: Linear, watch: Watch | None) -> Tensor:
    if watch is not None:
        watch(linear, x)
    return x @ torch.from_numpy(linear.weight) + torch.from_numpy(linear.bias)
