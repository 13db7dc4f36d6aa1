"""Writes matrix products, lookups and logits, with the operators that each way of storing a matrix needs.

Every matrix that is written is accounted for, with its error.
Shapes: B batch, T new tokens, N rows of logits, D hidden size, V vocabulary; a product's weight is (K, N).
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from edgelm.bundle.manifest import Matrix
from edgelm_export.graph.writer import CONTRIB, LOCAL, OPSET, GraphWriter
from edgelm_export.model.decoder import Array, Linear, Table
from edgelm_export.quantize.storage import BlockQuantized, FloatStored, RowQuantized, Stored, relative_error


class Products:
    """Writes whatever uses a stored matrix."""

    def __init__(self, writer: GraphWriter, stored: Mapping[str, Stored], dtype: type[np.floating]) -> None:
        """Begin an account without matrices.

        Args:
            writer: where to write.
            stored: the stored matrices by the names of their sources.
            dtype: of the activations, norms, biases and keys and values.
        """
        self.dtype = dtype
        self.matrices: list[Matrix] = []
        """The account of all matrices written so far."""
        self._writer = writer
        self._stored = stored
        self._names: dict[str, str] = {}

    def linear(self, x: str, linear: Linear, out: str) -> str:
        """Write ``x @ weight + bias``; returns the name of the output.

        Args:
            x: name of the input, (B, T, K).
            linear: the source that the stored matrix replaces.
            out: name of the output, (B, T, N).
        """
        name, shape = linear.name, linear.weight.shape
        stored = self._stored[name]
        if isinstance(stored, BlockQuantized):
            self._account(name, shape, stored, linear.weight.T)
            return self._blocks(x, stored, self._add_blocks(name, stored, stored.packed), out, linear.bias)
        if isinstance(stored, RowQuantized):
            self._account(name, shape, stored, linear.weight.T)
            self._writer.function(row_quantized_matmul())
            values = self._writer.weight(name, stored.values)
            scales = self._writer.weight(f"{name}.scales", stored.scales)
            product = self._writer.node("RowQuantizedMatMul", [x, values, scales], f"{out}.product", domain=LOCAL)
        else:
            self._account(name, shape, stored, linear.weight)
            product = self._writer.node("MatMul", [x, self._writer.weight(name, stored.values)], f"{out}.product")
        bias = self._writer.weight(f"{out}.bias", linear.bias.astype(self.dtype))
        return self._writer.node("Add", [product, bias], out)

    def token_lookup(self, ids: str, table: Table, out: str) -> str:
        """Write the lookup of the rows `ids` (B, T) of the token table (V, D); returns the name of the output."""
        name, stored = table.name, self._stored[table.name]
        self._account(name, table.weight.shape, stored, table.weight)
        if isinstance(stored, FloatStored):
            self._names[name] = self._writer.weight(name, stored.values)
            return self._writer.node("Gather", [self._names[name], ids], out)
        assert isinstance(stored, BlockQuantized)
        # Flat for the lookup and reshaped at the head: ONNX Runtime keeps this copy mapped and frees the folded copy.
        packed, scales = self._add_blocks(name, stored, stored.packed.reshape(len(table.weight), -1))
        exact = stored.scales.shape[1] * stored.block_size == stored.columns
        rows = self._writer.node(
            "GatherBlockQuantized",
            [packed, ids, scales],
            out if exact else f"{out}.padded",
            {"bits": stored.bits, "block_size": stored.block_size, "gather_axis": 0, "quantize_axis": 1},
            domain=CONTRIB,
        )
        if exact:
            return rows
        bounds = [("slice_start", 0), ("slice_end", stored.columns), ("slice_axis", 2)]
        names = [self._writer.weight(f"{out}.{name}", np.array([value], np.int64)) for name, value in bounds]
        return self._writer.node("Slice", [rows, *names], out)

    def position_lookup(self, ids: str, table: Table, out: str) -> str:
        """Write the lookup of the rows `ids` (B, T) of the position table (C, D); returns the name of the output."""
        stored = self._stored[table.name]
        assert isinstance(stored, FloatStored)
        self._account(table.name, table.weight.shape, stored, table.weight)
        return self._writer.node("Gather", [self._writer.weight(table.name, stored.values), ids], out)

    def head(self, x: str, table: Table, out: str) -> str:
        """Write the logits; returns the name of the output.

        Args:
            x: name of the input, (N, D).
            table: the source of the head, (V, D); the token table, which is written already, where the two are tied.
            out: name of the output, (N, V).
        """
        name, stored, tied = table.name, self._stored[table.name], table.name in self._names
        if not tied:
            self._account(name, table.weight.shape, stored, table.weight)
        if isinstance(stored, FloatStored):
            weight = self._names[name] if tied else self._writer.weight(name, stored.values)
            # transB reads the (V, D) table as it is: no transposed copy of the tied weights.
            return self._writer.node("Gemm", [x, weight], out, {"transB": 1})
        assert isinstance(stored, BlockQuantized)
        if not tied:
            return self._blocks(x, stored, self._add_blocks(name, stored, stored.packed), out, None)
        shape = self._writer.weight(f"{out}.table_shape", np.array(stored.packed.shape, np.int64))
        packed = self._writer.node("Reshape", [self._names[name], shape], f"{out}.table")
        return self._blocks(x, stored, (packed, f"{name}.scales"), out, None)

    def _blocks(self, x: str, stored: BlockQuantized, names: tuple[str, str], out: str, bias: Array | None) -> str:
        # Inputs 3 and 4 are zero points, which symmetric codes lack, and a group index.
        inputs = [x, *names] if bias is None else [x, *names, "", "", self._writer.weight(f"{out}.bias", bias)]
        attributes: dict[str, int | float] = {
            "K": stored.columns,
            "N": len(stored.packed),
            "bits": stored.bits,
            "block_size": stored.block_size,
            "accuracy_level": 4,  # int8 activations in blocks; every other level dequantizes B at each call
        }
        return self._writer.node("MatMulNBits", inputs, out, attributes, domain=CONTRIB)

    def _add_blocks(self, name: str, stored: BlockQuantized, packed: npt.NDArray[np.uint8]) -> tuple[str, str]:
        self._names[name] = self._writer.weight(name, packed)
        return self._names[name], self._writer.weight(f"{name}.scales", stored.scales)

    def _account(self, name: str, shape: tuple[int, ...], stored: Stored, source: Array) -> None:
        storage = stored.storage
        error = relative_error(stored.restored(), source)
        self.matrices.append(Matrix(name, shape, storage.format, storage.bits, storage.block_size, error))


def row_quantized_matmul() -> onnx.FunctionProto:
    """The local function ``y = x @ (values * scales)`` with x quantized to 8 bits, one scale per row.

    A token's numbers depend on that token alone, not on its neighbours in a batch or a chunk. ONNX Runtime inlines the
    function and packs the weights. Its fast kernels take uint8 with zero point 128.
    """

    def constant(name: str, value: npt.ArrayLike, dtype: type[np.generic]) -> onnx.NodeProto:
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
