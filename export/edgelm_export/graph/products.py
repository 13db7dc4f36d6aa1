"""Writes matrix products, lookups and logits, with the operators that each way of storing a matrix needs.

Every matrix that is written is accounted for, with its error.
Shapes: B batch, T new tokens, N rows of logits, D hidden size, V vocabulary; a product's weight is (K, N).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from edgelm.bundle.manifest import Matrix
from edgelm.bundle.operators import CONTRIB, CONTRIB_OPSET, LOCAL, OPSET
from edgelm_export.graph.writer import GraphWriter, constant_node
from edgelm_export.model.decoder import Array, Linear, Table
from edgelm_export.quantize.storage import (
    GRID_BLOCK,
    BlockQuantized,
    FloatStored,
    GridQuantized,
    RowQuantized,
    Stored,
    relative_error,
)


@dataclass
class Products:
    """Writes whatever uses a stored matrix."""

    writer: GraphWriter
    stored: Mapping[str, Stored]
    """The stored matrices by their names in the checkpoint."""
    dtype: type[np.floating]
    """Type of the activations, norms, biases, keys and values."""
    matrices: list[Matrix] = field(default_factory=list)
    """The account of all matrices written so far."""
    _tables: set[str] = field(default_factory=set)
    """Names of the tables written so far."""

    def linear(self, x: str, linear: Linear, out: str) -> str:
        """Write `out` (B, T, N) = `x` (B, T, K) @ weight, plus the bias if any, of `linear`; returns the name `out`."""
        name, shape = linear.name, linear.weight.shape
        stored = self.stored[name]
        is_float = isinstance(stored, FloatStored)
        self._account(name, shape, stored, linear.weight if is_float else linear.weight.T)
        if isinstance(stored, BlockQuantized):
            return self._blocks(x, stored, self._add_blocks(name, stored, stored.packed), out, linear.bias)
        if isinstance(stored, GridQuantized):
            return self._grid(x, stored, name, out, linear.bias)
        values = self.writer.weight(name, stored.values)
        result = out if linear.bias is None else f"{out}.product"
        if isinstance(stored, RowQuantized):
            self.writer.function(row_quantized_matmul())
            scales = self.writer.weight(f"{name}.scales", stored.scales)
            product = self.writer.node("RowQuantizedMatMul", [x, values, scales], result, domain=LOCAL)
        else:
            product = self.writer.node("MatMul", [x, values], result)
        if linear.bias is None:
            return product
        bias = self.writer.weight(f"{out}.bias", linear.bias.astype(self.dtype))
        return self.writer.node("Add", [product, bias], out)

    def lookup(self, ids: str, table: Table, out: str) -> str:
        """Write `out` (B, T, D), the rows `ids` (B, T) of a table (rows, D); returns the name `out`."""
        name, stored = table.name, self.stored[table.name]
        self._account(name, table.weight.shape, stored, table.weight)
        self._tables.add(name)
        if isinstance(stored, FloatStored):
            return self.writer.node("Gather", [self.writer.weight(name, stored.values), ids], out)
        assert isinstance(stored, BlockQuantized)
        return self._rows(ids, name, stored, out)

    def _rows(self, ids: str, name: str, stored: BlockQuantized, out: str) -> str:
        """Write `out` (..., D), the rows `ids` (...) of the table `name`; returns the name `out`."""
        # Flat for the lookup and reshaped at the head: ONNX Runtime keeps this copy mapped and frees the folded copy.
        packed, scales = self._add_blocks(name, stored, stored.packed.reshape(len(stored.packed), -1))
        exact = stored.scales.shape[1] * stored.block_size == stored.columns
        rows = self.writer.node(
            "GatherBlockQuantized",
            [packed, ids, scales],
            out if exact else f"{out}.padded",
            {"bits": stored.bits, "block_size": stored.block_size, "gather_axis": 0, "quantize_axis": 1},
            domain=CONTRIB,
        )
        if exact:
            return rows
        bounds = [("slice_start", 0), ("slice_end", stored.columns), ("slice_axis", 2)]
        names = [self.writer.weight(f"{out}.{name}", np.array([value], np.int64)) for name, value in bounds]
        return self.writer.node("Slice", [rows, *names], out)

    def head_of_two_stages(self, x: str, table: Table, coarse: BlockQuantized, exact_logits: int, out: str) -> str:
        """Write the logits `out` (N, V) of `x` (N, D): all from the head `coarse`, then the likeliest from `table`.

        Only the rows of the likeliest tokens are read in the finer table. ONNX Runtime makes no copy of it, because it
        is only looked up. Returns the name `out`.
        """
        node, weight = self.writer.node, self.writer.weight
        name, stored = table.name, self.stored[table.name]
        assert isinstance(stored, BlockQuantized), "`with_two_stage_head` refuses other tables"
        if name not in self._tables:
            self._account(name, table.weight.shape, stored, table.weight)
        blocks = self._add_blocks("coarse_head", coarse, coarse.packed)
        rough = self._blocks(x, coarse, blocks, f"{out}.coarse", None)  # (N, V)
        count = weight(f"{out}.exact", np.array([exact_logits], np.int64))
        flags: dict[str, int | float] = {"axis": -1, "largest": 1, "sorted": 0}
        chosen = f"{out}.likeliest"  # (N, K)
        node("TopK", [rough, count], [f"{out}.largest", chosen], flags)
        rows = self._rows(chosen, name, stored, f"{out}.rows")  # (N, K, D)
        as_column = weight(f"{out}.column", np.array([-1, stored.columns, 1], np.int64))
        as_row = weight(f"{out}.row", np.array([-1, exact_logits], np.int64))
        state = node("Reshape", [x, as_column], f"{out}.state")  # (N, D, 1)
        products = node("MatMul", [rows, state], f"{out}.products")  # (N, K, 1)
        exact = node("Reshape", [products, as_row], f"{out}.replaced")  # (N, K)
        return node("ScatterElements", [rough, chosen, exact], out, {"axis": 1})

    def head(self, x: str, table: Table, out: str) -> str:
        """Write the logits `out` (N, V) of `x` (N, D); returns the name `out`.

        Args:
            table: the source of the head, (V, D); the token table, which is written already, where the two are tied.
        """
        name, stored, is_tied = table.name, self.stored[table.name], table.name in self._tables
        if not is_tied:
            self._account(name, table.weight.shape, stored, table.weight)
        if isinstance(stored, FloatStored):
            weight = name if is_tied else self.writer.weight(name, stored.values)
            # transB reads the (V, D) table as it is: no transposed copy of the tied weights.
            return self.writer.node("Gemm", [x, weight], out, {"transB": 1})
        assert isinstance(stored, BlockQuantized)
        if not is_tied:
            return self._blocks(x, stored, self._add_blocks(name, stored, stored.packed), out, None)
        shape = self.writer.weight(f"{out}.table_shape", np.array(stored.packed.shape, np.int64))
        packed = self.writer.node("Reshape", [name, shape], f"{out}.table")
        return self._blocks(x, stored, (packed, f"{name}.scales"), out, None)

    def _blocks(
        self,
        x: str,
        stored: BlockQuantized,
        names: tuple[str, str],
        out: str,
        bias: Array | None,
        zero_points: str = "",
    ) -> str:
        # Input 4 is a group index. Codes without zero points are symmetric.
        inputs = [x, *names, zero_points, "", "" if bias is None else self.writer.weight(f"{out}.bias", bias)]
        while not inputs[-1]:
            inputs.pop()
        attributes: dict[str, int | float] = {
            "K": stored.columns,
            "N": len(stored.packed),
            "bits": stored.bits,
            "block_size": stored.block_size,
            "accuracy_level": 4,  # int8 activations in blocks; every other level dequantizes B at each call
        }
        return self.writer.node("MatMulNBits", inputs, out, attributes, domain=CONTRIB)

    def _grid(self, x: str, stored: GridQuantized, name: str, out: str, bias: Array | None) -> str:
        """Write a product on a kept grid. Remainders of the grid take the sums of the blocks of `x`, behind `x`."""
        if stored.has_remainders:
            shape = self.writer.weight(f"{out}.blocks", np.array([0, 0, stored.columns // GRID_BLOCK, -1], np.int64))
            axis = self.writer.weight(f"{out}.in_block", np.array([-1], np.int64))
            blocks = self.writer.node("Reshape", [x, shape], f"{out}.in_blocks")  # (B, T, K / 32, 32)
            sums = self.writer.node("ReduceSum", [blocks, axis], f"{out}.sums", {"keepdims": 0})  # (B, T, K / 32)
            x = self.writer.node("Concat", [x, sums], f"{out}.with_sums", {"axis": -1})  # (B, T, K + K / 32)
        packed = stored.packed_zero_points()
        zero_points = "" if packed is None else self.writer.weight(f"{name}.zero_points", packed)
        names = self._add_blocks(name, stored.codes, stored.codes.packed)
        return self._blocks(x, stored.codes, names, out, bias, zero_points)

    def _add_blocks(self, name: str, stored: BlockQuantized, packed: npt.NDArray[np.uint8]) -> tuple[str, str]:
        names = self.writer.weight(name, packed), self.writer.weight(f"{name}.scales", stored.scales)
        if stored.scales.dtype == np.float32:
            return names
        # The product takes scales of the type of its input. ONNX Runtime widens them once, when it loads the graph.
        return names[0], self.writer.node("Cast", [names[1]], f"{names[1]}.wide", {"to": onnx.TensorProto.FLOAT})

    def _account(self, name: str, shape: tuple[int, ...], stored: Stored, source: Array) -> None:
        storage = stored.storage
        error = relative_error(stored.restored(), source)
        self.matrices.append(Matrix(name, shape, storage.format, storage.bits, storage.block_size, error))


def row_quantized_matmul() -> onnx.FunctionProto:
    """The local function ``y = x @ (values * scales)`` with x quantized to 8 bits, one scale per row.

    A token's numbers depend on that token alone, not on its neighbours in a batch or a chunk. ONNX Runtime inlines the
    function and packs the weights. Its fast kernels take uint8 with zero point 128.
    """

    nodes = [
        constant_node("last_axis", np.array([-1], np.int64)),
        constant_node("tiny", np.array(1e-30, np.float32)),
        constant_node("step", np.array(1 / 127, np.float32)),
        constant_node("zero_point", np.array(128, np.uint8)),
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
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, CONTRIB_OPSET)]
    return helper.make_function(LOCAL, "RowQuantizedMatMul", ["x", "values", "scales"], ["y"], nodes, opsets)
