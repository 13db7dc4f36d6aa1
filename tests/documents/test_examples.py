"""Every file of examples/ does what it says, run as it stands."""

import asyncio
import inspect
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from ast import PyCF_ALLOW_TOP_LEVEL_AWAIT
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import edgelm
from edgelm.bundle.folder import default_bundle_path
from tests.conftest import ROOT, RunCommand

EXAMPLES = ROOT / "examples"


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the examples importable; they use the embedded model."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delenv("EDGELM_MODEL", raising=False)


def run(*command: str, stdin: str = "") -> str:
    environment = {name: value for name, value in os.environ.items() if name != "EDGELM_MODEL"}
    done = subprocess.run(
        [sys.executable, *command],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=EXAMPLES,
        env=environment,
        timeout=90,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_every_example_has_a_test() -> None:
    page = Path(__file__).read_text(encoding="utf-8")
    page += (ROOT / "tests" / "export" / "test_node.py").read_text(encoding="utf-8")
    index = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in EXAMPLES.iterdir():
        if path.name not in ("__pycache__", "README.md"):
            assert path.stem in page and path.name in index, path


def test_edgelm_serve_service_and_dockerfile(edgelm_command: RunCommand, tmp_path: Path) -> None:
    """Their commands start: systemd's and Docker's own words stand for nothing here."""
    pytest.importorskip("uvicorn")
    keys = tmp_path / "keys"
    keys.write_text("a-long-key-of-your-own\n")
    unit = (EXAMPLES / "edgelm-serve.service").read_text(encoding="utf-8")
    started = next(line for line in unit.splitlines() if line.startswith("ExecStart="))
    words = started.replace("%d/keys", str(keys)).replace("/opt/edgelm/model", str(default_bundle_path())).split()[1:]
    dockerfile = (EXAMPLES / "Dockerfile").read_text(encoding="utf-8")
    assert 'ENTRYPOINT ["edgelm"]\n' in dockerfile
    for command in (words, json.loads(dockerfile.rpartition("CMD ")[2])):
        command[command.index("--port") + 1] = "0"
        done = edgelm_command(*command, "--check", env={"EDGELM_API_KEYS": "a-long-key-of-your-own"})
        assert done.status == 0, done.stderr
        assert "would start" in done.stderr


@pytest.mark.usefixtures("examples")
def test_flask_app() -> None:
    pytest.importorskip("flask")
    flask_app: Any = import_module("flask_app")
    app, model = flask_app.app, flask_app.model
    client = app.test_client()
    asked = {"prompt": "Once upon a time", "max_new_tokens": 8, "seed": 1, "num_return_sequences": 1000}
    answer = client.post("/generate", json=asked)
    expected = model.generate("Once upon a time", max_new_tokens=8, seed=1)
    assert answer.json == {"text": expected.text, "finish_reason": "length"}
    assert client.post("/stream", json=asked).text == expected.text
    refused = client.post("/generate", json={"prompt": "\ud800"})
    assert refused.status_code == 400 and "lone surrogate" in refused.json["error"]
    assert client.post("/generate", json={"prompt": "a", "temperature": -1}).status_code == 400
    model.close()


@pytest.mark.usefixtures("examples")
def test_fastapi_app() -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("httpx")
    testclient, app = import_module("fastapi.testclient"), import_module("fastapi_app").app
    with testclient.TestClient(app) as client:
        asked = {"prompt": "Once upon a time", "max_new_tokens": 8, "seed": 1}
        answer = client.post("/generate", json=asked)
        assert answer.status_code == 200 and answer.json()["finish_reason"] == "length"
        assert client.post("/stream", json=asked).text == answer.json()["text"]
        assert client.post("/generate", json={"prompt": ""}).status_code == 422
        model: Any = app.state.model
    assert model.closed


@pytest.mark.usefixtures("examples")
def test_langchain_edgelm() -> None:
    pytest.importorskip("langchain_core")
    made: Any = import_module("langchain_edgelm").EdgeLM(options={"max_new_tokens": 12, "do_sample": True})
    prompt, model = "Once upon a time", made._model
    whole = model.generate(prompt, max_new_tokens=12, do_sample=True, seed=7).text
    assert made.invoke(prompt, seed=7) == whole == "".join(made.stream(prompt, seed=7))
    assert made.batch([prompt, prompt], seed=7) == [whole, whole]
    first, _, _ = whole.partition(" a ")
    assert first != whole and made.bind(stop=[" a "]).invoke(prompt, seed=7) == first
    assert "".join(made.stream(prompt, stop=[" a "], seed=7)) == first

    async def both() -> tuple[str, str]:
        return await made.ainvoke(prompt, seed=7), "".join([text async for text in made.astream(prompt, seed=7)])

    assert asyncio.run(both()) == (whole, whole)
    with pytest.raises(edgelm.ConfigError, match="unknown generation option 'tmperature'"):
        made.invoke(prompt, tmperature=1)
    assert made._identifying_params["digest"] == model.bundle.manifest.digest


@pytest.mark.usefixtures("examples")
def test_llm_edgelm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = EXAMPLES / "llm-edgelm"
    project = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["llm"] == {"edgelm": "llm_edgelm"}
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    monkeypatch.setenv("LLM_LOAD_PLUGINS", "")  # not an installed copy of this plugin: its name is registered once
    llm: Any = pytest.importorskip("llm")
    monkeypatch.syspath_prepend(str(package))
    plugin: Any = import_module("llm_edgelm")
    import_module("llm.plugins").pm.register(plugin)
    made, plain = llm.get_model("edgelm"), edgelm.load()
    prompt = "Once upon a time"
    options: dict[str, Any] = {"max_new_tokens": 12, "seed": 7}
    whole = plain.generate(prompt, **options).text
    response = made.prompt(prompt, **options)
    assert "".join(response) == whole == made.prompt(prompt, **options, stream=False).text()
    assert (response.usage().input, response.usage().output) == (len(plain.tokenizer.encode(prompt)), 12)
    first, _, _ = whole.partition(" a ")
    assert first != whole and made.prompt(prompt, stop=" a ", **options).text() == first
    talk = made.conversation()
    talk.prompt(prompt, **options).text()
    again = plain.generate(f"{prompt}{whole} One day", **options).text
    assert talk.prompt(" One day", **options).text() == again
    behind = plain.generate(f"A tale.\n\n{prompt}", **options).text
    assert made.prompt(prompt, system="A tale.", **options).text() == behind
    with pytest.raises(llm.ModelError, match="temperature must be"):
        made.prompt(prompt, temperature=-1).text()


@pytest.mark.skipif(os.name == "nt", reason="signals of a POSIX terminal")
@pytest.mark.parametrize("program", ["chat.py", "game.py"])
def test_ctrl_c_and_ctrl_d_end_a_program_quietly(program: str) -> None:
    if program == "chat.py" and not (ROOT / "models" / "dialogue-6m-int8").is_dir():
        pytest.skip("the dialogue model lies in the repository only")
    assert run(program, stdin="")  # the end of standard input, as Ctrl-D gives it
    process = subprocess.Popen(
        [sys.executable, program],
        cwd=EXAMPLES,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        shown = ""
        while not shown.endswith(("> ", "? ")):  # the program waits for a line
            letter = process.stdout.read(1)
            assert letter, "the program ended before it asked"
            shown += letter
        while process.poll() is None:  # a signal between the prompt and the read interrupts neither
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(2)
        assert process.returncode == 0
    finally:
        process.kill()
        errors = process.communicate()[1]
    assert errors == ""


def test_worker() -> None:
    texts = run("worker.py", "Once upon a time", "One day").split("\n\n")
    assert texts[0].startswith("Once upon a time") and texts[1].startswith("One day")
    assert run("worker.py", "Once upon a time").split("\n\n")[0] == texts[0]


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX") or os.name == "nt", reason="Unix sockets")
def test_line_service(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    service = subprocess.Popen(
        [sys.executable, "line_service.py", path],
        cwd=EXAMPLES,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert service.stdout is not None and service.stdout.readline().startswith("ready, ")

        def asked(line: str) -> str:
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(60)
                client.connect(path)
                client.sendall(line.encode())
                return client.makefile(encoding="utf-8").read()

        assert len(asked("Once upon a time\n")) > 20
        assert len(asked("\n")) > 20  # an empty prompt begins a text of its own
        with socket.socket(socket.AF_UNIX) as leaves:
            leaves.connect(path)
            leaves.sendall(b"One day\n")
        assert len(asked("One day\n")) > 20
        service.send_signal(signal.SIGTERM)
        assert service.wait(30) == 0
        assert not Path(path).exists()
    finally:
        service.kill()
        errors = service.communicate()[1]
    assert errors == ""


def test_line_service_without_an_argument() -> None:
    done = subprocess.run([sys.executable, "line_service.py"], capture_output=True, text=True, cwd=EXAMPLES, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "usage: python line_service.py SOCKET\n"


def test_the_unit_says_how_to_make_what_it_names() -> None:
    unit = (EXAMPLES / "edgelm.service").read_text(encoding="utf-8")
    comments = "\n".join(line for line in unit.splitlines() if line.startswith("#"))
    for made in ("/opt/edgelm/venv", "/opt/edgelm/model", "line_service.py /opt/edgelm"):
        assert made in comments


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")
def test_edgelm_service(tmp_path: Path) -> None:
    """systemd finds no fault with the unit, on a machine where its program exists."""
    unit = (EXAMPLES / "edgelm.service").read_text(encoding="utf-8")
    copy = tmp_path / "edgelm.service"
    copy.write_text(unit.replace("/opt/edgelm/venv/bin/python", sys.executable), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, timeout=60)
    assert "edgelm.service" not in done.stderr, done.stderr


def test_game() -> None:
    shown = run("game.py", "3", stdin="1\n2\nnonsense\n")
    assert shown.count("Which one does the model like best?") == 3
    assert shown.rstrip().endswith("of 3 points") and "No, number" in shown
    assert len((EXAMPLES / "game.py").read_text(encoding="utf-8").splitlines()) <= 45


def test_chat() -> None:
    if not (ROOT / "models" / "dialogue-6m-int8").is_dir():
        pytest.skip("the dialogue model lies in the repository only")
    shown = run("chat.py", stdin="Have you seen the new Star Wars movie?\n \nWho is your favorite character?\n")
    first, nothing, second = (part.strip() for part in shown.removeprefix("> ").removesuffix("> \n").split("> "))
    assert first and second and "\n" not in first + second
    assert not nothing, "an empty line is no turn"
    output = run("chat.py", str(default_bundle_path()), stdin="Lily had a cat.\n")
    assert output.startswith("> ") and output.endswith("> \n")


def test_notebook(capsys: pytest.CaptureFixture[str]) -> None:
    """The notebook's code cells run in order, with the top-level await of notebooks."""
    cells = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {"__name__": "notebook"}

    async def run_cells() -> None:
        for cell in cells:
            if cell["cell_type"] == "code":
                assert cell["outputs"] == [] and cell["execution_count"] is None  # committed clean
                code = compile("".join(cell["source"]), cell["id"], "exec", flags=PyCF_ALLOW_TOP_LEVEL_AWAIT)
                result = eval(code, names)
                if inspect.isawaitable(result):
                    await result

    asyncio.run(run_cells())
    shown = capsys.readouterr().out
    assert "tokens/s, length" in shown and "forecast" in shown
    assert names["model"].closed
