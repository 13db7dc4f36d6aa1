"""From float weights to stored matrices, layer by layer, with the activations of calibration text at hand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgelm_export.model.forward import Activation, Gpt2Forward, Watch
from edgelm_export.model.gpt2 import PRODUCTS, Gpt2Weights, Layer, Linear
from edgelm_export.quantize.gptq import gptq_blocks
from edgelm_export.quantize.recipe import HEAD, POSITION_TABLE, TOKEN_TABLE, Recipe
from edgelm_export.quantize.smooth import best_factors, fold_norm, fold_values
from edgelm_export.quantize.storage import (
    Array,
    FloatStored,
    Storage,
    Stored,
    block_size_for,
    quantize_blocks,
    quantize_columns,
)

SAMPLE_TOKENS = 512
"""Tokens on which smoothing factors are compared."""

Hessian = Callable[[], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class StoredGpt2:
    """A GPT-2 whose matrices are stored as a recipe wants them."""

    recipe: Recipe
    source: Gpt2Weights
    """What was to be stored: the errors are measured against it; norms and biases ship as they are."""
    restored: Gpt2Weights
    """What the stored matrices stand for, in float32."""
    stored: dict[str, Stored]
    """By the matrix's name in the checkpoint."""


def smooth(
    weights: Gpt2Weights, recipe: Recipe, activations: Sequence[Activation], rows: npt.NDArray[np.int64]
) -> Gpt2Weights:
    """The same function with the factors that suit how `recipe` will store each product; see `smooth`.

    Args:
        activations: of every layer's MLP.
        rows: calibration text (R, T).
    """
    forward = Gpt2Forward(weights, activations)
    x = forward.embed(rows)  # (R, T, D)
    layers = []
    for index, layer in enumerate(weights.layers):
        seen: dict[str, list[Tensor]] = {}
        following = forward.layer(index, layer, x, _collect(seen))
        layers.append(_smoothed(layer, recipe, {name: torch.cat(inputs) for name, inputs in seen.items()}))
        x = following
    return replace(weights, layers=tuple(layers))


def store(
    weights: Gpt2Weights,
    recipe: Recipe,
    activations: Sequence[Activation],
    rows: npt.NDArray[np.int64] | None,
) -> StoredGpt2:
    """Store every matrix of `weights` as `recipe` says.

    With calibration text every layer sees what the stored layers before it make of the text, so that later layers
    make up for earlier ones' errors.

    Args:
        activations: of every layer's MLP.
        rows: calibration text (R, T); None only for recipes without 4-bit products.
    """
    stored: dict[str, Stored] = {POSITION_TABLE: _in_float(weights.position_table, recipe.storage[POSITION_TABLE])}
    forward = Gpt2Forward(replace(weights, position_table=stored[POSITION_TABLE].restored()), activations)
    x = forward.embed(rows) if rows is not None and recipe.wants_inputs else None  # (R, T, D)
    layers = []
    for index, layer in enumerate(weights.layers):
        for field in PRODUCTS:
            linear = layer.product(field)
            hessian = _hessian(forward, index, layer, x, linear.name)
            kept = _store_product(linear.weight, recipe.storage[linear.name], hessian)
            stored[linear.name] = kept
            layer = layer.with_weight(field, as_product(kept))
        layers.append(layer)
        x = None if x is None else forward.layer(index, layer, x)
    final = None if x is None else forward.final(x)  # (R, T, D)
    stored[TOKEN_TABLE] = store_table(
        weights.token_table, recipe.storage[TOKEN_TABLE], final if weights.head is None else None
    )
    restored = replace(forward.weights, token_table=stored[TOKEN_TABLE].restored(), layers=tuple(layers))
    if weights.head is not None:
        stored[HEAD] = store_table(weights.head, recipe.storage[HEAD], final)
        restored = replace(restored, head=stored[HEAD].restored())
    return StoredGpt2(recipe, weights, restored, stored)


