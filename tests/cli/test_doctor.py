"""``edgelm doctor`` on a good machine, and on broken installations that are made by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgelm.cli import doctor
from edgelm.cli.doctor import Finding
from edgelm.engine import installation, machine, ort_probe
from edgelm.engine.installation import OnnxRuntimeFacts, Package, missing_library
from tests.conftest import TINY_BUNDLE, RunCommand

NAMES: tuple[str, ...] = (
    "edgelm",
    "numpy",
    "onnxruntime",
    "telemetry",
    "CUDA",
    "processor",
    "features",
    "threads",
    "memory",
)
NAMES += ("huge pages", "disk", "output", "bundle", "forecast", "model")


def doctor_with(folder: Path, *args: str, **env: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Status and findings, by name, of ``edgelm doctor`` with the packages in `folder` before all others."""
    path = os.pathsep.join([str(folder), *sys.path])
    command = [sys.executable, "-m", "edgelm", "doctor", "--json", *args]
    environment = {**os.environ, "PYTHONPATH": path, **env}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    content = json.loads(done.stdout)
    assert content["healthy"] == (done.returncode == 0) and done.stderr == ""
    return done.returncode, {check["name"]: check for check in content["checks"]}


def package(folder: Path, code: str) -> Path:
    """A package ``onnxruntime`` in `folder`."""
    (folder / "onnxruntime").mkdir(parents=True)
    (folder / "onnxruntime" / "__init__.py").write_text(code, encoding="utf-8")
    return folder


def test_a_good_machine(edgelm_command: RunCommand) -> None:
    shown = edgelm_command("doctor", "-m", str(TINY_BUNDLE))
    lines = shown.stdout.splitlines()
    assert (shown.status, shown.stderr) == (0, "") and max(map(len, lines)) <= 80
    for name in NAMES:
        assert any(line[:4] in ("ok  ", "warn") and line[6:].startswith(name) for line in lines), name
    narrow = edgelm_command("doctor", str(TINY_BUNDLE), env={"COLUMNS": "60"}).stdout.splitlines()
    assert max(map(len, narrow)) <= 60


@pytest.mark.parametrize(
    ("code", "fact"),
    [
        ("raise ImportError('libfoo.so.1: cannot open shared object file\\nmore')", "does not load: libfoo.so.1"),
        ("import os; os.abort()", "ends the process that imports it, with status"),
        ("raise SystemExit(3)", "ends the process that imports it, with status 3"),
        ("", "not installed"),  # as a folder that is left over
    ],
)
def test_a_broken_onnxruntime(tmp_path: Path, code: str, fact: str) -> None:
    status, found = doctor_with(package(tmp_path, code), str(TINY_BUNDLE))
    assert status == 1 and found["onnxruntime"]["status"] == "fail" and fact in found["onnxruntime"]["fact"]
    assert "pip install 'edgelm[cpu]'" in found["onnxruntime"]["advice"]
    assert found["model"]["status"] == "fail" and "not tried" in found["model"]["fact"]
    assert found["bundle"]["status"] == "ok" and found["memory"]["status"] == "ok"


def test_two_packages_that_overwrite_each_other(tmp_path: Path) -> None:
    for name, version in (("onnxruntime_gpu", "1.30.0"), ("onnxruntime_directml", "1.24.0")):
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "RECORD").write_text("onnxruntime/__init__.py,,\n")
    other = tmp_path / "onnxruntime_extensions-1.0.dist-info"  # brings a package of its own
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-extensions\nVersion: 1.0\n")
    (other / "RECORD").write_text("onnxruntime_extensions/__init__.py,,\n")
    status, found = doctor_with(tmp_path, str(TINY_BUNDLE))
    packages = found["packages"]
    assert status == 1 and packages["status"] == "fail" and "overwrite each other's files" in packages["fact"]
    assert "onnxruntime-gpu 1.30.0" in packages["fact"] and "extensions" not in packages["fact"]
    assert "pip uninstall -y onnxruntime" in packages["advice"]


def test_a_damaged_bundle_and_a_missing_one(tmp_path: Path, tiny_copy: Path) -> None:
    data = bytearray((tiny_copy / "model.onnx.data").read_bytes())
    data[-1] ^= 1
    (tiny_copy / "model.onnx.data").write_bytes(data)
    status, found = doctor_with(tmp_path, str(tiny_copy))
    assert status == 1 and "SHA-256 differs" in found["bundle"]["fact"] and "model" not in found
    status, found = doctor_with(tmp_path, "-m", "/nowhere")
    assert status == 1 and "there is no such folder" in found["bundle"]["fact"]


