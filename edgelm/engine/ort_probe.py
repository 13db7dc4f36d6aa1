"""What ONNX Runtime says about itself, as a program of its own that imports nothing else.

A broken installation may end the process that imports it, and messages about CUDA go to standard error. So
`edgelm.engine.installation` runs this file in a child process.
"""

import json
import os
import sys
from typing import Any


def facts() -> dict[str, Any]:
    """Version, folder and providers of the installed ONNX Runtime, and whether CUDA loads; or the error of its import.

    "cuda" is None where the package has no CUDA provider, "" where it loads, and otherwise the reason why it does not.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime

        providers = list(onnxruntime.get_available_providers())
    except Exception as error:
        missing = isinstance(error, (ModuleNotFoundError, AttributeError))
        return {"error": "not installed" if missing else f"does not load: {error}"}
    version, folder = str(onnxruntime.__version__), os.path.dirname(onnxruntime.__file__ or "")  # noqa: PTH120
    cuda = _why_not_cuda(onnxruntime) if "CUDAExecutionProvider" in providers else None
    return {"version": version, "folder": folder, "providers": providers, "cuda": cuda}


def _why_not_cuda(onnxruntime: Any) -> str:
    try:
        if hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()
        options = onnxruntime.SessionOptions()
        session = onnxruntime.InferenceSession(
            smallest_model(), options, providers=["CUDAExecutionProvider"], enable_fallback=0
        )
    except Exception as error:
        return str(error) or type(error).__name__
    return "" if "CUDAExecutionProvider" in session.get_providers() else "the CUDA provider did not load"


def smallest_model() -> bytes:
    """An ONNX model in protobuf: one Identity node from x to y, float32 (1,)."""

    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    def whole(number: int, value: int) -> bytes:
        return bytes([number << 3, value])

    tensor = field(1, whole(1, 1) + field(2, field(1, whole(1, 1))))  # of type float, with one dimension of size 1
    node = field(1, b"x") + field(2, b"y") + field(4, b"Identity")
    values = field(11, field(1, b"x") + field(2, tensor)) + field(12, field(1, b"y") + field(2, tensor))
    graph = field(1, node) + field(2, b"g") + values
    return whole(1, 8) + field(8, field(1, b"") + whole(2, 13)) + field(7, graph)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(facts()) + "\n")
