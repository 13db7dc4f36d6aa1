"""What a bundle's graph may be. It is read and judged here before ONNX Runtime sees it.

ONNX Runtime trusts a graph: it runs nodes while it loads (constant folding), inlines functions without a limit, opens
the files that tensors name, and some of its operators end the process on input that they do not expect. So a graph
may hold nothing but what the exporter writes, and every type and shape in it must follow from the manifest.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from edgelm.bundle.manifest import Architecture, GraphFacts
from edgelm.bundle.onnx_file import Function, Node, OnnxFile, Place, Port, read_onnx
from edgelm.bundle.operators import (
    CONTRIB,
    CONTRIB_OPSET,
    LOCAL,
    LOCAL_OPSET,
    LOOKUPS,
    OPERATORS,
    OPSET,
    SPARE,
    STORES,
    WIDENED,
    Call,
    GraphError,
    Value,
    shown,
    stored_value,
)
from edgelm.bundle.protobuf import ProtobufError
from edgelm.errors import UPGRADE_HINT, BundleError

IR_VERSION = 10
MAX_NODES_PER_LAYER = 32
MAX_OTHER_NODES = 32
"""Nodes before the first layer and behind the last."""


def check_graph(data: bytes, architecture: Architecture, names: GraphFacts, weights_bytes: int) -> None:
    """Judge the graph file `data` of a bundle whose weights file has `weights_bytes`.

    Raises BundleError if the file is damaged; has an operator, attribute, type or shape that no exporter writes;
    has other inputs and outputs than the manifest states; refers to data outside the weights file; or computes
    something that nobody uses.
    """
    try:
        _Graph(read_onnx(data), architecture, names, weights_bytes).check()
    except (ProtobufError, GraphError) as error:
        raise BundleError(f"the graph {names.file!r} is not one that edgelm writes: {error}") from None


class _Graph:
    """A graph under examination. Every method raises GraphError."""

    def __init__(self, file: OnnxFile, architecture: Architecture, names: GraphFacts, weights_bytes: int) -> None:
        self._file, self._architecture, self._names = file, architecture, names
        self._weights_bytes = weights_bytes
        parts = (*names.past_names, *names.present_names)
        self._caches = [
            [name.replace("{layer}", str(layer)) for name in parts] for layer in range(architecture.num_layers)
        ]
        """For each layer the inputs of its keys and its values, then the outputs of both."""
        self._cache_of_key = {key: (value, *presents) for key, value, *presents in self._caches}
        self._functions = {function.name: function for function in file.functions}
        self._results: dict[tuple[str, tuple[Value | None, ...]], tuple[Value, ...]] = {}
        self._widest = 0
        """How many numbers the widest value so far has for each token."""

    def check(self) -> None:
        """Check everything."""
        file = self._file
        opsets = {"": OPSET, CONTRIB: CONTRIB_OPSET} | ({LOCAL: LOCAL_OPSET} if file.functions else {})
        if file.ir_version != IR_VERSION or file.opsets != opsets:
            raise GraphError(f"it has the IR version {file.ir_version} and the opsets {file.opsets}, not {opsets}")
        limit = MAX_NODES_PER_LAYER * self._architecture.num_layers + MAX_OTHER_NODES
        if len(file.nodes) > limit:
            raise GraphError(f"it has {len(file.nodes):,} nodes, more than {limit:,}")
        inputs, outputs = self._ports()
        _check_ports("inputs", file.inputs, inputs)
        _check_ports("outputs", file.outputs, outputs)
        facts = self._architecture  # the forecast of memory depends on this number and on the widest activation
        cached = 2 * facts.num_layers * facts.num_key_value_heads * facts.head_dim
        if facts.cache_values_per_token != cached:
            stated = f"bundle.json states {facts.cache_values_per_token}"
            raise GraphError(f"a token takes {cached} numbers in its cache, but {stated}")
        self._check_places()
        self._check_functions()
        values = self._given(inputs)
        self._follow(file.nodes, values, [port.name for port in outputs], self._functions)
        if facts.widest_activation != self._widest:
            stated = f"bundle.json states {facts.widest_activation}"
            raise GraphError(f"its widest activation has {self._widest} numbers for each token, but {stated}")
        if self._names.exact_logits is not None and not any(node.operator == "TopK" for node in file.nodes):
            raise GraphError("its head has one stage, but bundle.json states two")
        for port in outputs:
            value = values.get(port.name)
            if value is None or (value.dtype, value.shape) != (port.dtype, port.shape):
                raise GraphError(f"the output {port.name!r} is not what bundle.json states")
        for layer in self._caches:
            if [values[name].port for name in layer[2:]] != layer[2:]:
                raise GraphError(f"the outputs {layer[2:]} are not the keys and values of one layer")

    def _ports(self) -> tuple[list[Port], list[Port]]:
        """The inputs and outputs that the manifest states."""
        facts, names = self._architecture, self._names
        tokens, cache = ("batch", "new_tokens"), ("batch", facts.num_key_value_heads, "capacity", facts.head_dim)
        inputs = [
            Port(names.input_ids, "int64", tokens),
            Port(names.seqlens_k, "int32", ("batch",)),
            Port(names.query_seqlens, "int32", ("batch",)),
            Port(names.total_sequence_length, "int32", ()),
            Port(names.logits_index, "int64", ("rows",)),
            *(Port(name, names.kv_dtype, cache) for layer in self._caches for name in layer[:2]),
        ]
        if names.position_ids is not None:
            inputs.append(Port(names.position_ids, "int64", tokens))
        outputs = [
            Port(names.logits, "float32", ("rows", facts.vocab_size)),
            Port(names.hidden_states, names.dtype, (*tokens, facts.hidden_size)),
            *(Port(name, names.kv_dtype, cache) for layer in self._caches for name in layer[2:]),
        ]
        return inputs, outputs

    def _given(self, inputs: Sequence[Port]) -> dict[str, Value]:
        """The graph's inputs and stored tensors."""
        below = {self._names.input_ids: self._architecture.vocab_size}
        if self._names.position_ids is not None:
            below[self._names.position_ids] = self._architecture.context_length
        values = {
            port.name: Value(port.dtype, port.shape, port=port.name, below=below.get(port.name)) for port in inputs
        }
        for tensor in self._file.tensors:
            _add(values, tensor.name, stored_value(tensor))
        return values

    def _check_places(self) -> None:
        """Tensors in the weights file, and nowhere else, each in a place of its own."""
        end, end_name = 0, ""
        places = [(tensor.content, tensor.name) for tensor in self._file.tensors if isinstance(tensor.content, Place)]
        for place, name in sorted(places, key=lambda pair: pair[0].offset):
            if place.file != self._names.weights_file:
                file = f"{place.file[:80]!r}, not in {self._names.weights_file!r}"
                raise GraphError(f"the tensor {name!r} is in the file {file}")
            if place.offset < end:
                raise GraphError(f"the tensors {end_name!r} and {name!r} share bytes of the weights file")
            end, end_name = place.offset + place.length, name
        if end > self._weights_bytes:
            raise GraphError(
                f"the tensor {end_name!r} ends at byte {end:,} of a weights file of {self._weights_bytes:,} bytes"
            )

    def _check_functions(self) -> None:
        functions = self._file.functions
        called = {node.operator for node in self._file.nodes if node.domain == LOCAL}
        if len(self._functions) != len(functions) or called != self._functions.keys():
            raise GraphError(f"it must define each of these functions once: {', '.join(sorted(called)) or 'none'}")
        for function in functions:
            if function.domain != LOCAL or function.opsets.items() - {("", OPSET), (CONTRIB, CONTRIB_OPSET)}:
                raise GraphError(f"the function {function.name!r} has another domain or other opsets than bundles have")

    def _follow(
        self,
        nodes: Sequence[Node],
        values: dict[str, Value],
        outputs: Sequence[str],
        functions: Mapping[str, Function],
    ) -> None:
        """Add what `nodes` make, in their order, to `values`, their inputs. Everything must be used."""
        products: Counter[str] = Counter()
        for node in nodes:
            try:
                made = self._call(node, [values[name] if name else None for name in node.inputs], functions)
                if len(made) != len(node.outputs):
                    raise GraphError(f"has {len(node.outputs)} outputs instead of {len(made)}")
            except KeyError as error:
                raise GraphError(f"{_title(node)}: nothing before it makes its input {error}") from None
            except GraphError as error:
                raise GraphError(f"{_title(node)}: it {error}") from None
            for name, value in zip(node.outputs, made, strict=True):
                _add(values, name, value)
                if (node.domain, node.operator) not in WIDENED:
                    self._widest = max(self._widest, _width(value))
            if (node.domain, node.operator) not in LOOKUPS:
                products.update(name for name in node.inputs if name)
        used = {name for node in nodes for name in node.inputs} | set(outputs)
        used |= {node.outputs[0] for node in nodes if (node.domain, node.operator) in SPARE}
        unused = [name for name in values if name not in used]
        if unused:
            raise GraphError(f"nothing uses {unused[0]!r}")
        for name, count in products.items():
            # Each product copies its matrix into another order, so memory could grow without a limit.
            if count > 1 and values[name].is_constant and len(values[name].shape) > 1:
                raise GraphError(f"{count} nodes multiply by {name!r}")

    def _call(self, node: Node, inputs: Sequence[Value | None], functions: Mapping[str, Function]) -> tuple[Value, ...]:
        """What a node makes of its inputs."""
        arguments, kind = tuple(inputs), (node.domain, node.operator)
        if kind not in STORES and all(value is None or value.is_constant for value in arguments):
            raise GraphError("computes something from stored values alone")
        if node.domain == LOCAL and node.operator in functions:
            if node.attributes:
                raise GraphError("gives attributes to a function")
            return self._result(functions[node.operator], arguments)
        if kind not in OPERATORS:
            raise GraphError(
                f"is of a kind that this edgelm does not run: if the bundle is newer than this edgelm, {UPGRADE_HINT}"
            )
        operator = OPERATORS[kind]
        if "".join("." if value is None else "x" for value in arguments) not in operator.inputs:
            raise GraphError(f"has {len(arguments)} inputs, or leaves out one that it needs")
        if node.attributes.keys() - operator.optional.keys() != operator.attributes.keys():
            raise GraphError(f"has the attributes {sorted(node.attributes)} instead of {sorted(operator.attributes)}")
        for name, value in node.attributes.items():
            allowed = operator.attributes.get(name, operator.optional.get(name, ()))
            if not (isinstance(value, allowed) if isinstance(allowed, type) else value in allowed):
                raise GraphError(f"has an attribute {name!r} that no bundle has")
        return operator.rule(Call(arguments, node.attributes, self._architecture, self._names, self._cache_of_key))

    def _result(self, function: Function, arguments: tuple[Value | None, ...]) -> tuple[Value, ...]:
        """What a function makes of its arguments."""
        key = function.name, arguments
        if key not in self._results:
            values: dict[str, Value] = {}
            for name, argument in zip(function.inputs, arguments, strict=False):
                if argument is None:
                    raise GraphError("leaves out an input of a function")
                _add(values, name, argument)
            if len(arguments) != len(function.inputs):
                raise GraphError(f"gives {len(arguments)} inputs to a function of {len(function.inputs)}")
            self._follow(function.nodes, values, function.outputs, {})
            made, outputs = values.keys() - set(function.inputs), set(function.outputs)
            if not outputs or len(outputs) != len(function.outputs) or not outputs <= made:
                raise GraphError("calls a function that does not make its outputs, each once")
            self._results[key] = tuple(values[name] for name in function.outputs)
        return self._results[key]


