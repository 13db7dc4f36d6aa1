"""The content of an ONNX file, in the few forms that a bundle's graph may have.

This reader knows the fields that the exporter writes and refuses all others: subgraphs, sparse and text tensors,
training, metadata and documentation. What the graph computes is judged by `edgelm.bundle.graph_rules`.
"""

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

from edgelm.bundle.protobuf import Field, Message, ProtobufError, Schema, Span, field_bytes, replaced

MAX_GRAPH_BYTES = 16 * 2**20
MAX_NODES = 4096
MAX_TENSORS = 16_384
MAX_SIGNATURE = 4096
"""The most inputs, and the most outputs, of a graph."""
MAX_FUNCTIONS = 32
MAX_FUNCTION_NODES = 32
MAX_NODE_VALUES = 32
"""The most inputs, and the most outputs, of a node or a function."""
MAX_RANK = 4
MAX_INLINE_BYTES = 1024
"""Larger tensors are in the weights file."""

DTYPES = {1: ("float32", 4), 2: ("uint8", 1), 3: ("int8", 1), 6: ("int32", 4), 7: ("int64", 8), 10: ("float16", 2)}
"""Name and size in bytes of the number types that a graph may use, by their number in ONNX."""

_is_whole = re.compile(r"0|[1-9][0-9]{0,15}").fullmatch
_FLOAT, _INT, _STRING, _TENSOR = 1, 2, 3, 4
"""Kinds of attributes."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor is in an external file."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """A stored tensor, with its bytes if they are in the graph file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    content: bytes | Place


AttributeValue: TypeAlias = int | float | str | Tensor


@dataclass(frozen=True, slots=True)
class Node:
    """A node; "" among its inputs or outputs stands for one that is left out."""

    name: str
    domain: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, AttributeValue]


