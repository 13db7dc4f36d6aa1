"""Programs with edgelm that need other packages: each installs what it needs into an environment of its own.

`EDGELM_TEST_NETWORK=1 pytest -n 0 tests/programs/test_installed.py` runs them, for about ten minutes.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
import zipapp
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY_BUNDLE
from tests.environments import INSTALLS, Environment

pytestmark = INSTALLS

GENERATE = 'model.generate("Once upon a time", max_new_tokens=8, seed=1, do_sample=True).text'
THREE_LINES = f"import edgelm\nmodel = edgelm.load()\nprint({GENERATE})\n"


@pytest.fixture(autouse=True)
def only_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs must not find this clone."""
    monkeypatch.delenv("PYTHONPATH", raising=False)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with edgelm as a user installs it."""
    environment = Environment(tmp_path_factory.mktemp("installed") / "venv")
    environment.install(f"{ROOT}[cpu]")
    return environment


def test_pyinstaller_makes_one_file_of_three_lines(installed: Environment, tmp_path: Path) -> None:
    installed.install("pyinstaller")
    program = tmp_path / "three.py"
    program.write_text(THREE_LINES, encoding="utf-8")
    build = [str(installed.bin / "pyinstaller"), "--onefile", "--noconfirm", str(program)]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True, timeout=600)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    name = "three.exe" if os.name == "nt" else "three"
    shutil.move(tmp_path / "dist" / name, elsewhere / name)
    done = subprocess.run([str(elsewhere / name)], cwd=elsewhere, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == installed.run(THREE_LINES)


@pytest.mark.skipif(not os.environ.get("EDGELM_TEST_NUITKA"), reason="compiles for 15 minutes: set EDGELM_TEST_NUITKA")
def test_nuitka_compiles_a_folder(installed: Environment, tmp_path: Path) -> None:
    installed.install("nuitka==4.3.3")
    (tmp_path / "three.py").write_text(THREE_LINES, encoding="utf-8")
    models = Path(installed.run("import edgelm_models, os\nprint(os.path.dirname(edgelm_models.__file__))").strip())
    build = [str(installed.bin / "python"), "-m", "nuitka", "--mode=standalone", "--assume-yes-for-downloads"]
    build += [f"--nofollow-import-to={name}" for name in ("edgelm.pyinstaller", "huggingface_hub")]
    build += ["--include-package=edgelm", "--include-package=edgelm_models", "--include-package-data=edgelm"]
    raw = f"--include-raw-dir={models / 'stories-6m-int8'}=edgelm_models/stories-6m-int8"  # files end in .bin
    subprocess.run([*build, raw, "three.py"], cwd=tmp_path, check=True, capture_output=True, timeout=7200)
    elsewhere = Path(shutil.move(tmp_path / "three.dist", tmp_path / "elsewhere"))
    program = "three.exe" if os.name == "nt" else "three.bin"
    done = subprocess.run([str(elsewhere / program)], cwd=elsewhere, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == installed.run(THREE_LINES)


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need rights on Windows")
def test_uv_installs_links(tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv")
    environment.install("uv", f"{ROOT}[cpu]")
    wheel = [str(environment.bin / "python"), "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(wheel, check=True, capture_output=True, timeout=600)
    file = str(next(tmp_path.glob("edgelm-*.whl")))
    command = [str(environment.bin / "uv"), "pip", "install", "--link-mode=symlink", "--no-deps", "--reinstall", file]
    variables = os.environ | {"VIRTUAL_ENV": str(tmp_path / "venv"), "UV_CACHE_DIR": str(tmp_path / "cache")}
    subprocess.run(command, env=variables, check=True, capture_output=True, timeout=600)
    code = (
        "import edgelm, os\nmodel = edgelm.load()\n"
        "assert (model.bundle.path / 'model.onnx.data').is_symlink() and model.bundle.verify()\n"
        f"print(len({GENERATE}))"
    )
    assert int(environment.run(code)) > 0


@pytest.mark.skipif(sys.platform == "win32", reason="uWSGI needs POSIX")
@pytest.mark.parametrize("options", [[], ["--enable-threads", "--threads", "3"], ["--py-call-osafterfork"]])
def test_uwsgi_forks_a_loaded_model_and_its_workers_end(
    installed: Environment, tmp_path: Path, options: list[str]
) -> None:
    installed.install("uwsgi")
    (tmp_path / "app.py").write_text(
        f"import edgelm, os\nmodel = edgelm.load({str(TINY_BUNDLE)!r}, threads=2)\n"
        f"first, parent = {GENERATE}, os.getpid()\n"
        "def application(environment, start):\n"
        "    start('200 OK', [])\n"
        f"    return [f'{{os.getpid() != parent}} {{{GENERATE} == first}}'.encode()]\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(installed.bin / "uwsgi"), "--http-socket", f"127.0.0.1:{port}", "--master", "--processes", "2"]
    command += ["--wsgi-file", "app.py", "--die-on-term", "-H", str(installed.bin.parent), *options]
    log = tmp_path / "log"
    with log.open("wb") as stream:
        variables = os.environ | {"LD_LIBRARY_PATH": sysconfig.get_config_var("LIBDIR")}  # where libpython may be
        server = subprocess.Popen(command, env=variables, cwd=tmp_path, stdout=stream, stderr=stream)
    try:
        for _ in range(120):
            if "spawned uWSGI worker 2" in log.read_text():
                break
            time.sleep(0.5)
        for _ in range(4):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60) as answer:
                assert answer.read() == b"True True"
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
    finally:
        server.kill()
    assert "Traceback" not in log.read_text()


def test_gevent_with_everything_patched(installed: Environment) -> None:
    installed.install("gevent")
    code = f"""
