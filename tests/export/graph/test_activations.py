"""Each activation by itself against transformers, over all inputs that matter, in one node's graph."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
import torch
from onnx import helper
from transformers.activations import ACT2FN

from edgelm_export.graph.activations import write_activation
from edgelm_export.graph.writer import GraphWriter
from edgelm_export.model.activations import ACTIVATIONS, collect_activation, widen_activation

pytestmark = pytest.mark.export

INPUTS = np.concatenate([np.linspace(-12, 12, 4801), [-60, -1e-3, -1e-6, -0.0, 0, 1e-6, 60]]).astype(np.float32)


@pytest.mark.parametrize(("dtype", "limit"), [(np.float32, 2e-6), (np.float16, 2e-3)], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activation(name: str, dtype: type[np.floating], limit: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = ACT2FN[name]
    for parameter in module.parameters():
        parameter.data.normal_()
    x = INPUTS.astype(dtype)
    with torch.no_grad():
        wanted = module(torch.from_numpy(x.astype(np.float32))).numpy()
    widen_activation(module)
    found = run(name, module, x, tmp_path)
    assert found.dtype == dtype
    assert np.max(np.abs(found.astype(np.float32) - wanted) / np.maximum(1, np.abs(wanted))) <= limit


def run(name: str, module: object, x: npt.NDArray[np.floating], folder: Path) -> npt.NDArray[np.floating]:
    """The activation of `x` (F,), as the graph computes it."""
    dtype, kind = x.dtype.type, helper.np_dtype_to_tensor_dtype(x.dtype)
    writer = GraphWriter(folder, "model.onnx", "model.onnx.data")
    write_activation(writer, collect_activation(name, module), "x", "y", dtype)
    info = helper.make_tensor_value_info
    writer.save("activation", [info("x", kind, [1, 1, len(x)])], [info("y", kind, [1, 1, len(x)])])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    result: npt.NDArray[np.floating] = session.run(["y"], {"x": x[None, None]})[0][0, 0]
    return result
