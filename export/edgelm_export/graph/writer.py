"""Writes an ONNX graph with its weights beside it: one data file, aligned, to be memory-mapped."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 21
IR_VERSION = 10
CONTRIB = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""
LOCAL = "edgelm"
"""Domain of the graph's local functions."""

_ALIGNMENT_BYTES = 4096  # a page, so that every weight can be mapped on its own
_INLINE_BYTES = 1024  # smaller tensors stay inside the graph file


def stored_bytes(tensor_bytes: int) -> int:
    """What a tensor takes in the data file, or in the graph file where it is small."""
    return tensor_bytes if tensor_bytes < _INLINE_BYTES else -(-tensor_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


class GraphWriter:
    """Collects nodes and weights; `save` writes them. Weights go to disk as they come, not into memory."""

    def __init__(self, folder: Path, file: str, weights_file: str) -> None:
        self._path = folder / file
        self._weights_file = weights_file
        self._data = (folder / weights_file).open("wb")
        self._nodes: list[Any] = []
        self._initializers: list[Any] = []
        self._functions: dict[str, Any] = {}

    def weight(self, name: str, array: npt.NDArray[Any]) -> str:
        """Store `array` under `name`; returns the name."""
        array = np.ascontiguousarray(array)
        if array.nbytes < _INLINE_BYTES:
            self._initializers.append(numpy_helper.from_array(array, name))
            return name
        self._data.write(b"\0" * (-self._data.tell() % _ALIGNMENT_BYTES))
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
        attributes: dict[str, int | float] | None = None,
        *,
        domain: str = "",
    ) -> str:
        """Add a node; returns the name of its first output."""
        names = [outputs] if isinstance(outputs, str) else list(outputs)
        # Named after what it makes, so that a viewer and a profile show where in the model it is.
        self._nodes.append(
            helper.make_node(operator, list(inputs), names, name=names[0], domain=domain, **(attributes or {}))
        )
        return names[0]

    def function(self, proto: Any) -> None:
        """Add a local function, once per name."""
        self._functions[proto.name] = proto

    def save(self, name: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Write the graph file and close the data file.

        Args:
            inputs, outputs: ``onnx.ValueInfoProto`` each.
        """
        self._data.close()
        graph = helper.make_graph(self._nodes, name, list(inputs), list(outputs), self._initializers)
        domains = {"": OPSET, CONTRIB: 1, **({LOCAL: 1} if self._functions else {})}
        model = helper.make_model(
            graph,
            producer_name="edgelm",
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid(domain, version) for domain, version in domains.items()],
            functions=list(self._functions.values()),
        )
        self._path.write_bytes(model.SerializeToString())
        onnx.checker.check_model(str(self._path))
