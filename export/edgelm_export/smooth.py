"""Smoothing (Xiao et al., SmoothQuant, arXiv 2211.10438): move outliers of activations into weights, exactly.

A LayerNorm's output channel i is divided by s_i and row i of the next matrix multiplied by it: the same function,
but the activations become easy to quantize with one scale per token.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgelm_export.weights import Array, Gpt2Weights, Layer, Linear, Norm

ALPHA = 0.5
"""How much of the difficulty moves from activations to weights."""

_SMALLEST = 1e-5

Peaks = list[tuple[Array, Array]]
"""Per layer: the largest magnitudes, per channel (D,), of what enters qkv and of what enters the MLP."""


def activation_peaks(model: Any, texts: list[npt.NDArray[np.int64]]) -> Peaks:
    """Largest magnitude of every LayerNorm output channel while `model` reads `texts` (each (T,))."""
    peaks = {}

    def watch(key: tuple[int, str]) -> Any:
        peaks[key] = torch.zeros(model.config.n_embd)

        def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
            found = output.detach().abs().reshape(-1, output.shape[-1]).amax(dim=0)  # (D,)
            peaks[key] = torch.maximum(peaks[key], found)

        return hook

    blocks = model.transformer.h
    hooks = [block.ln_1.register_forward_hook(watch((i, "qkv"))) for i, block in enumerate(blocks)]
    hooks += [block.ln_2.register_forward_hook(watch((i, "mlp"))) for i, block in enumerate(blocks)]
    try:
        with torch.no_grad():
            for ids in texts:
                model.transformer(torch.from_numpy(ids)[None])
    finally:
        for handle in hooks:
            handle.remove()
    return [(peaks[i, "qkv"].numpy(), peaks[i, "mlp"].numpy()) for i in range(len(blocks))]


def smooth(weights: Gpt2Weights, peaks: Peaks, alpha: float = ALPHA) -> Gpt2Weights:
    """The same function with smoothed activations."""

    def smooth_layer(layer: Layer, qkv_peaks: Array, mlp_peaks: Array) -> Layer:
        attention_norm, qkv = _move(layer.attention_norm, layer.qkv, qkv_peaks, alpha)
        mlp_norm, mlp_in = _move(layer.mlp_norm, layer.mlp_in, mlp_peaks, alpha)
        return replace(layer, attention_norm=attention_norm, qkv=qkv, mlp_norm=mlp_norm, mlp_in=mlp_in)

    return replace(
        weights, layers=tuple(smooth_layer(layer, *peak) for layer, peak in zip(weights.layers, peaks, strict=True))
    )


def _move(norm: Norm, linear: Linear, peaks: Array, alpha: float) -> tuple[Norm, Linear]:
    rows = np.abs(linear.weight).max(axis=1)  # (D,)
    factors = np.maximum(peaks, _SMALLEST) ** alpha / np.maximum(rows, _SMALLEST) ** (1 - alpha)
    factors = factors.astype(np.float32)  # (D,)
    return (
        Norm(norm.weight / factors, norm.bias / factors),
        replace(linear, weight=linear.weight * factors[:, None]),
    )
