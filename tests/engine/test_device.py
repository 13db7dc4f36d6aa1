"""The choice of a device, on a machine without a GPU."""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest

from edgelm import Bundle, BundleError, DeviceError, InsufficientMemoryError
from edgelm.engine.call import DraftCost
from edgelm.engine.cgroup import CgroupLimit
from edgelm.engine.device import Device, choose_device, open_inference_session, require_version
from edgelm.engine.graph import Graph
from edgelm.engine.machine import default_threads, int8_products_may_saturate, system_name
from tests.conftest import TINY_BUNDLE, replace_file

CPU_GRAPH = Bundle.read(TINY_BUNDLE).manifest.graph
CUDA_GRAPH = replace(CPU_GRAPH, devices=("cpu", "cuda"))


def package_with(*providers: str) -> Any:
    return SimpleNamespace(get_available_providers=lambda: list(providers))


CPU_ONLY = package_with("CPUExecutionProvider")
WITH_CUDA = package_with("CUDAExecutionProvider", "CPUExecutionProvider")


def test_auto_takes_cuda_only_where_bundle_and_package_have_it() -> None:
    assert choose_device("auto", CPU_GRAPH, WITH_CUDA) == Device("cpu")
    assert choose_device("auto", CUDA_GRAPH, CPU_ONLY) == Device("cpu")
    assert choose_device("auto", CUDA_GRAPH, WITH_CUDA) == Device("cuda", 0)
    assert choose_device("cuda", CUDA_GRAPH, WITH_CUDA) == Device("cuda", 0)
    assert choose_device("cuda:3", CUDA_GRAPH, WITH_CUDA) == Device("cuda", 3)
    assert choose_device("cpu", CUDA_GRAPH, WITH_CUDA) == Device("cpu")
    assert (str(Device("cpu")), str(Device("cuda", 1))) == ("cpu", "cuda:1")


@pytest.mark.parametrize(
    ("request_", "graph", "package", "message"),
    [
        ("cuda", CPU_GRAPH, WITH_CUDA, "runs on the cpu only; export one with --precision fp16"),
        ("cuda", CUDA_GRAPH, CPU_ONLY, "no CUDA provider; run: pip uninstall onnxruntime"),
        ("cuda:x", CUDA_GRAPH, WITH_CUDA, "device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got 'cuda:x'"),
        ("gpu", CPU_GRAPH, CPU_ONLY, "device must be"),
        ("", CPU_GRAPH, CPU_ONLY, "device must be"),
    ],
)
def test_an_explicit_device_never_falls_back(request_: str, graph: Any, package: Any, message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        choose_device(request_, graph, package)


def test_cuda_that_does_not_load_is_an_error() -> None:
    """ONNX Runtime falls back to the CPU by itself. Where CUDA is requested, edgelm must not."""
    fake = SimpleNamespace(
        SessionOptions=onnxruntime.SessionOptions,
        InferenceSession=lambda *args, **kw: SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"]),
    )
    with pytest.raises(DeviceError, match="cannot use device 'cuda:0': the CUDA provider did not load"):
        open_inference_session(TINY_BUNDLE / "model.onnx", Device("cuda"), 1, fake)  # type: ignore[arg-type]


def test_what_a_session_on_the_cpu_is_opened_with(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: dict[str, Any] = {}

    def inference_session(path: str, options: Any, **more: Any) -> SimpleNamespace:
        opened.update(more, path=path, options=options)
        return SimpleNamespace()

    fake = SimpleNamespace(SessionOptions=onnxruntime.SessionOptions, InferenceSession=inference_session)
    for saturates in (False, True):
        monkeypatch.setattr("edgelm.engine.device.int8_products_may_saturate", lambda answer=saturates: answer)
        open_inference_session(TINY_BUNDLE / "model.onnx", Device("cpu"), 3, fake)  # type: ignore[arg-type]
        options = opened["options"]
        assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)
        assert (options.enable_mem_pattern, options.use_per_session_threads) == (False, True)
        assert options.get_session_config_entry("session.intra_op.spin_duration_us") == "500"
        if saturates:
            assert options.get_session_config_entry("session.x64quantprecision") == "1"
        else:
            with pytest.raises(RuntimeError):
                options.get_session_config_entry("session.x64quantprecision")
        assert opened["providers"] == ["CPUExecutionProvider"]
        assert opened["disabled_optimizers"] == ["SkipLayerNormFusion"]
        assert opened["path"] == str(TINY_BUNDLE / "model.onnx")


def test_drafts_cost_a_call_and_each_token() -> None:
    cost = DraftCost(call=0.4, token=0.3)
    assert [cost.of(drafted) for drafted in (0, 1, 4)] == pytest.approx([0.4, 0.7, 1.6])
    credits = {0.0: 0, 0.4: 0, 0.69: 0, 0.7: 1, 0.99: 1, 1.0: 2, 4.0: 12}
    assert {credit: cost.affordable(credit) for credit in credits} == credits


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


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "saturates"),
    [
        ("x86_64", "model\t: 1\nflags\t\t: fpu avx2 avx512f\n", True),
        ("x86_64", "flags\t\t: fpu avx512_vnni\n", False),
        ("AMD64", "flags\t\t: fpu avx_vnni\n", False),
        ("x86_64", "nothing that is known", True),
        ("x86_64", None, True),
        ("aarch64", None, False),
    ],
)
def test_products_may_saturate_unless_the_cpu_is_known_to_be_exact(
    machine: str, cpuinfo: str | None, saturates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_text(path: Path, **how: str) -> str:
        if cpuinfo is None:
            raise FileNotFoundError(path)
        return cpuinfo

    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(Path, "read_text", read_text)
    assert int8_products_may_saturate() is saturates


@pytest.mark.skipif(not hasattr(os, "uname"), reason="asks the system in the way of POSIX")
def test_the_systems_name_has_its_machine() -> None:
    assert system_name() == f"{os.uname().sysname} {os.uname().machine}"


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
    def fail(*args: object, **options: object) -> None:
        assert options["enable_fallback"] == 0
        raise RuntimeError("CUDA failure 100: no CUDA-capable device is detected\nmore")

    fake = SimpleNamespace(SessionOptions=onnxruntime.SessionOptions, InferenceSession=fail)
    with pytest.raises(DeviceError, match="cannot use device 'cuda:0': CUDA failure 100: no CUDA-capable device is"):
        open_inference_session(TINY_BUNDLE / "model.onnx", Device("cuda"), 1, fake)  # type: ignore[arg-type]


def test_without_proc_the_message_says_what_to_mount() -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("Secure opened-file canonicalization requires procfs at /proc/self/fd/3.")

    fake = SimpleNamespace(SessionOptions=onnxruntime.SessionOptions, InferenceSession=fail)
    with pytest.raises(DeviceError, match="without /proc: mount it in this chroot or sandbox"):
        open_inference_session(TINY_BUNDLE / "model.onnx", Device("cpu"), 1, fake)  # type: ignore[arg-type]
