"""The choice of a device, on a machine without a GPU."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgelm import Bundle, BundleError, DeviceError, InsufficientMemoryError
from edgelm.engine.cgroup import CgroupLimit
from edgelm.engine.device import Device, choose_device, open_inference_session, require_version
from edgelm.engine.graph import Graph
from edgelm.engine.machine import default_threads
from tests.conftest import TINY_BUNDLE, replace_file

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


@pytest.mark.parametrize(("quotas", "threads"), [([1.5], 2), ([], 4), ([0.1], 1), ([8, 2.5, 3], 3)])
def test_default_threads_are_what_this_process_may_use(
    quotas: list[float], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = [CgroupLimit(Path("cpu.max"), quota, 0) for quota in quotas]
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr("edgelm.engine.machine.cpu_limits", lambda: limits)
    assert default_threads() == threads


NO_MEMORY = "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Exception during initialization: std::bad_alloc"
NO_THREAD = "PosixThread::PosixThread(...) pthread_create failed, error code: 12 error msg: Cannot allocate memory"


@pytest.mark.parametrize("reason", [NO_MEMORY, NO_THREAD, "Failed to allocate memory for requested buffer of size 5"])
def test_a_lack_of_memory_is_named_and_nothing_is_printed(
    reason: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from onnxruntime import InferenceSession

    def fail(*args: object) -> None:
        raise RuntimeError(reason)

    monkeypatch.setattr(InferenceSession, "_create_inference_session", fail)
    with pytest.raises(InsufficientMemoryError, match="there is no memory left to load"):
        Graph.open(Bundle.read(TINY_BUNDLE), device="cpu", threads=1)
    assert capfd.readouterr() == ("", "")


def test_another_failure_prints_nothing_on_stdout(tiny_copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    replace_file(tiny_copy, "model.onnx", (tiny_copy / "model.onnx").read_bytes()[:-100])
    with pytest.raises(BundleError, match=r"model\.onnx"):
        Graph.open(Bundle.read(tiny_copy), device="cpu", threads=1)
    assert capfd.readouterr().out == ""


def test_cuda_that_fails_is_an_error_of_the_device() -> None:
    import onnxruntime

    def fail(*args: object, **options: object) -> None:
        assert options["enable_fallback"] == 0
        raise RuntimeError("CUDA failure 100: no CUDA-capable device is detected\nmore")

    fake = SimpleNamespace(SessionOptions=onnxruntime.SessionOptions, InferenceSession=fail)
    with pytest.raises(DeviceError, match="cannot use device 'cuda:0': CUDA failure 100: no CUDA-capable device is"):
        open_inference_session(TINY_BUNDLE / "model.onnx", Device("cuda"), 1, fake)  # type: ignore[arg-type]


def test_without_proc_the_message_says_what_to_mount() -> None:
    import onnxruntime

    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("Secure opened-file canonicalization requires procfs at /proc/self/fd/3.")

    fake = SimpleNamespace(SessionOptions=onnxruntime.SessionOptions, InferenceSession=fail)
    with pytest.raises(DeviceError, match="without /proc: mount it in this chroot or sandbox"):
        open_inference_session(TINY_BUNDLE / "model.onnx", Device("cpu"), 1, fake)  # type: ignore[arg-type]