def test_settings_of_the_user(tmp_path: Path) -> None:
    env = {"ORT_DISABLE_TELEMETRY": "0", "PYTHONIOENCODING": "ascii"}
    status, found = doctor_with(tmp_path, str(TINY_BUNDLE), **env)
    assert status == 0  # warnings only
    assert found["telemetry"]["status"] == found["output"]["status"] == "warn"
    assert "ORT_DISABLE_TELEMETRY=0" in found["telemetry"]["fact"] and "UTF-8" in found["output"]["advice"]


@pytest.mark.skipif(sys.platform != "linux", reason="sets a limit of Linux")
def test_limits_are_shown_with_where_they_come_from(tmp_path: Path) -> None:
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_DATA, (5 << 30, 5 << 30));"
        f"sys.argv = ['edgelm', 'doctor', {str(TINY_BUNDLE)!r}];"
        "from edgelm.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "MB left by RLIMIT_DATA" in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("flags", "x86", "status", "words"),
    [
        ({"avx2", "avx512f", "avx512_vnni"}, True, "ok", "AVX2, AVX-512, AVX512-VNNI"),
        ({"avx2"}, True, "warn", "AVX2"),
        ({"sse4_2"}, True, "warn", "none that speed up models"),
        ({"asimd", "asimddp"}, False, "ok", "NEON, NEON dot product"),
        ({"asimd"}, False, "warn", "NEON"),
        (None, True, "ok", "this system does not list them"),
    ],
)
def test_features_of_the_processor(
    flags: set[str] | None, x86: bool, status: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cpu_flags", lambda: flags)
    monkeypatch.setattr(machine, "is_x86", lambda: x86)
    found = {finding.name: finding for finding in doctor._processor()}
    assert (found["features"].status, found["features"].fact) == (status, words)
    assert bool(found["features"].advice) == (status == "warn")


def test_cuda_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = OnnxRuntimeFacts(None, "1.32.0", "/x", ("CUDAExecutionProvider",), "libcublasLt.so.12: cannot open it")
    (cuda,) = [finding for finding in doctor._onnxruntime(facts) if finding.name == "CUDA"]
    assert cuda.status == "warn" and "libcublasLt.so.12" in cuda.fact and "edgelm[gpu]" in cuda.advice
    (cuda,) = [f for f in doctor._onnxruntime(OnnxRuntimeFacts(None, providers=())) if f.name == "CUDA"]
    assert cuda.status == "ok" and "CPU only" in cuda.fact


def test_the_reason_why_a_library_does_not_load() -> None:
    messages = (
        "\x1b[1;31m2026 [E:onnxruntime:Default, provider_bridge_ort.cc:2251] /onnxruntime_src/x.cc:1778 "
        "Failed to load library libonnxruntime_providers_cuda.so with error: libcublasLt.so.12: cannot open shared "
        "object file: No such file or directory\x1b[m\nmore\n"
    )
    expected = "libcublasLt.so.12: cannot open shared object file: No such file or directory"
    assert missing_library(messages) == expected
    assert missing_library("nothing of the kind") is None


def test_the_probe_knows_whether_cuda_loads() -> None:
    def with_providers(providers: list[str]) -> SimpleNamespace:
        session = SimpleNamespace(get_providers=lambda: providers)
        return SimpleNamespace(SessionOptions=object, InferenceSession=lambda *a, **kw: session)

    assert ort_probe._why_not_cuda(with_providers(["CUDAExecutionProvider"])) == ""
    assert "did not load" in ort_probe._why_not_cuda(with_providers(["CPUExecutionProvider"]))
    assert ort_probe._why_not_cuda(SimpleNamespace()) != ""


def test_the_smallest_model_runs() -> None:
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(ort_probe.smallest_model(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"x": np.array([3.5], np.float32)})
    assert result.tolist() == [3.5]


def test_packages_that_are_old_or_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = [Package("numpy", "1.25.2", "1.26"), Package("tokenizers", None, "0.21"), Package("click", "8.1", "8.1")]
    monkeypatch.setattr(installation, "needed_packages", lambda: packages)
    assert list(doctor._packages()) == [
        Finding("numpy", "fail", "1.25.2 is older than 1.26", "Run: pip install -U numpy"),
        Finding("tokenizers", "fail", "not installed", "Run: pip install tokenizers"),
        Finding("click", "ok", "8.1"),
    ]
    assert not Package("numpy", "1.26", "1.26.0").old and Package("numpy", "1.9.9", "1.10").old


def test_a_check_that_fails_by_itself_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgelm.cli import cli

    def broken() -> None:
        raise ValueError("a file of /sys that nobody has seen before")

    monkeypatch.setattr(doctor, "_checks", lambda folder: [broken])
    cli.main(["doctor"], standalone_mode=False)
    expected = "warn  broken        cannot be checked: ValueError: a file of /sys that nobody\n"
    assert capsys.readouterr().out == f"{expected}{'':20}has seen before\n"
