"""The operators that a bundle's graph may use, and what each makes of its inputs.

This is the list of what `edgelm_export.graph` writes, with the attributes, types and shapes that it writes them with.
So every size in a graph is known before anything runs, and nothing in it divides by zero or reads beyond an end.
A shape's sizes are numbers, or names that stand for sizes of a call: "batch", "new_tokens", "tokens" (batch times
new_tokens), "rows", "capacity".
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from edgelm.bundle.manifest import Architecture, GraphFacts
from edgelm.bundle.onnx_file import AttributeValue, Tensor

OPSET = 21
CONTRIB = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""
CONTRIB_OPSET = 1
LOCAL = "edgelm"
"""Domain of a graph's local functions."""
LOCAL_OPSET = 1

FLOATS = ("float32", "float16")
SUMMED = 32
"""How many numbers of a row make a sum that `Concat` may put behind the row."""
PADDING_TOKENS = 2
"""A call of several tokens may be padded to a whole row group (`edgelm.engine.cache.ROW_GROUP`), behind the context."""

Shape: TypeAlias = tuple[int | str, ...]


class GraphError(ValueError):
    """A graph has something that no bundle's graph has; the message names it."""


@dataclass(frozen=True, slots=True)
class Value:
    """What is known of a value before anything runs."""

    dtype: str
    shape: Shape
    is_constant: bool = False
    """Whether it is stored, or follows from what is stored."""
    content: bytes | None = None
    """The bytes of a small stored value."""
    port: str = ""
    """The graph's input that this is, or the output that it must be."""
    below: int | None = None
    """Ids are smaller than this, because the runtime checks them."""


@dataclass(frozen=True, slots=True)
class Call:
    """An operator's inputs and attributes in one place of a graph."""

    values: tuple[Value | None, ...]
    attributes: Mapping[str, AttributeValue]
    architecture: Architecture
    names: GraphFacts
    caches: Mapping[str, tuple[str, ...]]
    """By the graph's input of a layer's keys: the input of the values, and the outputs of both."""

    def input(self, index: int) -> Value:
        """An input that is not left out."""
        value = self.values[index]
        assert value is not None, "`Operator.inputs` says which inputs are there"
        return value

    def size(self, name: str) -> int:
        """A whole number among the attributes."""
        value = self.attributes[name]
        assert isinstance(value, int), "`Operator.attributes` says which attributes are numbers"
        return value


Rule: TypeAlias = Callable[[Call], tuple[Value, ...]]
"""What an operator makes of a call; raises GraphError if types or shapes do not fit."""


@dataclass(frozen=True, slots=True)
class Operator:
    """How an operator may be called."""

    rule: Rule
    inputs: tuple[str, ...]
    """The forms of the input list: "x" for an input, "." for one that is left out."""
    attributes: Mapping[str, Collection[int | str] | type] = field(default_factory=dict)
    """Every attribute with its values or its type. All of them must be given."""
    optional: Mapping[str, Collection[int | str] | type] = field(default_factory=dict)
    """Attributes that may be left out."""


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise GraphError(what)


def _floats(call: Call, *indexes: int) -> None:
    """Require that the inputs are floats of one type."""
    dtypes = {call.input(index).dtype for index in indexes}
    if not (len(dtypes) == 1 and dtypes.issubset(FLOATS)):
        raise GraphError(f"takes floats of one type, not {', '.join(sorted(dtypes))}")


def _fits(value: Value, shape: Shape, what: str) -> None:
    if value.shape != shape:
        raise GraphError(f"{what} has the shape {shown(value.shape)} instead of {shown(shape)}")


def _single(value: Value, what: str) -> None:
    _need(value.shape in ((), (1,)), f"takes one number as {what}, not {shown(value.shape)}")


def shown(shape: Shape) -> str:
    """A shape in an error message."""
    return f"({', '.join(map(str, shape))})"


def _whole_numbers(value: Value) -> tuple[int, ...]:
    """The content of a small stored int64 tensor of one axis."""
    if value.dtype != "int64" or len(value.shape) != 1 or value.content is None:
        raise GraphError("takes a size or an axis that is no small stored list of int64")
    raw = value.content
    return tuple(int.from_bytes(raw[at : at + 8], "little", signed=True) for at in range(0, len(raw), 8))


# One number of the output for each number of the input


def _unary(call: Call) -> tuple[Value, ...]:
    _floats(call, 0)
    return (Value(call.input(0).dtype, call.input(0).shape),)


