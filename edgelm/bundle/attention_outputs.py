"""A graph whose attention can be seen: a copy in memory, in which every attention gives out its shares too.

GroupQueryAttention has a fourth output, the softmax of its scores, which it computes where the attribute `qk_output`
is 2. The copy names these outputs, and nothing else in it differs from the bundle's graph.
"""

from collections.abc import Iterable, Iterator, Sequence

from edgelm.bundle.manifest import Architecture, GraphFacts
from edgelm.bundle.onnx_file import DTYPES, GRAPH, MAX_NODES, MODEL, NODE
from edgelm.bundle.operators import CONTRIB
from edgelm.bundle.protobuf import Message, Span
from edgelm.errors import BundleError

_AFTER_SOFTMAX = 2
"""Value of the attribute `qk_output`."""
_KEY_INPUT = 3
"""Place of the cached keys among the inputs of GroupQueryAttention."""
_SPAN = 2
"""Protobuf's wire type of texts and nested messages."""


def attention_name(layer: int) -> str:
    """The output of the layer's shares, (B, H, T, P + T). No bundle has this name, because it has blanks."""
    return f"attention of layer {layer}"


def with_attention_outputs(graph: bytes, architecture: Architecture, names: GraphFacts) -> bytes:
    """The file `graph` with an output `attention_name(layer)` for each layer.

    `check_graph` has accepted `graph`. Raises BundleError if it does not hold one attention for each layer outside of
    its functions, as every exporter writes it.
    """
    model = Message(graph, (0, len(graph)), MODEL)
    whole = model.span("graph")
    content = Message(graph, whole, GRAPH)
    layer_of_keys = {names.past_names[0].replace("{layer}", str(i)): i for i in range(architecture.num_layers)}
    seen: list[int] = []
    edits: list[tuple[Span, bytes]] = []
    for span in content.spans("node", MAX_NODES):
        node = Message(graph, span, NODE)
        if (node.text("domain"), node.text("op_type")) == (CONTRIB, "GroupQueryAttention"):
            layer = layer_of_keys[node.texts("input")[_KEY_INPUT]]  # `check_graph` has seen that it is one of these
            seen.append(layer)
            attribute = _number_attribute("qk_output", _AFTER_SOFTMAX)
            added = _field(2, attention_name(layer).encode()) + _field(5, attribute)
            edits.append((span, graph[slice(*span)] + added))
    if sorted(seen) != list(range(architecture.num_layers)):
        raise BundleError(
            f"the attention of this bundle cannot be shown: its graph has {len(seen)} attentions for "
            f"{architecture.num_layers} layers, or hides them in functions"
        )
    outputs = [_output(attention_name(layer), names.dtype) for layer in range(architecture.num_layers)]
    shown = b"".join([*_edited(graph, whole, 1, edits), *outputs])
    return b"".join(_edited(graph, (0, len(graph)), 7, [(whole, shown)]))


def _edited(data: bytes, whole: Span, number: int, edits: Iterable[tuple[Span, bytes]]) -> Iterator[bytes]:
    """The message at `whole` in pieces, with other content in those spans of its field `number` that are in `edits`.

    The strict reader has seen that every number takes as few bytes as it can, so the head of a field has a known size.
    """
    at, end = whole
    for (start, stop), content in edits:
        head = len(_head(number, stop - start))
        yield data[at : start - head]
        yield _field(number, content)
        at = stop
    yield data[at:end]


def _output(name: str, dtype: str) -> bytes:
    """The field `output` of a graph: a value of any shape."""
    number = next(number for number, (known, _) in DTYPES.items() if known == dtype)
    tensor_type = _number(1, number)
    return _field(12, _field(1, name.encode()) + _field(2, _field(1, tensor_type)))


def _number_attribute(name: str, value: int) -> bytes:
    """An attribute that is a whole number (kind 2)."""
    return _field(1, name.encode()) + _number(3, value) + _number(20, 2)


def _field(number: int, content: bytes) -> bytes:
    return _head(number, len(content)) + content


def _head(number: int, size: int) -> bytes:
    return _varint(number << 3 | _SPAN) + _varint(size)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
    """An unsigned number, seven bits a byte, the lowest first."""
    parts: Sequence[int] = [value >> shift & 127 for shift in range(0, max(1, value.bit_length()), 7)]
    return bytes([*(part | 128 for part in parts[:-1]), parts[-1]])