from gevent import monkey; monkey.patch_all()
import asyncio, gevent, edgelm
model = edgelm.load({str(TINY_BUNDLE)!r}, threads=2)
def one(): return {GENERATE}
expected = one()
jobs = [gevent.spawn(one) for _ in range(4)]
gevent.joinall(jobs, timeout=60)
assert [job.value for job in jobs] == [expected] * 4
def stream():
    text = ""
    for chunk in model.stream("Once upon a time", max_new_tokens=8, seed=1, do_sample=True):
        text += chunk.text
        gevent.sleep(0)
    return text
jobs = [gevent.spawn(stream) for _ in range(4)]
gevent.joinall(jobs, timeout=60)
assert [job.value for job in jobs] == [expected] * 4
pool = gevent.get_hub().threadpool
assert [pool.apply(one) for _ in range(3)] == [expected] * 3
timeout = gevent.Timeout(0.05)
timeout.start()
try:
    while True: stream()
except gevent.Timeout as error: assert error is timeout
assert one() == expected
model.close()
print("done")
"""
    assert installed.run(code) == "done\n"


def test_trio_calls_generate_in_a_thread_and_anyio_on_asyncio_awaits(installed: Environment) -> None:
    installed.install("trio", "anyio")
    code = f"""
import anyio, trio, edgelm
model = edgelm.load({str(TINY_BUNDLE)!r}, threads=2)
def one(): return {GENERATE}
expected = one()
async def in_trio():
    assert await trio.to_thread.run_sync(one) == expected
    try: await model.agenerate("Once")
    except edgelm.EdgelmError as error: assert "trio.to_thread.run_sync" in str(error)
    else: 1 / 0
trio.run(in_trio)
async def in_asyncio():
    completion = await model.agenerate("Once upon a time", max_new_tokens=8, seed=1, do_sample=True)
    assert completion.text == expected
    with anyio.move_on_after(0.05) as scope:
        await model.agenerate("Once", max_new_tokens=10**6, eos_token_id=[], context_overflow="window")
    assert scope.cancelled_caught and one() == expected
anyio.run(in_asyncio)
print("done")
"""
    assert installed.run(code) == "done\n"


def test_celerys_soft_time_limit_arrives(installed: Environment, tmp_path: Path) -> None:
    """Celery's prefork workers are billiard's pool, which raises it in a signal handler."""
    installed.install("billiard")
    program = tmp_path / "program.py"
    program.write_text(f"""
import edgelm
from billiard.exceptions import SoftTimeLimitExceeded
from billiard.pool import Pool
model = edgelm.load({str(TINY_BUNDLE)!r}, threads=2)
def one(): return {GENERATE}
def for_ever():
    try:
        while True: one()
    except SoftTimeLimitExceeded:
        return one()
if __name__ == "__main__":
    expected = one()
    pool = Pool(1, soft_timeout=2)
    assert [pool.apply_async(for_ever).get(60) for _ in range(2)] == [expected] * 2
    pool.close(); pool.join()
    print("done")
