"""How each precision recipe multiplies by a weight matrix, looks up a token, and computes the logits.

A recipe is a small object; the graph asks it for products and never for bits. Every matrix it stores it also
accounts for, with the error it made.
"""

from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
from onnx import helper, numpy_helper

from edgelm.manifest import Matrix, Precision
from edgelm_export.onnx_writer import CONTRIB, LOCAL, OPSET, GraphWriter
from edgelm_export.quantize import BlockQuantized, block_size_for, quantize_blocks, quantize_columns, relative_error
from edgelm_export.weights import Array, Linear


class Products(Protocol):
    """What the graph needs of a recipe."""

    dtype: type[np.floating]
    """Of activations, norms, biases and the KV cache."""
    matrices: list[Matrix]
    """The account of all matrices stored so far."""

    def linear(self, x: str, linear: Linear, out: str, *, bias: bool) -> str:
        """``x @ weight``, plus the bias where the next node does not add it; x is (B, T, K)."""
        ...

    def token_lookup(self, ids: str, table: Array, out: str) -> str:
        """Rows `ids` (B, T) of the token table (V, D)."""
        ...

    def head(self, x: str, head: Array | None, out: str) -> str:
        """Logits (N, V) of x (N, D); `head` is None where the token table serves."""
        ...


def products_for(precision: Precision, writer: GraphWriter) -> Products:
    """The recipe of that name."""
    if precision == "fp32":
        return FloatProducts(writer, np.float32)
    if precision == "fp16":
        return FloatProducts(writer, np.float16)
    return RowInt8Products(writer) if precision == "int8" else BlockProducts(writer, bits=4)


def store_float(name: str, array: Array, dtype: type[np.floating]) -> tuple[npt.NDArray[np.floating], Matrix]:
    """`array` in a float type, with its account."""
    stored = array.astype(dtype)
    bits = 8 * stored.dtype.itemsize
    kind: Literal["float32", "float16"] = "float32" if bits == 32 else "float16"
    return stored, Matrix(name, array.shape, kind, bits, None, relative_error(stored, array))


class FloatProducts:
    """fp32 and fp16: plain products; one table for tokens and head."""

    def __init__(self, writer: GraphWriter, dtype: type[np.floating]) -> None:
        self.dtype = dtype
        self.matrices: list[Matrix] = []
        self._writer = writer
        self._table = ""

    def linear(self, x: str, linear: Linear, out: str, *, bias: bool) -> str:
        name = self._store(linear.name, linear.weight)
        if not bias:
            return self._writer.node("MatMul", [x, name], out)
        product = self._writer.node("MatMul", [x, name], f"{out}.product")
        return self._writer.node(
            "Add", [product, self._writer.weight(f"{out}.bias", linear.bias.astype(self.dtype))], out
        )

    def token_lookup(self, ids: str, table: Array, out: str) -> str:
        self._table = self._store("transformer.wte.weight", table)
        return self._writer.node("Gather", [self._table, ids], out)

    def head(self, x: str, head: Array | None, out: str) -> str:
        table = self._table if head is None else self._store("lm_head.weight", head)
        # transB reads the (V, D) table as it lies: no transposed copy of the tied weights.
        return self._writer.node("Gemm", [x, table], out, {"transB": 1})

    def _store(self, name: str, array: Array) -> str:
        stored, account = store_float(name, array, self.dtype)
        self.matrices.append(account)
        return self._writer.weight(name, stored)


