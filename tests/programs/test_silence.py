"""No network, and no file outside its own: neither in Python nor in ONNX Runtime, whatever was imported first."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.build_side import MISSING, TINY_TOKENS
from tests.conftest import ROOT, TINY_BUNDLE

PROGRAM = f"""
import asyncio, json, sys
import edgelm, edgelm.cli
bundle = {str(TINY_BUNDLE)!r}
with edgelm.load(bundle) as model:
    model.generate("Once", max_new_tokens=3)
    model.generate_batch(["Once", "a"], max_new_tokens=3)
    model.perplexity("Once upon a time")
    asyncio.run(model.agenerate("Once", max_new_tokens=3))
    model.save_state("state", "Once upon a time")
edgelm.load().close()
for command in ("run Once -n 2", "info", "verify --hashes-only", "choose Once -o a -o b"):
    try: edgelm.cli.cli.main([*command.split(), "-m", bundle])
    except SystemExit as end: assert not end.code, (command, end.code)
try: edgelm.load("no/such/bundle")
except edgelm.BundleError: pass
"""

RECORDER = """
import os, sys
def record(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        with open(os.environ["NETWORK_LOG"], "a") as log: log.write(f"{event} {arguments[1:]}\\n")
sys.addaudithook(record)
"""
"""As a ``sitecustomize`` it runs in every Python process, children included."""


def environment(tmp_path: Path) -> dict[str, str]:
    """A home, a temporary folder and a working folder of their own, and no setting that keeps anything quiet."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "ORT_", "TRANSFORMERS_", "XDG_"))}
    for name in ("home", "tmp", "work"):
        (tmp_path / name).mkdir()
    return kept | {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp")}


def recorded(tmp_path: Path, variables: dict[str, str]) -> dict[str, str]:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(RECORDER)
    path = os.pathsep.join([str(tmp_path / "site"), *filter(None, [variables.get("PYTHONPATH")])])
    return variables | {"PYTHONPATH": path, "NETWORK_LOG": str(tmp_path / "network")}


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_programs_and_commands_leave_nothing_behind(tmp_path: Path) -> None:
    variables = recorded(tmp_path, environment(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=variables,
        cwd=tmp_path / "work",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "network").exists(), (tmp_path / "network").read_text()
    assert [files_in(tmp_path / name) for name in ("home", "tmp", "work")] == [[], [], ["state"]]


@pytest.mark.export
@pytest.mark.skipif(bool(MISSING), reason="the build side is not installed")
def test_an_export_from_a_folder_asks_no_hub(tmp_path: Path) -> None:
    """transformers, optimum and peft look things up on the hub unless their names are those of local folders."""
    code = f"""
from pathlib import Path
import edgelm.cli, edgelm_export.fit, edgelm_export.pipeline, torch
from tests.export.checkpoints import Shape, save_checkpoint
torch.set_num_threads(1)
edgelm_export.pipeline.EVALUATION_TOKENS = edgelm_export.fit.CALIBRATION_TOKENS = {TINY_TOKENS}
save_checkpoint(Path("checkpoint"), Shape(layers=1, context=32))
edgelm.cli.cli.main(["export", "checkpoint", "-o", "bundle", "--precision", "fp32"])
"""
    variables = recorded(tmp_path, environment(tmp_path)) | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    variables["PYTHONPATH"] += os.pathsep + str(ROOT)
    work, command = tmp_path / "work", [sys.executable, "-c", code]
    done = subprocess.run(command, env=variables, cwd=work, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "network").exists(), (tmp_path / "network").read_text()
    assert sorted(path.name for path in work.iterdir()) == ["bundle", "checkpoint"]


def traces() -> bool:
    """Whether strace works here; containers often forbid it."""
    return (
        bool(shutil.which("strace")) and subprocess.run(["strace", "-qq", "true"], capture_output=True).returncode == 0
    )


@pytest.mark.skipif(not traces(), reason="strace is missing or forbidden here: apt-get install strace")
def test_no_system_call_reaches_out(tmp_path: Path) -> None:
    """ONNX Runtime's own code too."""
    trace = tmp_path / "trace"
    calls = "trace=network,openat,open,creat,mkdir,mkdirat,rename,renameat,unlink,unlinkat"
    command = ["strace", "-f", "-qq", "-o", str(trace), "-e", calls, sys.executable, "-B", "-c", PROGRAM]
    variables = environment(tmp_path)
    done = subprocess.run(command, env=variables, cwd=tmp_path / "work", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line.split(maxsplit=1)[1] for line in trace.read_text(errors="replace").splitlines()]
    assert any("model.onnx" in line for line in lines), "the trace must show the loading"
    changing = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|^(creat|mkdir|mkdirat|rename|renameat|unlink|unlinkat)\(")
    network = re.compile(r"^(socket\((?!AF_UNIX)|connect|bind|sendto|sendmsg|listen)|/etc/(resolv|hosts)")
    own = re.compile(r'"(/dev/(null|shm|urandom|tty)|[^"/]*"|' + re.escape(str(tmp_path / "work")) + ")")
    waking = re.compile(r'^sendto\(\d+, "\\0", 1,')  # asyncio's event loop wakes itself through a pair of sockets
    assert [line for line in lines if network.search(line) and not waking.search(line)] == []
    assert [line for line in lines if changing.search(line) and not own.search(line)] == []


def test_onnx_runtime_that_was_imported_first_brings_one_warning() -> None:
    """Its telemetry is chosen at its import, and nothing turns it off later."""
    loads = f"for _ in range(2): edgelm.load({str(TINY_BUNDLE)!r}).close()\n"
    warning = "onnxruntime was imported before edgelm, so its telemetry may be on"
    for code, variable, warnings in (
        ("import onnxruntime, edgelm\n", None, 1),
        ("import onnxruntime, edgelm\n", "1", 0),
        ("import onnxruntime, edgelm\n", "0", 0),  # somebody wants it on
        ("import edgelm, onnxruntime\n", None, 0),
        ("import edgelm\n", None, 0),
    ):
        variables = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
        if variable is not None:
            variables["ORT_DISABLE_TELEMETRY"] = variable
        if warnings:  # do not report from a test
            code = "import sys, types\nsys.modules['onnxruntime'] = types.ModuleType('onnxruntime')\nimport edgelm\n"
            code += "import os; del sys.modules['onnxruntime']\n"
        done = subprocess.run(
            [sys.executable, "-c", code + loads], env=variables, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.count(warning) == warnings, (code, done.stderr)


def test_import_edgelm_turns_telemetry_off_before_anybody_imports_onnx_runtime() -> None:
    variables = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    code = (
        "import edgelm, os, sys; assert os.environ['ORT_DISABLE_TELEMETRY'] == '1' and 'onnxruntime' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], env=variables, check=True, timeout=60)
