"""From float weights to stored matrices, layer by layer, with the activations that calibration text causes."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from edgelm.ids import IdArray
from edgelm_export.model.decoder import PRODUCTS, Array, DecoderWeights, Layer, Linear, Table
from edgelm_export.model.forward import DecoderForward, Watch
from edgelm_export.quantize.gptq import gptq_blocks
from edgelm_export.quantize.grid import find_grid
from edgelm_export.quantize.recipe import StorageRecipe
from edgelm_export.quantize.smooth import best_factors, fold_columns, fold_norm
from edgelm_export.quantize.storage import (
    BlockQuantized,
    FloatStored,
    Storage,
    Stored,
    block_size_for,
    quantize_blocks,
    quantize_columns,
)

SAMPLE_TOKENS = 512
"""Tokens on which smoothing factors are compared."""
SAMPLE_ROWS = 4096
"""Rows of the head on which its factors are compared."""


@dataclass(frozen=True)
class StoredDecoder:
    """A decoder whose matrices are stored as a recipe says."""

    recipe: StorageRecipe
    source: DecoderWeights
    """The weights before they were stored. Errors are measured against them; their norms and biases ship."""
    restored: DecoderWeights
    """The float32 weights that the stored matrices stand for."""
    stored: dict[str, Stored]
    """By the matrix's name in the checkpoint."""
    coarse_head: BlockQuantized | None = None
    """The head once more, in fewer bits, where it has two stages."""


def smooth(weights: DecoderWeights, recipe: StorageRecipe, rows: IdArray) -> DecoderWeights:
    """The same function with weights that lose less when they are stored as `recipe` says; `rows` (R, T) calibrate."""
    forward = DecoderForward(weights)
    x = forward.embed(rows)  # (R, T, D)
    layers = []
    for layer in weights.layers:
        seen: dict[str, list[Tensor]] = {}
        x = forward.layer(layer, x, _collect(seen))
        inputs = {name: torch.cat(parts) for name, parts in seen.items()}
        layers.append(_smoothed(layer, weights, recipe, inputs))
    return _with_smoothed_head(replace(weights, layers=tuple(layers)), recipe, forward.final(x))


def store(weights: DecoderWeights, recipe: StorageRecipe, rows: IdArray | None) -> StoredDecoder:
    """Store every matrix of `weights` as `recipe` says.

    Each layer is stored with the inputs that the stored layers before it give. Later layers therefore make up for the
    errors of earlier layers.

    Args:
        rows: calibration text, (R, T); None only where the recipe needs no inputs.
    """
    positions, head = weights.position_table, weights.head
    stored: dict[str, Stored] = {}

    def restored(table: Table) -> Table:
        return replace(table, weight=stored[table.name].restored())

    if positions is not None:
        stored[positions.name] = _in_float(positions.weight, recipe.float_storage)
        positions = restored(positions)
    forward = DecoderForward(replace(weights, position_table=positions))
    x = forward.embed(rows) if rows is not None and recipe.needs_inputs else None  # (R, T, D)
    layers = []
    for layer in weights.layers:
        for field in PRODUCTS:
            linear = layer.product(field)
            storage = recipe.storage[linear.name]
            hessian = _hessian(forward, layer, x, linear.name) if storage.uses_gptq else None
            stored[linear.name] = _store_product(linear.weight, storage, hessian)
            layer = layer.with_weight(field, as_product(stored[linear.name]))
        layers.append(layer)
        x = None if x is None else forward.layer(layer, x)
    head_inputs = None if x is None else forward.into_head(forward.final(x))  # (R, T, D)
    for table in weights.tables:
        inputs = head_inputs if table is weights.output_table else None
        stored[table.name] = store_table(table.weight, recipe.storage[table.name], inputs)
    coarse = None
    if recipe.coarse_head is not None:
        in_blocks = store_table(weights.output_table.weight, recipe.coarse_head, head_inputs)
        assert isinstance(in_blocks, BlockQuantized), "a coarse head is stored in blocks"
        coarse = in_blocks
    decoder = replace(forward.weights, layers=tuple(layers), token_table=restored(weights.token_table))
    decoder = replace(decoder, head=None if head is None else restored(head))
    return StoredDecoder(recipe, weights, decoder, stored, coarse)


def as_product(stored: Stored) -> Array:
    """The weight (K, N) that a stored product stands for."""
    return stored.restored() if isinstance(stored, FloatStored) else np.ascontiguousarray(stored.restored().T)


def _store_product(weight: Array, storage: Storage, hessian: Array | None) -> Stored:
    if storage.keeps_grid:
        grid = find_grid(np.ascontiguousarray(weight.T))
        assert grid is not None, "only a matrix on a grid can keep it"
        return grid
    if storage.format == "block":
        return _in_blocks(np.ascontiguousarray(weight.T), storage, hessian)
    return quantize_columns(weight) if storage.format == "int8_row" else _in_float(weight, storage)


def store_table(table: Array, storage: Storage, head_inputs: Tensor | None = None) -> Stored:
    """Store a token table or a head.

    Args:
        table: (V, D).
        head_inputs: inputs of the head, (R, T, D), where the table is the head. 4 bits are then rounded for the logits,
            because logits suffer more than looked-up rows.
    """
    if storage.format != "block":
        return _in_float(table, storage)
    hessian = _squared(head_inputs).numpy() if storage.uses_gptq and head_inputs is not None else None
    return _in_blocks(table, storage, hessian)