class BlockProducts:
    """4-bit blocks for the body, 8-bit blocks for the token table and the head, which are one tensor when tied."""

    dtype = np.float32
    TABLE_BITS = 8

    def __init__(self, writer: GraphWriter, *, bits: int) -> None:
        self.matrices: list[Matrix] = []
        self._writer = writer
        self._bits = bits
        self._table: tuple[str, str, BlockQuantized] | None = None

    def linear(self, x: str, linear: Linear, out: str, *, bias: bool) -> str:
        k, n = linear.weight.shape
        quantized = quantize_blocks(linear.weight.T, self._bits, block_size_for(k))
        names = self._store(linear.name, (k, n), quantized, quantized.packed)
        # Inputs 3 and 4 are zero points (none: symmetric) and a group index.
        inputs = [x, *names, "", "", self._writer.weight(f"{out}.bias", linear.bias)] if bias else [x, *names]
        return self._product(inputs, out, k, n, quantized)

    def token_lookup(self, ids: str, table: Array, out: str) -> str:
        quantized = quantize_blocks(table, self.TABLE_BITS, block_size_for(table.shape[1]))
        # Flat for the lookup, reshaped at the head: ORT then keeps this one mapped and frees the folded copy.
        flat = quantized.packed.reshape(len(table), -1)
        names = self._store("transformer.wte.weight", table.shape, quantized, flat)
        self._table = (*names, quantized)
        width = quantized.scales.shape[1] * quantized.block_size
        exact = width == table.shape[1]
        attributes: dict[str, int | float] = {
            "bits": self.TABLE_BITS,
            "block_size": quantized.block_size,
            "gather_axis": 0,
            "quantize_axis": 1,
        }
        rows = self._writer.node(
            "GatherBlockQuantized",
            [names[0], ids, names[1]],
            out if exact else f"{out}.padded",
            attributes,
            domain=CONTRIB,
        )
        if exact:
            return rows
        bounds = [self._writer.weight(f"{out}.{n}", np.array([v], np.int64)) for n, v in _slice(table.shape[1])]
        return self._writer.node("Slice", [rows, *bounds], out)

    def head(self, x: str, head: Array | None, out: str) -> str:
        if head is None:
            assert self._table is not None  # token_lookup comes first
            flat, scales, quantized = self._table
            shape = self._writer.weight(f"{out}.table_shape", np.array(quantized.packed.shape, np.int64))
            packed = self._writer.node("Reshape", [flat, shape], f"{out}.table")
            vocab, k = len(quantized.packed), self._table_width()
        else:
            vocab, k = head.shape
            quantized = quantize_blocks(head, self.TABLE_BITS, block_size_for(k))
            packed, scales = self._store("lm_head.weight", head.shape, quantized, quantized.packed)
        return self._product([x, packed, scales], out, k, vocab, quantized)

    def _table_width(self) -> int:
        return next(m.shape[1] for m in self.matrices if m.name == "transformer.wte.weight")

    def _product(self, inputs: list[str], out: str, k: int, n: int, quantized: BlockQuantized) -> str:
        attributes: dict[str, int | float] = {
            "K": k,
            "N": n,
            "bits": quantized.bits,
            "block_size": quantized.block_size,
            "accuracy_level": 4,  # int8 activations per block; every other level dequantizes B at each call
        }
        return self._writer.node("MatMulNBits", inputs, out, attributes, domain=CONTRIB)

    def _store(
        self, name: str, shape: tuple[int, ...], quantized: BlockQuantized, packed: npt.NDArray[np.uint8]
    ) -> tuple[str, str]:
        self.matrices.append(
            Matrix(name, shape, "block", quantized.bits, quantized.block_size, quantized.relative_error)
        )
        return self._writer.weight(name, packed), self._writer.weight(f"{name}.scales", quantized.scales)


class RowInt8Products(BlockProducts):
    """int8 with one scale per token and per column (W8A8) for the body; table and head as 8-bit blocks."""

    def __init__(self, writer: GraphWriter) -> None:
        super().__init__(writer, bits=8)
        writer.function(row_quantized_matmul())

    def linear(self, x: str, linear: Linear, out: str, *, bias: bool) -> str:
        quantized = quantize_columns(linear.weight)
        self.matrices.append(Matrix(linear.name, linear.weight.shape, "int8_row", 8, None, quantized.relative_error))
        inputs = [
            x,
            self._writer.weight(linear.name, quantized.values),
            self._writer.weight(f"{linear.name}.scales", quantized.scales),
        ]
        if not bias:
            return self._writer.node("RowQuantizedMatMul", inputs, out, domain=LOCAL)
        product = self._writer.node("RowQuantizedMatMul", inputs, f"{out}.product", domain=LOCAL)
        return self._writer.node("Add", [product, self._writer.weight(f"{out}.bias", linear.bias)], out)


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
        constant("one_over_127", 1 / 127, np.float32),
        constant("one", 1, np.float32),
        constant("zero_point", 128, np.uint8),
        helper.make_node("Abs", ["x"], ["magnitude"]),
        helper.make_node("ReduceMax", ["magnitude", "last_axis"], ["peak"], keepdims=1),  # (B, T, 1)
        helper.make_node("Max", ["peak", "tiny"], ["positive_peak"]),
        helper.make_node("Mul", ["positive_peak", "one_over_127"], ["row_scale"]),
        helper.make_node("Div", ["x", "row_scale"], ["scaled"]),
        helper.make_node("QuantizeLinear", ["scaled", "one", "zero_point"], ["codes"]),  # (B, T, K) uint8
        helper.make_node(
            "MatMulIntegerToFloat", ["codes", "values", "one", "scales", "zero_point"], ["unscaled"], domain=CONTRIB
        ),
        helper.make_node("Mul", ["unscaled", "row_scale"], ["y"]),  # (B, T, N)
    ]
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    return helper.make_function(LOCAL, "RowQuantizedMatMul", ["x", "values", "scales"], ["y"], nodes, opsets)


def _slice(width: int) -> list[tuple[str, int]]:
    return [("slice_start", 0), ("slice_end", width), ("slice_axis", 2)]
