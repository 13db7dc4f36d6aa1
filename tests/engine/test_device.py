"""The choice of a device, on a machine without a GPU."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from edgelm import Bundle, DeviceError
from edgelm.engine.device import Device, choose_device, open_inference_session, require_version
from edgelm.engine.machine import default_threads
from tests.conftest import TINY_BUNDLE

CPU_GRAPH = Bundle.read(TINY_BUNDLE).manifest.graph
CUDA_GRAPH = replace(CPU_GRAPH, devices=("cpu", "cuda"))


def onnxruntime_with(*providers: str) -> Any:
    return SimpleNamespace(get_available_providers=lambda: list(providers))


CPU_ONLY = onnxruntime_with("CPUExecutionProvider")
WITH_CUDA = onnxruntime_with("CUDAExecutionProvider", "CPUExecutionProvider")


def test_auto_takes_cuda_only_where_bundle_and_package_have_it() -> None:
    assert choose_device("auto", CPU_GRAPH, WITH_CUDA) == Device("cpu")
    assert choose_device("auto", CUDA_GRAPH, CPU_ONLY) == Device("cpu")
    assert choose_device("auto", CUDA_GRAPH, WITH_CUDA) == Device("cuda", 0)
    assert choose_device("cuda:3", CUDA_GRAPH, WITH_CUDA) == Device("cuda", 3)
    assert choose_device("cpu", CUDA_GRAPH, WITH_CUDA) == Device("cpu")
    assert (str(Device("cpu")), str(Device("cuda", 1))) == ("cpu", "cuda:1")


@pytest.mark.parametrize(
    ("request_", "graph", "onnxruntime", "message"),
    [
        ("cuda", CPU_GRAPH, WITH_CUDA, "runs on the cpu only; export one with --precision fp16"),
        ("cuda", CUDA_GRAPH, CPU_ONLY, "no CUDA provider; run: pip uninstall onnxruntime"),
        ("cuda:x", CUDA_GRAPH, WITH_CUDA, "device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got 'cuda:x'"),
        ("gpu", CPU_GRAPH, CPU_ONLY, "device must be"),
        ("", CPU_GRAPH, CPU_ONLY, "device must be"),
    ],
)
def test_an_explicit_device_never_falls_back(request_: str, graph: Any, onnxruntime: Any, message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        choose_device(request_, graph, onnxruntime)


def test_cuda_that_does_not_load_is_an_error() -> None:
    """ONNX Runtime falls back to the CPU by itself. Where CUDA is requested, edgelm must not."""
    import onnxruntime

    fake = SimpleNamespace(
        SessionOptions=onnxruntime.SessionOptions,
        InferenceSession=lambda *args, **kw: SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"]),
    )
    with pytest.raises(DeviceError, match="cannot use device 'cuda:0': the CUDA provider did not load"):
        open_inference_session(TINY_BUNDLE / "model.onnx", Device("cuda"), 1, fake)  # type: ignore[arg-type]


def test_versions_compare_as_numbers() -> None:
    require_version("1.32.0", "1.32")
    require_version("1.100.0", "1.32")
    require_version("2.0.0+local", "1.32")
    with pytest.raises(DeviceError, match=r"needs ONNX Runtime 1\.32 or newer, 1\.9\.5 is installed"):
        require_version("1.9.5", "1.32")


def test_default_threads_are_what_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr("edgelm.engine.machine._cgroup_cpus", lambda: 1.5)
    assert default_threads() == 2
    monkeypatch.setattr("edgelm.engine.machine._cgroup_cpus", lambda: None)
    assert default_threads() == 4
    monkeypatch.setattr("edgelm.engine.machine._cgroup_cpus", lambda: 0.1)
    assert default_threads() == 1