def _in_blocks(rows: Array, storage: Storage, hessian: Array | None) -> Stored:
    """Store `rows` (N, K): with GPTQ where there is a `hessian` (K, K); 8 bits leave it no error to make up for."""
    assert storage.block_size is not None
    size = block_size_for(rows.shape[1], storage.block_size)
    if hessian is None:
        return quantize_blocks(rows, storage.bits, size)
    return gptq_blocks(rows, hessian, storage.bits, size)


def _in_float(array: Array, storage: Storage) -> FloatStored:
    return FloatStored(array.astype(np.float16 if storage.format == "float16" else np.float32))


def _hessian(forward: DecoderForward, layer: Layer, x: Tensor | None, name: str) -> Array:
    """The Hessian (K, K) of the product `name` in `layer`, where `x` (R, T, D) enters that layer."""
    assert x is not None, "4 bits need calibration text"
    sums: list[Tensor] = []

    def watch(linear: Linear, inputs: Tensor) -> None:
        if linear.name == name:
            sums.append(_squared(inputs))

    forward.layer(layer, x, watch)
    total: Array = torch.stack(sums).sum(dim=0).numpy()
    return total


def _squared(inputs: Tensor) -> Tensor:
    """The sum (K, K) of ``x.T @ x`` over `inputs` (R, T, K)."""
    flat = inputs.reshape(-1, inputs.shape[-1])
    return flat.T @ flat


def _collect(seen: dict[str, list[Tensor]]) -> Watch:
    """A watch that appends a sample of each product's inputs to `seen`, by the product's name."""

    def watch(linear: Linear, inputs: Tensor) -> None:
        flat = inputs.reshape(-1, inputs.shape[-1])
        seen.setdefault(linear.name, []).append(flat[:: max(1, len(flat) // SAMPLE_TOKENS)])

    return watch


def _with_smoothed_head(weights: DecoderWeights, recipe: StorageRecipe, inputs: Tensor) -> DecoderWeights:
    """Smooth the head of `weights`; `inputs` (R, T, D) are what enters it.

    The final norm is an output of the graph and stays as it is. So one node divides what enters the head, and another
    one the looked-up rows, where the head is the token table. A model with learned positions, GPT-2, goes without:
    its head loses next to nothing.
    """
    table = weights.output_table
    storage = recipe.storage[table.name]
    if weights.position_table is not None or storage.format != "block":
        return weights
    sample = inputs.reshape(-1, inputs.shape[-1])
    some_rows = table.weight[:: max(1, len(table.weight) // SAMPLE_ROWS)]
    factors = best_factors(np.ascontiguousarray(some_rows.T), sample[:: max(1, len(sample) // SAMPLE_TOKENS)], storage)
    smoothed = replace(table, weight=table.weight * factors)
    if weights.head is None:
        return replace(weights, token_table=smoothed, head_divisors=factors)
    return replace(weights, head=smoothed, head_divisors=factors)


def _smoothed(layer: Layer, weights: DecoderWeights, recipe: StorageRecipe, inputs: dict[str, Tensor]) -> Layer:
    """Smooth one layer of `weights`; `inputs` are samples (tokens, K) of what enters each product, by its name."""

    def factors(linear: Linear, shared: tuple[int, int] = (1, 1)) -> Array | None:
        storage, sample = recipe.storage[linear.name], inputs[linear.name]
        if storage.format not in ("int8_row", "block") or storage.keeps_grid:
            return None
        return best_factors(linear.weight, sample[:: max(1, len(sample) // SAMPLE_TOKENS)], storage, shared)

    sizes = weights.architecture
    value_heads, shared_by = sizes.num_key_value_heads, sizes.num_heads // sizes.num_key_value_heads
    for_qkv, for_mlp = factors(layer.qkv), factors(layer.mlp_in)
    for_values = factors(layer.attention_out, (value_heads, shared_by))
    for_up = factors(layer.mlp_out) if layer.is_gated else None
    if for_qkv is not None:
        norm, qkv = fold_norm(layer.attention_norm, layer.qkv, for_qkv)
        layer = replace(layer, attention_norm=norm, qkv=qkv)
    if for_values is not None:
        of_heads = for_values.reshape(value_heads, shared_by, -1)[:, 0]  # (G, p)
        qkv, attention_out = fold_columns(layer.qkv, layer.attention_out, of_heads, shared_by)
        layer = replace(layer, qkv=qkv, attention_out=attention_out, value_divisors=of_heads.reshape(-1))
    elif recipe.storage[layer.attention_out.name].keeps_grid:
        layer = replace(layer, value_divisors=np.ones(value_heads * sizes.head_dim, np.float32))
    if for_mlp is not None:
        norm, mlp_in = fold_norm(layer.mlp_norm, layer.mlp_in, for_mlp)
        layer = replace(layer, mlp_norm=norm, mlp_in=mlp_in)
    if for_up is not None:
        mlp_in, mlp_out = fold_columns(layer.mlp_in, layer.mlp_out, for_up)
        layer = replace(layer, mlp_in=mlp_in, mlp_out=mlp_out)
    return layer