def _elementwise(call: Call) -> tuple[Value, ...]:
    """The output has the shape of one of the inputs, and each other input is repeated to that shape."""
    _floats(call, *range(len(call.values)))
    return (Value(call.input(0).dtype, _common_shape(call, range(len(call.values)))),)


def _greater(call: Call) -> tuple[Value, ...]:
    _floats(call, 0, 1)
    return (Value("bool", _common_shape(call, range(2))),)


def _where(call: Call) -> tuple[Value, ...]:
    _need(call.input(0).dtype == "bool", f"takes a bool as condition, not {call.input(0).dtype}")
    _floats(call, 1, 2)
    return (Value(call.input(1).dtype, _common_shape(call, range(3))),)


def _common_shape(call: Call, indexes: Collection[int]) -> Shape:
    shapes = [call.input(index).shape for index in indexes]
    whole = max(shapes, key=lambda shape: (len(shape), -sum(size == 1 for size in shape)))
    for shape in shapes:
        ends = whole[len(whole) - len(shape) :]
        fits = all(size in (1, end) for size, end in zip(shape, ends, strict=True))
        _need(fits, f"takes shapes that do not fit each other: {' and '.join(map(shown, shapes))}")
    return whole


def _clip(call: Call) -> tuple[Value, ...]:
    for index in (1, 2):
        _single(call.input(index), "its bound")
    return _elementwise(call)


def _prelu(call: Call) -> tuple[Value, ...]:
    _single(call.input(1), "its slope")
    return _elementwise(call)


def _cast(call: Call) -> tuple[Value, ...]:
    """Narrow logits, or the stored scales of a product."""
    x = call.input(0)
    _need(x.dtype == "float16", f"takes float16, not {x.dtype}")
    return (Value("float32", x.shape, is_constant=x.is_constant),)


# Norms, shapes, rows of tables


def _layer_normalization(call: Call) -> tuple[Value, ...]:
    _floats(call, 0, 1, 2)
    x = call.input(0)
    _need(len(x.shape) >= 2, f"takes an input of two axes or more, not {shown(x.shape)}")
    for index, what in ((1, "the weight"), (2, "the bias")):
        _fits(call.input(index), x.shape[-1:], what)
    return (Value(x.dtype, x.shape),)


def _rms_normalization(call: Call) -> tuple[Value, ...]:
    _floats(call, 0, 1)
    x = call.input(0)
    _need(len(x.shape) >= 2, f"takes an input of two axes or more, not {shown(x.shape)}")
    _fits(call.input(1), x.shape[-1:], "the weight")
    return (Value(x.dtype, x.shape),)


def _reduce_max(call: Call) -> tuple[Value, ...]:
    _floats(call, 0)
    x = call.input(0)
    _need(len(x.shape) >= 1 and _whole_numbers(call.input(1)) == (-1,), "takes the last axis only")
    return (Value(x.dtype, (*x.shape[:-1], 1)),)


def _reduce_sum(call: Call) -> tuple[Value, ...]:
    _floats(call, 0)
    x = call.input(0)
    _need(len(x.shape) >= 1 and _whole_numbers(call.input(1)) == (-1,), "takes the last axis only")
    return (Value(x.dtype, x.shape[:-1]),)