def _check_ports(kind: str, found: Sequence[Port], stated: Sequence[Port]) -> None:
    """Raise GraphError unless the graph's inputs or outputs are those of the manifest, in any order."""
    by_name = {port.name: port for port in stated}
    if len(by_name) != len(stated):
        raise GraphError(f"bundle.json gives two of its {kind} one name")
    if sorted(port.name for port in found) != sorted(by_name):
        raise GraphError(f"it has other {kind} than bundle.json states")
    for port in found:
        if port != by_name[port.name]:
            wanted = by_name[port.name]
            raise GraphError(
                f"{port.name!r} is {port.dtype} {shown(port.shape)}, but bundle.json states {wanted.dtype} "
                f"{shown(wanted.shape)}"
            )


def _add(values: dict[str, Value], name: str, value: Value) -> None:
    if not name or name in values:
        raise GraphError(f"two values are called {name!r}" if name else "a value has no name")
    values[name] = value


def _width(value: Value) -> int:
    """How many numbers a value has for each token; 0 for what is stored, for caches and for rows of logits."""
    axes = 2 if value.shape[:2] == ("batch", "new_tokens") else 1 if value.shape[:1] == ("tokens",) else None
    return 0 if axes is None else math.prod(size for size in value.shape[axes:] if isinstance(size, int))


def _title(node: Node) -> str:
    return f"the node {node.name[:80]!r} ({node.operator[:80]})"
