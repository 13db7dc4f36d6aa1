"""Writes products, lookups and logits of stored matrices: which operators each way of storing asks for.

Every matrix written is accounted for, with the error it makes.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from onnx import helper, numpy_helper

from edgelm.bundle.manifest import Matrix
from edgelm_export.graph.writer import CONTRIB, LOCAL, OPSET, GraphWriter
from edgelm_export.quantize.recipe import HEAD, POSITION_TABLE, TOKEN_TABLE
from edgelm_export.quantize.storage import Array, BlockQuantized, FloatStored, RowQuantized, Stored, relative_error


class Products:
    """What the graph asks for wherever a matrix is used."""

    def __init__(self, writer: GraphWriter, stored: Mapping[str, Stored], dtype: type[np.floating]) -> None:
        """Args: where to write, the matrices by name, and the type of activations, norms, biases and KV cache."""
        self.dtype = dtype
        self.matrices: list[Matrix] = []
        """The account of all matrices written so far."""
        self._writer = writer
        self._stored = stored
        self._names: dict[str, str] = {}

    def linear(self, x: str, name: str, source: Array, bias: Array | None, out: str) -> str:
        """``x @ weight``, plus the bias where one is given.

        Args:
            x: (B, T, K).
            name: of the matrix in the checkpoint.
            source: (K, N), what the stored matrix stands in for.
        """
        stored = self._stored[name]
        if isinstance(stored, BlockQuantized):
            self._account(name, source.shape, stored, source.T)
            return self._blocks(x, stored, self._add_blocks(name, stored, stored.packed), out, bias)
        self._account(name, source.shape, stored, source.T if isinstance(stored, RowQuantized) else source)
        product = out if bias is None else f"{out}.product"
        if isinstance(stored, RowQuantized):
            self._writer.function(row_quantized_matmul())
            inputs = [
                x,
                self._writer.weight(name, stored.values),
                self._writer.weight(f"{name}.scales", stored.scales),
            ]
            self._writer.node("RowQuantizedMatMul", inputs, product, domain=LOCAL)
        else:
            self._writer.node("MatMul", [x, self._writer.weight(name, stored.values)], product)
        if bias is None:
            return product
        return self._writer.node("Add", [product, self._writer.weight(f"{out}.bias", bias.astype(self.dtype))], out)

    def token_lookup(self, ids: str, source: Array, out: str) -> str:
        """Rows `ids` (B, T) of the token table, whose source is (V, D)."""
        stored = self._stored[TOKEN_TABLE]
        self._account(TOKEN_TABLE, source.shape, stored, source)
        if isinstance(stored, FloatStored):
            self._names[TOKEN_TABLE] = self._writer.weight(TOKEN_TABLE, stored.values)
            return self._writer.node("Gather", [self._names[TOKEN_TABLE], ids], out)
        assert isinstance(stored, BlockQuantized)
        # Flat for the lookup, reshaped at the head: ORT then keeps this one mapped and frees the folded copy.
        table, scales = self._add_blocks(TOKEN_TABLE, stored, stored.packed.reshape(len(source), -1))
        exact = stored.scales.shape[1] * stored.block_size == stored.columns
        rows = self._writer.node(
            "GatherBlockQuantized",
            [table, ids, scales],
            out if exact else f"{out}.padded",
            {"bits": stored.bits, "block_size": stored.block_size, "gather_axis": 0, "quantize_axis": 1},
            domain=CONTRIB,
        )
        if exact:
            return rows
        bounds = [("slice_start", 0), ("slice_end", stored.columns), ("slice_axis", 2)]
        names = [self._writer.weight(f"{out}.{name}", np.array([value], np.int64)) for name, value in bounds]
        return self._writer.node("Slice", [rows, *names], out)

    def position_lookup(self, ids: str, source: Array, out: str) -> str:
        """Rows `ids` (B, T) of the position table (C, D)."""
        stored = self._stored[POSITION_TABLE]
        assert isinstance(stored, FloatStored)
        self._account(POSITION_TABLE, source.shape, stored, source)
        return self._writer.node("Gather", [self._writer.weight(POSITION_TABLE, stored.values), ids], out)

    def head(self, x: str, source: Array | None, out: str) -> str:
        """Logits (N, V) of x (N, D); `source` is None where the token table serves."""
        name = TOKEN_TABLE if source is None else HEAD
        stored = self._stored[name]
        if source is not None:
            self._account(HEAD, source.shape, stored, source)
        if isinstance(stored, FloatStored):
            table = self._names[TOKEN_TABLE] if source is None else self._writer.weight(HEAD, stored.values)
            # transB reads the (V, D) table as it lies: no transposed copy of the tied weights.
            return self._writer.node("Gemm", [x, table], out, {"transB": 1})
        assert isinstance(stored, BlockQuantized)
        if source is not None:
            return self._blocks(x, stored, self._add_blocks(HEAD, stored, stored.packed), out, None)
        shape = self._writer.weight(f"{out}.table_shape", np.array(stored.packed.shape, np.int64))
        packed = self._writer.node("Reshape", [self._names[TOKEN_TABLE], shape], f"{out}.table")
        return self._blocks(x, stored, (packed, f"{TOKEN_TABLE}.scales"), out, None)

    def _blocks(self, x: str, stored: BlockQuantized, names: tuple[str, str], out: str, bias: Array | None) -> str:
        # Inputs 3 and 4 are zero points (none: symmetric) and a group index.
        inputs = [x, *names] if bias is None else [x, *names, "", "", self._writer.weight(f"{out}.bias", bias)]
        attributes: dict[str, int | float] = {
            "K": stored.columns,
            "N": len(stored.packed),
            "bits": stored.bits,
            "block_size": stored.block_size,
            "accuracy_level": 4,  # int8 activations per block; every other level dequantizes B at each call
        }
        return self._writer.node("MatMulNBits", inputs, out, attributes, domain=CONTRIB)

    def _add_blocks(self, name: str, stored: BlockQuantized, packed: npt.NDArray[np.uint8]) -> tuple[str, str]:
        self._names[name] = self._writer.weight(name, packed)
        return self._names[name], self._writer.weight(f"{name}.scales", stored.scales)

    def _account(self, name: str, shape: tuple[int, ...], stored: Stored, source: Array) -> None:
        storage = stored.storage
        error = relative_error(stored.restored(), source)
        self.matrices.append(Matrix(name, shape, storage.format, storage.bits, storage.block_size, error))


def row_quantized_matmul() -> object:
    """The local function ``y = x @ (values * scales)`` with x quantized to 8 bits, one scale per row.

    A token's numbers depend on that token alone: neighbours in a batch or a chunk change nothing. ORT inlines the
    function and packs the weights. uint8 with zero point 128 is the form its fast kernels take.
    """

    def constant(name: str, value: npt.ArrayLike, dtype: type[np.generic]) -> object:
        return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(value, dtype), name))

    nodes = [
        constant("last_axis", [-1], np.int64),
        constant("tiny", 1e-30, np.float32),
        constant("step", 1 / 127, np.float32),
        constant("zero_point", 128, np.uint8),
        helper.make_node("Abs", ["x"], ["magnitude"]),
        helper.make_node("ReduceMax", ["magnitude", "last_axis"], ["peak"], keepdims=1),  # (B, T, 1)
        helper.make_node("Max", ["peak", "tiny"], ["row_scale"]),
        helper.make_node("Div", ["x", "row_scale"], ["scaled"]),  # -1 to 1
        helper.make_node("QuantizeLinear", ["scaled", "step", "zero_point"], ["codes"]),  # (B, T, K) uint8
        helper.make_node(
            "MatMulIntegerToFloat", ["codes", "values", "step", "scales", "zero_point"], ["unscaled"], domain=CONTRIB
        ),
        helper.make_node("Mul", ["unscaled", "row_scale"], ["y"]),  # (B, T, N)
    ]
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    return helper.make_function(LOCAL, "RowQuantizedMatMul", ["x", "values", "scales"], ["y"], nodes, opsets)