def _concat(call: Call) -> tuple[Value, ...]:
    """A row with the sums of its blocks behind it."""
    x, sums = call.input(0), call.input(1)
    _floats(call, 0, 1)
    width, blocks = (value.shape[2] if len(value.shape) == 3 else "" for value in (x, sums))
    if not isinstance(width, int) or x.shape[:2] != sums.shape[:2] or blocks != width / SUMMED:
        raise GraphError(f"cannot join {shown(x.shape)} and {shown(sums.shape)}")
    return (Value(x.dtype, (*x.shape[:2], width + width // SUMMED)),)


def _reshape(call: Call) -> tuple[Value, ...]:
    """All rows' tokens in one axis; heads apart or joined again; rows of logits as columns or back; or a stored table
    in the blocks of a product."""
    x, sizes = call.input(0), _whole_numbers(call.input(1))
    if x.shape[:1] == ("rows",) and sizes == (-1, *x.shape[1:], 1):
        return (Value(x.dtype, (*x.shape, 1)),)
    if x.shape[:1] == ("rows",) and (*sizes, 1) == (-1, *x.shape[1:]):
        return (Value(x.dtype, x.shape[:-1]),)
    if x.is_constant:
        _need(x.dtype == "uint8" and len(x.shape) == 2 and len(sizes) == 3, "reshapes what is no table of blocks")
        rows, row_bytes = x.shape
        fits = sizes[0] == rows and min(sizes) >= 1 and sizes[1] * sizes[2] == row_bytes
        _need(fits, f"cannot reshape {shown(x.shape)} to {shown(sizes)}")
        return (Value("uint8", sizes, is_constant=True),)
    is_of_tokens = x.shape[:2] == ("batch", "new_tokens")
    if is_of_tokens and sizes[:2] == (0, 0):
        return (Value(x.dtype, ("batch", "new_tokens", *_heads(x, sizes[2:]))),)
    fits = is_of_tokens and len(x.shape) == 3 and sizes == (-1, x.shape[2])
    _need(fits, f"cannot reshape {shown(x.shape)} to {shown(sizes)}")
    return (Value(x.dtype, ("tokens", *x.shape[2:])),)


def _heads(x: Value, sizes: tuple[int, ...]) -> Shape:
    """The last axes of `x` (B, T, ...), cut into heads or joined again."""
    last = x.shape[2:]
    if len(last) == 1 and len(sizes) == 2 and isinstance(last[0], int):
        heads, rest = sizes
        if heads >= 1 and rest == -1 and last[0] % heads == 0:
            return heads, last[0] // heads
    if len(last) == 2 and sizes == (-1,) and isinstance(last[0], int) and isinstance(last[1], int):
        return (last[0] * last[1],)
    raise GraphError(f"cannot reshape {shown(x.shape)} to (0, 0, {', '.join(map(str, sizes))})")


def _split(call: Call) -> tuple[Value, ...]:
    x, widths = call.input(0), _whole_numbers(call.input(1))
    _floats(call, 0)
    fits = len(x.shape) == 3 and len(widths) in (2, 3) and min(widths) >= 1 and sum(widths) == x.shape[2]
    _need(fits, f"cannot split {shown(x.shape)} into {shown(widths)}")
    return tuple(Value(x.dtype, (*x.shape[:2], width)) for width in widths)


def _gather(call: Call) -> tuple[Value, ...]:
    table, ids = call.input(0), call.input(1)
    _floats(call, 0)
    _need(len(table.shape) == 2, f"takes a table of two axes, not {shown(table.shape)}")
    _need(table.is_constant or table.shape[0] == "tokens", "takes rows of what is neither a table nor all tokens")
    _ids_fit(ids, table)
    return (Value(table.dtype, (*ids.shape, *table.shape[1:])),)


def _ids_fit(ids: Value, table: Value) -> None:
    _need(ids.dtype == "int64", f"takes ids of int64, not {ids.dtype}")
    rows = table.shape[0]
    if isinstance(rows, int):
        _need(ids.below is not None and ids.below <= rows, f"looks up ids beyond its table of {rows} rows")
    else:
        _need(ids.shape == ("rows",), f"takes the rows of logits, not {shown(ids.shape)}")


def _gather_blocks(call: Call) -> tuple[Value, ...]:
    table, ids, scales = call.input(0), call.input(1), call.input(2)
    _need(table.dtype == "uint8" and len(table.shape) == 2 and table.is_constant, "takes a stored table of uint8")
    _need(scales.dtype in FLOATS and scales.is_constant, "takes stored scales")
    _ids_fit(ids, table)
    rows, row_bytes = table.shape
    assert isinstance(row_bytes, int), "sizes of stored tensors are numbers"
    columns, hidden_size = row_bytes * 8 // call.size("bits"), call.architecture.hidden_size
    _need(
        columns - hidden_size < call.size("block_size"),
        f"makes rows of {columns} numbers, a whole block or more beyond the hidden size {hidden_size}",
    )
    _fits(scales, (rows, -(-columns // call.size("block_size"))), "its scales")
    return (Value(scales.dtype, (*ids.shape, columns)),)


def _top_k(call: Call) -> tuple[Value, ...]:
    """The likeliest tokens of a coarse head, whose logits are then computed exactly."""
    x, count = call.input(0), _whole_numbers(call.input(1))
    _floats(call, 0)
    vocab_size = call.architecture.vocab_size
    _fits(x, ("rows", vocab_size), "what it chooses from")
    exact = call.names.exact_logits
    _need(exact is not None and count == (exact,), f"chooses {count} tokens, but bundle.json states {exact}")
    _need(count[0] <= vocab_size, f"chooses {count[0]} of {vocab_size} tokens")
    chosen = ("rows", count[0])
    return Value(x.dtype, chosen), Value("int64", chosen, below=vocab_size)


def _scatter(call: Call) -> tuple[Value, ...]:
    """Rows of logits with those of the chosen tokens replaced."""
    x, ids, updates = call.input(0), call.input(1), call.input(2)
    vocab_size = call.architecture.vocab_size
    _floats(call, 0, 2)
    _fits(x, ("rows", vocab_size), "what it writes into")
    _need(ids.dtype == "int64" and ids.below is not None and ids.below <= vocab_size, "writes beyond the vocabulary")
    _need(len(ids.shape) == 2 and ids.shape[0] == "rows", "writes into other rows")
    _fits(updates, ids.shape, "what it writes")
    return (Value(x.dtype, x.shape),)


def _slice(call: Call) -> tuple[Value, ...]:
    """The first columns of a widened row."""
    x = call.input(0)
    start, stop, axis = (_whole_numbers(call.input(index)) for index in (1, 2, 3))
    width = x.shape[-1] if x.shape else 0
    fits = isinstance(width, int) and len(stop) == 1 and 1 <= stop[0] <= width
    _need(fits and len(x.shape) == 3 and (start, axis) == ((0,), (2,)), f"cannot cut {shown(x.shape)} to {stop}")
    return (Value(x.dtype, (*x.shape[:-1], stop[0])),)


# Products


def _matmul(call: Call) -> tuple[Value, ...]:
    _floats(call, 0, 1)
    x, y = call.input(0), call.input(1)
    if len(x.shape) == len(y.shape) == 3 and x.shape[0] == y.shape[0] == "rows" and not y.is_constant:
        # Each row of logits has looked-up rows of the head. They are multiplied by its hidden state.
        _need(y.shape[1:] == (x.shape[2], 1), f"multiplies {shown(x.shape)} by {shown(y.shape)}")
        return (Value(x.dtype, (*x.shape[:2], 1)),)
    return (Value(x.dtype, _product_shape(x, y, inner_axis=0)),)


def _gemm(call: Call) -> tuple[Value, ...]:
    _floats(call, 0, 1)
    _need(len(call.input(0).shape) == 2, f"takes an input of two axes, not {shown(call.input(0).shape)}")
    return (Value(call.input(0).dtype, _product_shape(call.input(0), call.input(1), inner_axis=1)),)


def _product_shape(x: Value, weight: Value, inner_axis: int) -> Shape:
    fits = weight.is_constant and len(weight.shape) == 2 and len(x.shape) >= 2
    _need(fits and x.shape[-1] == weight.shape[inner_axis], f"multiplies {shown(x.shape)} by {shown(weight.shape)}")
    return (*x.shape[:-1], weight.shape[1 - inner_axis])


def _matmul_blocks(call: Call) -> tuple[Value, ...]:
    x, weight, scales = call.input(0), call.input(1), call.input(2)
    _floats(call, 0, 2)
    k, n, block_size = call.size("K"), call.size("N"), call.size("block_size")
    blocks = -(-k // block_size)
    _need(len(x.shape) >= 2 and x.shape[-1] == k, f"multiplies {shown(x.shape)} by a matrix of {k} rows")
    _need(weight.dtype == "uint8" and weight.is_constant and scales.is_constant, "takes a stored matrix of uint8")
    _fits(weight, (n, blocks, block_size * call.size("bits") // 8), "its matrix")
    _fits(scales, (n, blocks), "its scales")
    if len(call.values) > 3 and call.values[3] is not None:
        zero_points = call.input(3)
        _need(zero_points.dtype == "uint8" and zero_points.is_constant, "takes stored zero points of uint8")
        _fits(zero_points, (n, -(-blocks * call.size("bits") // 8)), "its table of zero points")
    if len(call.values) > 5:
        _floats(call, 0, 5)
        _fits(call.input(5), (n,), "its bias")
    return (Value(x.dtype, (*x.shape[:-1], n)),)


def _quantize(call: Call) -> tuple[Value, ...]:
    _floats(call, 0, 1)
    _single(call.input(1), "its step")
    _zero_point(call.input(2))
    return (Value("uint8", call.input(0).shape),)


def _matmul_integers(call: Call) -> tuple[Value, ...]:
    codes, weight, scales = call.input(0), call.input(1), call.input(3)
    _need((codes.dtype, weight.dtype) == ("uint8", "int8"), "multiplies other types than uint8 by int8")
    _floats(call, 2, 3)
    shape = _product_shape(codes, weight, inner_axis=0)
    _single(call.input(2), "its step")
    _fits(scales, shape[-1:], "its scales")
    _zero_point(call.input(4))
    return (Value(scales.dtype, shape),)


def _zero_point(value: Value) -> None:
    _need(value.dtype == "uint8", f"takes a zero point of uint8, not {value.dtype}")
    _single(value, "its zero point")


# Attention


def _attention(call: Call) -> tuple[Value, ...]:
    facts, names = call.architecture, call.names
    qkv, key, value = call.input(0), call.input(3), call.input(4)
    _floats(call, 0)
    queries, keys = facts.num_heads * facts.head_dim, facts.num_key_value_heads * facts.head_dim
    _need(call.size("num_heads") == facts.num_heads, f"has other heads than {facts.num_heads}")
    _need(call.size("kv_num_heads") == facts.num_key_value_heads, "has other key-value heads than bundle.json states")
    is_packed = call.values[1] is None
    for index, width in enumerate((queries + 2 * keys,) if is_packed else (queries, keys, keys)):
        _fits(call.input(index), ("batch", "new_tokens", width), "its input of queries, keys or values")
        _floats(call, 0, index)
    _need(call.size("do_rotary") == (call.values[7] is not None), "turns heads without tables, or has tables in vain")
    if call.values[7] is not None:
        _rotary_tables(call)
    lengths = [call.input(index).port for index in (5, 6, 16)]
    _need(lengths == [names.seqlens_k, names.total_sequence_length, names.query_seqlens], "takes other lengths")
    value_input, *presents = call.caches.get(key.port, ("",))
    _need(value.port == value_input != "", "takes keys and values that are no inputs of one layer")
    _cached_type(call)
    attended = Value(qkv.dtype, ("batch", "new_tokens", facts.num_heads * facts.head_dim))
    return attended, *(Value(key.dtype, key.shape, port=name) for name in presents)


def _cached_type(call: Call) -> None:
    """Keys and values of the type of the activations; or integers, with a stored scale for each channel."""
    facts, dtype = call.architecture, call.input(3).dtype
    scaled = len(_INT8_CACHE.keys() & call.attributes.keys())
    if dtype != "int8":
        _need(call.input(0).dtype == dtype, "takes keys and values of another type")
        _need(call.values[12] is None and not scaled, "scales keys and values that are floats")
        return
    _need(call.values[12] is not None and scaled == len(_INT8_CACHE), "takes integers without their scales")
    for index in (12, 13):
        scales = call.input(index)
        _need(scales.is_constant and scales.dtype == "float32", "takes scales that are no stored float32")
        _fits(scales, (1, facts.num_key_value_heads, 1, facts.head_dim), "its input of scales")


def _rotary_tables(call: Call) -> None:
    """A row of cosines and of sines for every position, and for the padding of a call at the end of the context."""
    facts = call.architecture
    rows = facts.context_length + PADDING_TOKENS
    _floats(call, 0, 7, 8)
    for index in (7, 8):
        _need(call.input(index).is_constant, "takes stored tables of angles")
        _fits(call.input(index), (rows, facts.head_dim // 2), "its table of angles")


def stored_value(tensor: Tensor) -> Value:
    """The value that a stored tensor is."""
    content = tensor.content if isinstance(tensor.content, bytes) else None
    return Value(tensor.dtype, tensor.shape, is_constant=True, content=content)


def _constant(call: Call) -> tuple[Value, ...]:
    tensor = call.attributes["value"]
    assert isinstance(tensor, Tensor), "`Operator.attributes` says so"
    return (stored_value(tensor),)


_COUNT = range(1, 2**31)
_INT8_CACHE: Mapping[str, Collection[int | str]] = {
    "k_quant_type": ("PER_CHANNEL",),
    "v_quant_type": ("PER_CHANNEL",),
    "kv_cache_bit_width": (8,),
}
_BITS = {"bits": (4, 8), "block_size": (16, 32, 64, 128, 256)}

OPERATORS: dict[tuple[str, str], Operator] = {
    ("", "Abs"): Operator(_unary, ("x",)),
    ("", "Add"): Operator(_elementwise, ("xx",)),
    ("", "Cast"): Operator(_cast, ("x",), {"to": (1,)}),
    ("", "Clip"): Operator(_clip, ("xxx",)),
    ("", "Concat"): Operator(_concat, ("xx",), {"axis": (-1,)}),
    ("", "Constant"): Operator(_constant, ("",), {"value": Tensor}),
    ("", "Div"): Operator(_elementwise, ("xx",)),
    ("", "Erf"): Operator(_unary, ("x",)),
    ("", "Exp"): Operator(_unary, ("x",)),
    ("", "Gather"): Operator(_gather, ("xx",)),
    ("", "Gelu"): Operator(_unary, ("x",)),
    ("", "Gemm"): Operator(_gemm, ("xx",), {"transB": (1,)}),
    ("", "Greater"): Operator(_greater, ("xx",)),
    ("", "Identity"): Operator(_unary, ("x",)),
    ("", "LayerNormalization"): Operator(_layer_normalization, ("xxx",), {"axis": (-1,), "epsilon": float}),
    ("", "LeakyRelu"): Operator(_unary, ("x",), {"alpha": float}),
    ("", "MatMul"): Operator(_matmul, ("xx",)),
    ("", "Max"): Operator(_elementwise, ("xx",)),
    ("", "Min"): Operator(_elementwise, ("xx",)),
    ("", "Mish"): Operator(_unary, ("x",)),
    ("", "Mul"): Operator(_elementwise, ("xx",)),
    ("", "PRelu"): Operator(_prelu, ("xx",)),
    ("", "QuantizeLinear"): Operator(_quantize, ("xxx",)),
    ("", "ReduceMax"): Operator(_reduce_max, ("xx",), {"keepdims": (1,)}),
    ("", "ReduceSum"): Operator(_reduce_sum, ("xx",), {"keepdims": (0,)}),
    ("", "Relu"): Operator(_unary, ("x",)),
    ("", "Reshape"): Operator(_reshape, ("xx",)),
    ("", "ScatterElements"): Operator(_scatter, ("xxx",), {"axis": (1,)}),
    ("", "Sigmoid"): Operator(_unary, ("x",)),
    ("", "SimplifiedLayerNormalization"): Operator(_rms_normalization, ("xx",), {"axis": (-1,), "epsilon": float}),
    ("", "Slice"): Operator(_slice, ("xxxx",)),
    ("", "Split"): Operator(_split, ("xx",), {"axis": (-1,)}),
    ("", "Sub"): Operator(_elementwise, ("xx",)),
    ("", "Tanh"): Operator(_unary, ("x",)),
    ("", "TopK"): Operator(_top_k, ("xx",), {"axis": (-1,), "largest": (1,), "sorted": (0,)}),
    ("", "Where"): Operator(_where, ("xxx",)),
    (CONTRIB, "FastGelu"): Operator(_unary, ("x",)),
    (CONTRIB, "GatherBlockQuantized"): Operator(
        _gather_blocks, ("xxx",), {**_BITS, "gather_axis": (0,), "quantize_axis": (1,)}
    ),
    (CONTRIB, "GroupQueryAttention"): Operator(
        _attention,
        (
            *("x..xxxx.........x", "x..xxxxxx.......x", "xxxxxxxxx.......x"),
            *("x..xxxx.....xx..x", "x..xxxxxx...xx..x", "xxxxxxxxx...xx..x"),  # with scales of an int8 cache
        ),
        {"num_heads": _COUNT, "kv_num_heads": _COUNT, "scale": float, "do_rotary": (0, 1)},
        {"local_window_size": _COUNT, **_INT8_CACHE},
    ),
    (CONTRIB, "MatMulIntegerToFloat"): Operator(_matmul_integers, ("xxxxx",)),
    (CONTRIB, "MatMulNBits"): Operator(
        _matmul_blocks, ("xxx", "xxx..x", "xxxx", "xxxx.x"), {**_BITS, "K": _COUNT, "N": _COUNT, "accuracy_level": (4,)}
    ),
    (CONTRIB, "QuickGelu"): Operator(_unary, ("x",), {"alpha": float}),
}
"""By domain and name."""

STORES = frozenset({("", "Cast"), ("", "Constant"), ("", "Reshape")})
"""Operators whose inputs may all be stored. ONNX Runtime computes such a node when it loads the graph."""

LOOKUPS = frozenset(
    {("", "Gather"), (CONTRIB, "GatherBlockQuantized"), ("", "Reshape"), (CONTRIB, "GroupQueryAttention")}
)
"""Operators that make no copy of a stored matrix in another order."""

SPARE = frozenset({("", "TopK")})
"""Operators whose first output may stay unused."""

WIDENED = frozenset({(CONTRIB, "GatherBlockQuantized"), ("", "Concat")})
"""Operators whose rows may be wider than any activation: by less than a block until a Slice cuts them, or by sums."""
