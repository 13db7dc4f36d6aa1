"""Scales of an int8 cache: ONNX Runtime rounds keys and values to 8 bits with fixed scales, one for each channel.

Shapes: R rows, T tokens, G key-value heads, p padded head dim.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from edgelm.ids import IdArray
from edgelm_export.model.decoder import Array, DecoderWeights
from edgelm_export.model.forward import DecoderForward

MARGIN = 1.5
"""Other text has somewhat larger keys and values than calibration text. What is larger still is cut off."""
_LARGEST = 127
_SMALLEST_SCALE = 1e-6
"""Of a channel that is always zero, such as padding."""


@dataclass(frozen=True)
class CacheScales:
    """The scales of one layer: a stored integer times its scale is the number that it stands for."""

    key: Array
    """(G, p)"""
    value: Array
    """(G, p)"""


def cache_scales(weights: DecoderWeights, rows: IdArray) -> tuple[CacheScales, ...]:
    """The scales of each layer's keys and values, from those of the calibration text `rows` (R, T)."""
    forward = DecoderForward(weights)
    x = forward.embed(rows)  # (R, T, D)
    scales = []
    for layer in weights.layers:
        key, value = forward.keys_and_values(layer, x)  # (R, G, T, p) each
        scales.append(CacheScales(_scales(key), _scales(value)))
        x = forward.layer(layer, x)
    return tuple(scales)


def _scales(numbers: Tensor) -> Array:
    """The scale of each channel of `numbers` (R, G, T, p), (G, p)."""
    largest: Array = numbers.abs().amax(dim=(0, 2)).numpy().astype(np.float32)
    return np.maximum(MARGIN * largest / _LARGEST, np.float32(_SMALLEST_SCALE))
