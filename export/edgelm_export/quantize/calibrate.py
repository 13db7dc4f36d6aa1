"""From float weights to stored matrices, layer by layer, with the activations that calibration text causes."""

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from edgelm.ids import IdArray
from edgelm_export.model.decoder import Array, DecoderWeights, Layer, Linear, Table
from edgelm_export.model.forward import DecoderForward, Visit
from edgelm_export.quantize.cache_scales import CacheScales
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
    cache_scales: tuple[CacheScales, ...] | None = None
    """Of each layer, where the cache holds integers."""


def smooth(weights: DecoderWeights, recipe: StorageRecipe, rows: IdArray) -> DecoderWeights:
    """The same function with weights that lose less when they are stored as `recipe` says; `rows` (R, T) calibrate."""
    forward = DecoderForward(weights)
    x = forward.embed(rows)  # (R, T, D)
    layers = []
    for layer in weights.layers:
        inputs: dict[str, Tensor] = {}
        x = forward.layer(layer, x, _sample_into(inputs))
        layers.append(_smoothed(layer, weights, recipe, inputs))
    return _with_smoothed_head(replace(weights, layers=tuple(layers)), recipe, forward.final(x))


def store(weights: DecoderWeights, recipe: StorageRecipe, rows: IdArray | None) -> StoredDecoder:
    """Store every matrix of `weights` as `recipe` says.

    Each product is stored with the input that the stored products before it give. Later products therefore make up for
    the errors of earlier ones.

    Args:
        rows: calibration text, (R, T); None only where the recipe needs no inputs.
    """
    assert rows is not None or not recipe.needs_inputs, "4 bits need calibration text"
    positions, head = weights.position_table, weights.head
    stored: dict[str, Stored] = {}

    def restored(table: Table) -> Table:
        return replace(table, weight=stored[table.name].restored())

    if positions is not None:
        stored[positions.name] = _in_float(positions.weight, recipe.float_storage)
        positions = restored(positions)
    forward = DecoderForward(replace(weights, position_table=positions))
    x = forward.embed(rows) if rows is not None and recipe.needs_inputs else None  # (R, T, D)
    products: dict[str, Linear] = {}  # as they are restored

    def store_product(linear: Linear, inputs: Tensor | None) -> Linear:
        stored[linear.name] = found = _store_product(linear.weight, recipe.storage[linear.name], inputs)
        products[linear.name] = replace(linear, weight=as_product(found))
        return products[linear.name]

    layers = []
    for layer in weights.layers:
        if x is not None:
            x = forward.layer(layer, x, store_product)
        else:
            for linear in layer.products:
                store_product(linear, None)
        layers.append(layer.with_products([products[linear.name] for linear in layer.products]))
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


def _store_product(weight: Array, storage: Storage, inputs: Tensor | None) -> Stored:
    """Store `weight` (K, N); `inputs` (R, T, K) enter the product."""
    if storage.keeps_grid:
        grid = find_grid(np.ascontiguousarray(weight.T))
        assert grid is not None, "only a matrix on a grid can keep it"
        return grid
    if storage.format == "block":
        return _in_blocks(np.ascontiguousarray(weight.T), storage, inputs)
    return quantize_columns(weight) if storage.format == "int8_row" else _in_float(weight, storage)


def store_table(table: Array, storage: Storage, head_inputs: Tensor | None = None) -> Stored:
    """Store a token table or a head.

    Args:
        table: (V, D).
        head_inputs: inputs of the head, (R, T, D), where the table is the head. 4 bits are then rounded for the logits,
            because logits suffer more than looked-up rows.
    """
    return _in_blocks(table, storage, head_inputs) if storage.format == "block" else _in_float(table, storage)


def _in_blocks(rows: Array, storage: Storage, inputs: Tensor | None) -> Stored:
    """Store `rows` (N, K), at 4 bits with GPTQ where `inputs` (R, T, K) are known; 8 bits leave it nothing to do."""
    assert storage.block_size is not None
    size = block_size_for(rows.shape[1], storage.block_size)
    if inputs is None or not storage.uses_gptq:
        return quantize_blocks(rows, storage.bits, size)
    return gptq_blocks(rows, _squared(inputs).numpy(), storage.bits, size)


def _in_float(array: Array, storage: Storage) -> FloatStored:
    return FloatStored(array.astype(np.float16 if storage.format == "float16" else np.float32))


def _squared(inputs: Tensor) -> Tensor:
    """The sum (K, K) of ``x.T @ x`` over `inputs` (R, T, K)."""
    flat = inputs.reshape(-1, inputs.shape[-1])
    return flat.T @ flat


def _sample_into(inputs: dict[str, Tensor]) -> Visit:
    """A visit that puts a sample (tokens, K) of each product's input into `inputs`, by the product's name."""

    def visit(linear: Linear, x: Tensor) -> Linear:
        inputs[linear.name] = _sample(x)
        return linear

    return visit


def _sample(x: Tensor) -> Tensor:
    """About `SAMPLE_TOKENS` rows (tokens, K) of `x` (R, T, K)."""
    flat = x.reshape(-1, x.shape[-1])
    return flat[:: max(1, len(flat) // SAMPLE_TOKENS)]


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
    some_rows = table.weight[:: max(1, len(table.weight) // SAMPLE_ROWS)]
    factors = best_factors(np.ascontiguousarray(some_rows.T), _sample(inputs), storage)
    smoothed = replace(table, weight=table.weight * factors)
    if weights.head is None:
        return replace(weights, token_table=smoothed, head_divisors=factors)
    return replace(weights, head=smoothed, head_divisors=factors)


def _smoothed(layer: Layer, weights: DecoderWeights, recipe: StorageRecipe, inputs: dict[str, Tensor]) -> Layer:
    """Smooth one layer of `weights`; `inputs` are samples (tokens, K) of what enters each product, by its name."""

    def factors(linear: Linear, shared: tuple[int, int] = (1, 1)) -> Array | None:
        storage = recipe.storage[linear.name]
        if storage.format not in ("int8_row", "block") or storage.keeps_grid:
            return None
        return best_factors(linear.weight, inputs[linear.name], storage, shared)

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