@dataclass(frozen=True, slots=True)
class Function:
    """A local function; nodes with its name and domain call it."""

    name: str
    domain: str
    opsets: dict[str, int]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of the graph; a size is a number, or a name that stands for any number."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class OnnxFile:
    """All of an ONNX file."""

    ir_version: int
    opsets: dict[str, int]
    functions: tuple[Function, ...]
    nodes: tuple[Node, ...]
    tensors: tuple[Tensor, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


MODEL = Schema(
    "the file",
    {
        1: Field("ir_version", "number"),
        2: Field("producer_name", "span"),
        7: Field("graph", "span"),
        8: Field("opset_import", "span", repeated=True),
        25: Field("function", "span", repeated=True),
    },
)
GRAPH = Schema(
    "the graph",
    {
        1: Field("node", "span", repeated=True),
        2: Field("name", "span"),
        5: Field("initializer", "span", repeated=True),
        11: Field("input", "span", repeated=True),
        12: Field("output", "span", repeated=True),
    },
)
_OPSET = Schema("an opset", {1: Field("domain", "span"), 2: Field("version", "number")})
_FUNCTION = Schema(
    "a function",
    {
        1: Field("name", "span"),
        4: Field("input", "span", repeated=True),
        5: Field("output", "span", repeated=True),
        7: Field("node", "span", repeated=True),
        9: Field("opset_import", "span", repeated=True),
        10: Field("domain", "span"),
    },
)
NODE = Schema(
    "a node",
    {
        1: Field("input", "span", repeated=True),
        2: Field("output", "span", repeated=True),
        3: Field("name", "span"),
        4: Field("op_type", "span"),
        5: Field("attribute", "span", repeated=True),
        7: Field("domain", "span"),
    },
)
_ATTRIBUTE = Schema(
    "an attribute",
    {
        1: Field("name", "span"),
        2: Field("f", "decimal"),
        3: Field("i", "number"),
        4: Field("s", "span"),
        5: Field("t", "span"),
        20: Field("type", "number"),
    },
)
_TENSOR_SCHEMA = Schema(
    "a tensor",
    {
        1: Field("dims", "number", repeated=True),
        2: Field("data_type", "number"),
        8: Field("name", "span"),
        9: Field("raw_data", "span"),
        13: Field("external_data", "span", repeated=True),
        14: Field("data_location", "number"),
    },
)
_ENTRY = Schema("external data", {1: Field("key", "span"), 2: Field("value", "span")})
_PORT = Schema("an input or output", {1: Field("name", "span"), 2: Field("type", "span")})
_TYPE = Schema("a type", {1: Field("tensor_type", "span")})
_TENSOR_TYPE = Schema("a tensor type", {1: Field("elem_type", "number"), 2: Field("shape", "span")})
_SHAPE = Schema("a shape", {1: Field("dim", "span", repeated=True)})
_DIM = Schema("a size", {1: Field("dim_value", "number"), 2: Field("dim_param", "span")})


def read_onnx(data: bytes) -> OnnxFile:
    """Read an ONNX file; raises ProtobufError if it is damaged, too large, or has a part that no bundle has."""
    if len(data) > MAX_GRAPH_BYTES:
        raise ProtobufError(f"the file has {len(data):,} bytes, more than {MAX_GRAPH_BYTES:,}")
    model = Message(data, (0, len(data)), MODEL)
    model.text("producer_name")
    graph = Message(data, model.span("graph"), GRAPH)
    graph.text("name")
    return OnnxFile(
        ir_version=model.number("ir_version"),
        opsets=_opsets(data, model),
        functions=tuple(_function(data, span) for span in model.spans("function", MAX_FUNCTIONS)),
        nodes=tuple(_node(data, span) for span in graph.spans("node", MAX_NODES)),
        tensors=tuple(_tensor(data, span) for span in graph.spans("initializer", MAX_TENSORS)),
        inputs=tuple(_port(data, span) for span in graph.spans("input", MAX_SIGNATURE)),
        outputs=tuple(_port(data, span) for span in graph.spans("output", MAX_SIGNATURE)),
    )


def with_weights_at(data: bytes, file: str, offset: int) -> bytes:
    """An ONNX file that `read_onnx` accepts, with its weights in `file`, `offset` bytes further on than it says."""

    def entry(span: Span) -> bytes:
        message = Message(data, span, _ENTRY)
        key, value = message.text("key"), message.text("value")
        if key == "location":
            value = file
        elif key == "offset":
            value = str(offset + int(value))
        return field_bytes(1, key.encode()) + field_bytes(2, value.encode())

    def tensor(span: Span) -> bytes:
        return replaced(data, span, 13, entry)

    def graph(span: Span) -> bytes:
        return replaced(data, span, 5, tensor)

    return replaced(data, (0, len(data)), 7, graph)


def _opsets(data: bytes, message: Message) -> dict[str, int]:
    opsets: dict[str, int] = {}
    for span in message.spans("opset_import", 8):
        opset = Message(data, span, _OPSET)
        domain = opset.text("domain")
        if domain in opsets:
            raise ProtobufError(f"the domain {domain!r} is imported twice")
        opsets[domain] = opset.number("version")
    return opsets


def _function(data: bytes, span: Span) -> Function:
    message = Message(data, span, _FUNCTION)
    return Function(
        name=message.text("name"),
        domain=message.text("domain"),
        opsets=_opsets(data, message),
        inputs=_names(message, "input"),
        outputs=_names(message, "output"),
        nodes=tuple(_node(data, nested) for nested in message.spans("node", MAX_FUNCTION_NODES)),
    )


def _node(data: bytes, span: Span) -> Node:
    message = Message(data, span, NODE)
    attributes: dict[str, AttributeValue] = {}
    for nested in message.spans("attribute", MAX_NODE_VALUES):
        name, value = _attribute(data[nested[0] : nested[1]])
        if name in attributes:
            raise ProtobufError(f"a node has two attributes {name!r}")
        attributes[name] = value
    return Node(
        name=message.text("name"),
        domain=message.text("domain"),
        operator=message.text("op_type"),
        inputs=_names(message, "input"),
        outputs=_names(message, "output"),
        attributes=attributes,
    )


def _names(message: Message, field: str) -> tuple[str, ...]:
    message.spans(field, MAX_NODE_VALUES)
    return message.texts(field)


@lru_cache(256)  # every layer has the same ones
def _attribute(data: bytes) -> tuple[str, AttributeValue]:
    message = Message(data, (0, len(data)), _ATTRIBUTE)
    kind, name = message.number("type"), message.text("name")
    fields = {_FLOAT: "f", _INT: "i", _STRING: "s", _TENSOR: "t"}
    if [field for field in fields.values() if message.has(field)] != [fields.get(kind)]:
        raise ProtobufError(f"the attribute {name!r} is no single number, text or tensor")
    if kind == _FLOAT:
        return name, message.decimal("f")
    if kind == _INT:
        return name, message.number("i")
    if kind == _STRING:
        return name, message.text("s")
    tensor = _tensor(data, message.span("t"))
    if isinstance(tensor.content, Place):  # ONNX Runtime would open that file
        raise ProtobufError(f"the attribute {name!r} has its data in a file")
    return name, tensor


def _tensor(data: bytes, span: Span) -> Tensor:
    message = Message(data, span, _TENSOR_SCHEMA)
    name, shape = message.text("name"), message.numbers("dims")
    dtype, item_bytes = _dtype(message.number("data_type"), name)
    if len(shape) > MAX_RANK or not all(1 <= size < 2**31 for size in shape):
        raise ProtobufError(f"the tensor {name!r} has the shape {list(shape[:8])}, which no bundle has")
    size_bytes = math.prod(shape) * item_bytes
    content: bytes | Place
    if message.has("data_location") or message.has("external_data"):
        content = _place(data, message, name)
        stored = content.length
    else:
        start, stop = message.span("raw_data")
        content = data[start:stop]
        stored = len(content)
        if stored > MAX_INLINE_BYTES:
            raise ProtobufError(
                f"the tensor {name!r} has {stored:,} bytes in the graph, more than {MAX_INLINE_BYTES:,}"
            )
    if stored != size_bytes:
        raise ProtobufError(f"the tensor {name!r} has {stored:,} bytes, but its shape needs {size_bytes:,}")
    return Tensor(name, dtype, shape, content)


def _place(data: bytes, message: Message, name: str) -> Place:
    entries: dict[str, str] = {}
    spans = message.spans("external_data", 3)
    for start, stop in spans:
        key, value = _entry(data[start:stop])
        entries[key] = value
    numbers = [entries.get(key, "") for key in ("offset", "length")]
    if (
        message.number("data_location") != 1
        or message.has("raw_data")
        or len(spans) != 3
        or entries.keys() != {"location", "offset", "length"}
        or not all(map(_is_whole, numbers))
    ):
        raise ProtobufError(f"the tensor {name!r} must say location, offset and length of its data, each once")
    return Place(entries["location"], int(numbers[0]), int(numbers[1]))


@lru_cache(256)  # every tensor names the same file, and those of different layers have the same lengths
def _entry(data: bytes) -> tuple[str, str]:
    entry = Message(data, (0, len(data)), _ENTRY)
    return entry.text("key"), entry.text("value")


def _port(data: bytes, span: Span) -> Port:
    message = Message(data, span, _PORT)
    name, (start, stop) = message.text("name"), message.span("type")
    dtype, shape = _type(data[start:stop])
    if shape is None:
        raise ProtobufError(f"a size of {name!r} must be a number or a name")
    return Port(name, _dtype(dtype, name)[0], shape)


@lru_cache(16)  # the keys and values of all layers have the same type
def _type(data: bytes) -> tuple[int, tuple[int | str, ...] | None]:
    """The number of an input's or output's type, and its shape, None if a size is not one number or one name."""
    tensor_type = Message(data, Message(data, (0, len(data)), _TYPE).span("tensor_type"), _TENSOR_TYPE)
    shape: list[int | str] = []
    for size in Message(data, tensor_type.span("shape"), _SHAPE).spans("dim", MAX_RANK):
        dim = Message(data, size, _DIM)
        if dim.has("dim_value") == dim.has("dim_param"):
            return tensor_type.number("elem_type"), None
        shape.append(dim.number("dim_value") if dim.has("dim_value") else dim.text("dim_param"))
    return tensor_type.number("elem_type"), tuple(shape)


def _dtype(number: int, name: str) -> tuple[str, int]:
    if number not in DTYPES:
        raise ProtobufError(f"{name!r} has the type {number}, which no bundle has")
    return DTYPES[number]