def as_product(stored: Stored) -> Array:
    """What a stored product stands for, (K, N)."""
    return stored.restored() if isinstance(stored, FloatStored) else np.ascontiguousarray(stored.restored().T)


def _store_product(weight: Array, storage: Storage, hessian: Hessian) -> Stored:
    if storage.format == "block":
        assert storage.block_size is not None
        size = block_size_for(len(weight), storage.block_size)
        rows = np.ascontiguousarray(weight.T)  # (N, K)
        if storage.bits == 8:  # so fine that there is nothing to make up for
            return quantize_blocks(rows, 8, size)
        return gptq_blocks(rows, hessian(), storage.bits, size)
    return quantize_columns(weight) if storage.format == "int8_row" else _in_float(weight, storage)


def store_table(table: Array, storage: Storage, head_inputs: Tensor | None = None) -> Stored:
    """A table (V, D): its rows are looked up, and are the head's outputs.

    Args:
        head_inputs: what the head sees, (R, T, D), where the table is one: 4 bits are then rounded for its outputs,
            which suffer more than what is looked up.
    """
    if storage.format != "block":
        return _in_float(table, storage)
    assert storage.block_size is not None
    size = block_size_for(table.shape[1], storage.block_size)
    if storage.bits == 8 or head_inputs is None:
        return quantize_blocks(table, storage.bits, size)
    flat = head_inputs.reshape(-1, table.shape[1])  # (R·T, D)
    return gptq_blocks(table, (flat.T @ flat).numpy(), storage.bits, size)


def _in_float(array: Array, storage: Storage) -> FloatStored:
    return FloatStored(array.astype(np.float16 if storage.format == "float16" else np.float32))


def _hessian(forward: Gpt2Forward, index: int, layer: Layer, x: Tensor | None, name: str) -> Hessian:
    """Sums ``x.T @ x`` over the inputs of one product of `layer`, when asked."""

    def compute() -> npt.NDArray[np.float32]:
        assert x is not None, "4 bits want calibration text"
        sums: list[Tensor] = []

        def watch(linear: Linear, inputs: Tensor) -> None:
            if linear.name == name:
                flat = inputs.reshape(-1, inputs.shape[-1])  # (R·T, K)
                sums.append(flat.T @ flat)

        forward.layer(index, layer, x, watch)
        total: npt.NDArray[np.float32] = torch.stack(sums).sum(dim=0).numpy()
        return total

    return compute


def _collect(seen: dict[str, list[Tensor]]) -> Watch:
    def watch(linear: Linear, inputs: Tensor) -> None:
        flat = inputs.reshape(-1, inputs.shape[-1])
        seen.setdefault(linear.name, []).append(flat[:: max(1, len(flat) // SAMPLE_TOKENS)])

    return watch


def _smoothed(layer: Layer, recipe: Recipe, inputs: dict[str, Tensor]) -> Layer:
    """The same function; `inputs` are samples (tokens, K) of what each product sees, by its name."""

    def factors(linear: Linear) -> Array | None:
        storage = recipe.storage[linear.name]
        if storage.format not in ("int8_row", "block"):
            return None
        found = inputs[linear.name]
        return best_factors(linear.weight, found[:: max(1, len(found) // SAMPLE_TOKENS)], storage)

    for_qkv, for_values, for_mlp = factors(layer.qkv), factors(layer.attention_out), factors(layer.mlp_in)
    if for_qkv is not None:
        norm, qkv = fold_norm(layer.attention_norm, layer.qkv, for_qkv)
        layer = replace(layer, attention_norm=norm, qkv=qkv)
    if for_values is not None:
        qkv, out = fold_values(layer.qkv, layer.attention_out, for_values)
        layer = replace(layer, qkv=qkv, attention_out=out, value_divisors=for_values)
    if for_mlp is not None:
        norm, mlp_in = fold_norm(layer.mlp_norm, layer.mlp_in, for_mlp)
        layer = replace(layer, mlp_norm=norm, mlp_in=mlp_in)
    return layer
