"""A graph whose attention can be seen: a copy in memory, in which every attention gives out its shares too.

GroupQueryAttention has a fourth output, the softmax of its scores, which it computes where the attribute `qk_output`
is 2. The copy names these outputs, and nothing else in it differs from the bundle's graph.
"""

from edgelm.bundle.manifest import Architecture, GraphFacts
from edgelm.bundle.onnx_file import DTYPES, GRAPH, MAX_NODES, MODEL, NODE
from edgelm.bundle.operators import CONTRIB
from edgelm.bundle.protobuf import Message, Span, field_bytes, replaced, varint_bytes
from edgelm.errors import BundleError

_AFTER_SOFTMAX = 2
"""Value of the attribute `qk_output`."""
_KEY_INPUT = 3
"""Place of the cached keys among the inputs of GroupQueryAttention."""


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
    edited: dict[Span, bytes] = {}
    for span in content.spans("node", MAX_NODES):
        node = Message(graph, span, NODE)
        if (node.text("domain"), node.text("op_type")) == (CONTRIB, "GroupQueryAttention"):
            layer = layer_of_keys[node.texts("input")[_KEY_INPUT]]  # `check_graph` has seen that it is one of these
            seen.append(layer)
            attribute = _number_attribute("qk_output", _AFTER_SOFTMAX)
            added = field_bytes(2, attention_name(layer).encode()) + field_bytes(5, attribute)
            edited[span] = graph[slice(*span)] + added
    if sorted(seen) != list(range(architecture.num_layers)):
        raise BundleError(
            f"the attention of this bundle cannot be shown: its graph has {len(seen)} attentions for "
            f"{architecture.num_layers} layers, or hides them in functions"
        )
    outputs = [_output(attention_name(layer), names.dtype) for layer in range(architecture.num_layers)]
    nodes = replaced(graph, whole, 1, lambda span: edited.get(span, graph[slice(*span)]))
    return replaced(graph, (0, len(graph)), 7, lambda _: nodes + b"".join(outputs))


def _output(name: str, dtype: str) -> bytes:
    """The field `output` of a graph: a value of any shape."""
    number = next(number for number, (known, _) in DTYPES.items() if known == dtype)
    tensor_type = _number(1, number)
    return field_bytes(12, field_bytes(1, name.encode()) + field_bytes(2, field_bytes(1, tensor_type)))


def _number_attribute(name: str, value: int) -> bytes:
    """An attribute that is a whole number (kind 2)."""
    return field_bytes(1, name.encode()) + _number(3, value) + _number(20, 2)


def _number(field: int, value: int) -> bytes:
    return varint_bytes(field << 3) + varint_bytes(value)