""")
    done = subprocess.run([str(installed.bin / "python"), str(program)], capture_output=True, text=True, timeout=120)
    assert done.stdout == "done\n", done.stderr


@pytest.fixture(scope="module")
def folder_of_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages, such as a function in the cloud has (``pip install --target``)."""
    folder = tmp_path_factory.mktemp("function") / "packages"
    command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder), f"{ROOT}[cpu]"]
    subprocess.run(command, check=True, capture_output=True, timeout=1200)
    return folder


def test_a_folder_that_cannot_be_written_and_no_home(folder_of_packages: Path, tmp_path: Path) -> None:
    """As in AWS Lambda: nothing is written there, and neither a home folder nor one for temporary files is needed."""
    before = sorted(folder_of_packages.rglob("*"))
    for path in [folder_of_packages, *before]:
        path.chmod(path.stat().st_mode & ~0o222)
    variables = {"PYTHONPATH": str(folder_of_packages), "HOME": "/dev/null/home", "TMPDIR": "/dev/null/tmp"}
    command = [sys.executable, "-B", "-c", THREE_LINES]
    done = subprocess.run(
        command, env=os.environ | variables, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "") and len(done.stdout) > 10
    assert sorted(folder_of_packages.rglob("*")) == before and not list(tmp_path.iterdir())


def test_shiv_makes_one_file(installed: Environment, folder_of_packages: Path, tmp_path: Path) -> None:
    """A zip archive that unpacks itself once, into the folder SHIV_ROOT."""
    installed.install("shiv")
    packages = Path(shutil.copytree(folder_of_packages, tmp_path / "packages"))
    packages.chmod(0o755)
    (packages / "three.py").write_text(
        "def main():\n" + "".join(f"    {line}\n" for line in THREE_LINES.splitlines()), encoding="utf-8"
    )
    installed.output("shiv", "--site-packages", str(packages), "-e", "three:main", "-o", str(tmp_path / "three.pyz"))
    shutil.rmtree(packages)
    made = installed.output("python", str(tmp_path / "three.pyz"), variables={"SHIV_ROOT": str(tmp_path / "unpacked")})
    assert made == installed.run(THREE_LINES)


def test_zipapp_holds_edgelm_but_not_the_model(folder_of_packages: Path, tmp_path: Path) -> None:
    """Python loads no native code out of a zip archive, so the other packages stay outside, and so do models."""
    program = tmp_path / "program"
    shutil.copytree(folder_of_packages / "edgelm", program / "edgelm")
    shutil.copytree(folder_of_packages / "edgelm_models", program / "edgelm_models")
    outside = Path(shutil.copytree(folder_of_packages, tmp_path / "outside"))
    for folder in (outside, program, *outside.iterdir(), *program.rglob("*")):
        folder.chmod(0o755)
    for name in ("edgelm", "edgelm_models"):
        shutil.rmtree(outside / name)
    (program / "__main__.py").write_text(
        f"import edgelm, sys\nmodel = edgelm.load(*sys.argv[1:])\nprint({GENERATE})\n", encoding="utf-8"
    )
    zipapp.create_archive(program, tmp_path / "three.pyz")
    variables = os.environ | {"PYTHONPATH": str(outside)}
    command = [sys.executable, "-B", str(tmp_path / "three.pyz")]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments], env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=120
        )

    done = run(str(TINY_BUNDLE))
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    refused = run()
    assert refused.returncode == 1
    assert (
        "a model cannot be loaded out of an archive of Python code: install edgelm_models as files"
        in (refused.stderr.splitlines()[-1])
    )


def test_five_packages_are_enough(tmp_path: Path) -> None:
    """What docs/on-a-device.md says of the smallest installation."""
    environment = Environment(tmp_path / "venv")
    packages = ("click", "numpy", "onnxruntime", "safetensors", "tokenizers")
    environment.install("--no-deps", "--no-compile", *packages, str(ROOT))
    variables = {"PYTHONDONTWRITEBYTECODE": "1"}
    assert environment.output("edgelm", "run", "-n", "8", "Once upon a time", variables=variables)
    assert "FAILED" not in environment.output("edgelm", "verify", variables=variables)
    place = Path(environment.run("import sysconfig; print(sysconfig.get_path('purelib'), end='')"))
    ours = [
        path for path in place.iterdir() if not path.name.startswith(("pip", "setuptools", "pkg_resources", "_dist"))
    ]
    files = [file for path in ours for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 170e6
