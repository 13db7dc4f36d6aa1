"""Granite: Llama with four multipliers in its config."""

from dataclasses import replace

import numpy as np
import transformers

from edgelm_export.model import llama
from edgelm_export.model.decoder import DecoderWeights, Layer, Linear


def collect(model: transformers.GraniteForCausalLM) -> DecoderWeights:
    """Copy the weights out of a model. The multiplier of attention is the scale of its layers already."""
    config, weights = model.config, llama.collect(model)
    return replace(
        weights,
        layers=tuple(_scaled_layer(layer, config.residual_multiplier) for layer in weights.layers),
        token_scale=config.embedding_multiplier,
        logits_scale=1 / config.logits_scaling,
    )


def _scaled_layer(layer: Layer, factor: float) -> Layer:
    """The layer that adds `factor` times as much to the residual stream."""
    return replace(layer, attention_out=_scaled(layer.attention_out, factor), mlp_out=_scaled(layer.mlp_out, factor))


def _scaled(linear: Linear, factor: float) -> Linear:
    scale = np.float32(factor)
    bias = None if linear.bias is None else linear.bias * scale
    return replace(linear, weight=linear.weight * scale, bias=bias)
