"""Recipes: how each matrix is to be stored, and the fixed recipes that have a name."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from edgelm.bundle.manifest import FixedPrecision, Precision
from edgelm.errors import ExportError
from edgelm_export.model.decoder import DecoderWeights
from edgelm_export.quantize.grid import find_grid
from edgelm_export.quantize.storage import FLOAT16, FLOAT32, GRID4, INT8_ROW, Storage

BLOCK4 = Storage("block", 4, 256)
BLOCK4_FINE = Storage("block", 4, 32)
BLOCK8 = Storage("block", 8, 256)
GATED_BLOCKS = {4: 64, 8: 32}
"""By its bits, the largest block of the product behind a gate. A gate multiplies two activations, and so makes the
largest outliers of all, and a block of activations has one scale. At 4 bits rounding of the weights costs more."""
GATED_HEAD = Storage("block", 8, 32)
"""The tables of int8 where the MLPs are gated."""
COARSE_HEAD = Storage("block", 4, 64)
"""The first stage of a head of two stages. Smaller blocks lose less and take more memory, because ONNX Runtime keeps
two floats for each block."""
EXACT_LOGITS = 128
"""The number of likeliest tokens whose logits the second stage computes."""


@dataclass(frozen=True)
class StorageRecipe:
    """How to store a decoder. (The manifest's `Recipe` says how it was stored.)"""

    name: Precision
    storage: Mapping[str, Storage]
    """The storage of each product, of the token table and of the head, by the matrix's name in the checkpoint."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the activations, norms, biases, positions and keys and values."""
    coarse_head: Storage | None = None
    """How the head is stored once more, in fewer bits, to find the likeliest tokens; None for a head of one stage."""

    @property
    def is_quantized(self) -> bool:
        """Whether a matrix is rounded to integers, which needs calibration text."""
        return any(storage.format in ("int8_row", "block") for storage in self.storage.values())

    @property
    def needs_inputs(self) -> bool:
        """Whether GPTQ rounds a matrix."""
        return self.coarse_head is not None or any(storage.uses_gptq for storage in self.storage.values())

    @property
    def float_storage(self) -> Storage:
        """How floats are stored, the position table among them."""
        return FLOAT16 if self.dtype == "float16" else FLOAT32


def uniform_storage(weights: DecoderWeights, products: Storage, tables: Storage) -> dict[str, Storage]:
    """One storage for all products, and one for the token table and the head."""
    storage = {linear.name: products for linear in weights.products}
    return storage | {table.name: tables for table in weights.tables}


def fixed_recipe(name: FixedPrecision, weights: DecoderWeights) -> StorageRecipe:
    """The recipe called "fp32", "fp16", "int8", "w8a8", "int4" or "int4-small"."""
    products, tables = {
        "fp32": (FLOAT32, FLOAT32),
        "fp16": (FLOAT16, FLOAT16),
        "int8": (BLOCK8, BLOCK8),
        "w8a8": (INT8_ROW, BLOCK8),
        "int4": (BLOCK4, BLOCK8),
        "int4-small": (BLOCK4, BLOCK4),
    }[name]
    dtype: Literal["float32", "float16"] = "float16" if name == "fp16" else "float32"
    storage = uniform_storage(weights, products, tables)
    for layer in weights.layers:
        if layer.is_gated and products.format == "block":
            storage[layer.mlp_out.name] = replace(products, block_size=GATED_BLOCKS[products.bits])
    if name == "int8" and any(layer.is_gated for layer in weights.layers):
        storage |= {table.name: GATED_HEAD for table in weights.tables}
    if products is BLOCK4:
        for linear in weights.products:
            if find_grid(np.ascontiguousarray(linear.weight.T)) is not None:
                storage[linear.name] = GRID4
    return StorageRecipe(name, storage, dtype)


def with_two_stage_head(recipe: StorageRecipe, weights: DecoderWeights) -> StorageRecipe:
    """`recipe` with a head of two stages; raises ExportError where its head is not stored in 8 bits."""
    storage = recipe.storage[weights.output_table.name]
    if storage.format != "block" or storage.bits != 8:
        raise ExportError(
            f"a head of two stages needs a table of 8 bits, but {recipe.name} has {storage.bits} bits there: choose "
            "int8, w8a8 or int4"
        )
    if weights.architecture.vocab_size < 2 * EXACT_LOGITS:
        raise ExportError(
            f"a head of two stages computes {EXACT_LOGITS} logits exactly, and a vocabulary of "
            f"{weights.architecture.vocab_size:,} tokens has too few others: leave it out"
        )
    return replace(recipe, coarse_head=COARSE_HEAD)
