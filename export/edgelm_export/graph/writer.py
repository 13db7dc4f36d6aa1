"""Writes an ONNX graph, and its weights into one data file beside it, aligned so that it can be memory-mapped."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgelm.bundle.graph_rules import IR_VERSION
from edgelm.bundle.operators import CONTRIB, CONTRIB_OPSET, LOCAL, LOCAL_OPSET, OPSET
from edgelm_export.quantize.storage import ALIGNMENT_BYTES, INLINE_BYTES


def constant_node(name: str, value: npt.NDArray[Any]) -> onnx.NodeProto:
    """The constant `name` of a local function."""
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value, name))


class GraphWriter:
    """Collects the nodes, which `save` writes. Each weight goes to disk at once and takes no memory."""

    def __init__(self, folder: Path, file: str, weights_file: str) -> None:
        """Begin the data file `weights_file` in `folder`, beside the graph file `file`."""
        self._path = folder / file
        self._weights_file = weights_file
        self._data = (folder / weights_file).open("wb")
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: list[TensorProto] = []
        self._names: set[str] = set()
        self._functions: dict[str, onnx.FunctionProto] = {}

    def weight(self, name: str, array: npt.NDArray[Any]) -> str:
        """Store `array` under `name`, once; returns the name."""
        if name in self._names:
            return name
        self._names.add(name)
        array = np.ascontiguousarray(array)
        if array.nbytes < INLINE_BYTES:
            self._initializers.append(numpy_helper.from_array(array, name))
            return name
        self._data.write(b"\0" * (-self._data.tell() % ALIGNMENT_BYTES))
        tensor = TensorProto(
            name=name,
            dims=array.shape,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in (("location", self._weights_file), ("offset", self._data.tell()), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        self._data.write(array.tobytes())
        self._initializers.append(tensor)
        return name

    def node(
        self,
        operator: str,
        inputs: Sequence[str],
        outputs: str | Sequence[str],
        attributes: Mapping[str, int | float | str] | None = None,
        *,
        domain: str = "",
    ) -> str:
        """Add a node that computes `outputs`, or one output; returns the name of its first output.

        Args:
            inputs: names of the inputs; "" where an optional input is left out.
        """
        names = [outputs] if isinstance(outputs, str) else list(outputs)
        # A node is named after its output, so that a viewer and a profile show where in the model it is.
        self._nodes.append(
            helper.make_node(operator, list(inputs), names, name=names[0], domain=domain, **(attributes or {}))
        )
        return names[0]

    def function(self, proto: onnx.FunctionProto) -> None:
        """Add a local function. A second function of the same name replaces the first."""
        self._functions[proto.name] = proto

    def save(self, name: str, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto]) -> None:
        """Write the graph file, whose graph is called `name`, and close the data file."""
        self._data.close()
        graph = helper.make_graph(self._nodes, name, list(inputs), list(outputs), self._initializers)
        domains = {"": OPSET, CONTRIB: CONTRIB_OPSET} | ({LOCAL: LOCAL_OPSET} if self._functions else {})
        model = helper.make_model(
            graph,
            producer_name="edgelm",
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid(domain, version) for domain, version in domains.items()],
            functions=list(self._functions.values()),
        )
        text = model.SerializeToString()
        # onnx does not know this operator of ONNX Runtime, and does not check nodes of foreign domains.
        for node in model.graph.node:
            if node.op_type == "SimplifiedLayerNormalization":
                node.domain = CONTRIB
        self._path.write_bytes(model.SerializeToString())
        onnx.checker.check_model(str(self._path))
        self._path.write_bytes(text)
