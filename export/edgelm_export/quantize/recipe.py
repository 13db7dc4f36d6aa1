"""Recipes: how every matrix is stored, and the fixed ones that have a name."""

from collections.abc import Mapping
from dataclasses import dataclass

from edgelm.bundle.manifest import FixedPrecision, Precision
from edgelm_export.model.gpt2 import Gpt2Weights
from edgelm_export.quantize.storage import FLOAT16, FLOAT32, INT8_ROW, Storage

POSITION_TABLE = "transformer.wpe.weight"
TOKEN_TABLE = "transformer.wte.weight"
HEAD = "lm_head.weight"

BLOCK4 = Storage("block", 4, 256)
BLOCK4_FINE = Storage("block", 4, 32)
BLOCK8 = Storage("block", 8, 256)


@dataclass(frozen=True)
class Recipe:
    """How every matrix is stored."""

    name: Precision
    storage: Mapping[str, Storage]
    """By the matrix's name in the checkpoint."""

    @property
    def is_quantized(self) -> bool:
        """Whether anything is to be rounded to integers, which wants calibration."""
        return any(stored.format in ("int8_row", "block") for stored in self.storage.values())

    @property
    def wants_inputs(self) -> bool:
        """Whether GPTQ rounds a matrix, which asks what the products see; 8 bits and floats do not."""
        return any(stored.bits == 4 for stored in self.storage.values())


def body_matrices(weights: Gpt2Weights) -> list[str]:
    """The names of the products of all layers, in the order a token passes them."""
    return [
        linear.name
        for layer in weights.layers
        for linear in (layer.qkv, layer.attention_out, layer.mlp_in, layer.mlp_out)
    ]


def table_matrices(weights: Gpt2Weights) -> list[str]:
    """The token table, and the head where that is another matrix."""
    return [TOKEN_TABLE] if weights.head is None else [TOKEN_TABLE, HEAD]


def fixed_recipe(name: FixedPrecision, weights: Gpt2Weights) -> Recipe:
    """The recipe called "fp32", "fp16", "int8", "w8a8", "int4" or "int4-small"."""
    by_name: dict[FixedPrecision, tuple[Storage, Storage, Storage]] = {
        "fp32": (FLOAT32, FLOAT32, FLOAT32),
        "fp16": (FLOAT16, FLOAT16, FLOAT16),
        "int8": (BLOCK8, BLOCK8, FLOAT32),
        "w8a8": (INT8_ROW, BLOCK8, FLOAT32),
        "int4": (BLOCK4, BLOCK8, FLOAT32),
        "int4-small": (BLOCK4, BLOCK4, FLOAT32),
    }
    body, tables, positions = by_name[name]
    return Recipe(
        name,
        dict.fromkeys(body_matrices(weights), body)
        | dict.fromkeys(table_matrices(weights), tables)
        | {POSITION_TABLE: positions},
    )
