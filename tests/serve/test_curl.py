"""curl, against ``edgelm serve`` on loopback: the lines of docs/serve.md, and the one on the start screen."""

import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from edgelm.bundle.folder import default_bundle_path
from tests.conftest import ROOT
from tests.documents.pages import page
from tests.serve.conftest import ServerProcess, server_process


def _has_json() -> bool:
    """Whether there is a curl that knows --json, which came with 7.82."""
    if shutil.which("curl") is None:
        return False
    done = subprocess.run(["curl", "--version"], capture_output=True, text=True, timeout=60)
    return [int(part) for part in re.findall(r"\d+", done.stdout)[:2]] >= [7, 82]


pytestmark = pytest.mark.skipif(not _has_json(), reason="no curl of 7.82 or later")

LINES = [
    line
    for block in page("docs/serve.md").blocks
    if block.language == "sh"
    for line in block.commands
    if line.startswith("curl ")
]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with server_process(model=default_bundle_path()) as running:
        yield running


def answer(line: str) -> str:
    """What `line` prints in a shell, where its answer has status 200."""
    command = line + r" --silent --show-error --write-out '\n%{http_code}'"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    content, _, status = done.stdout.rpartition("\n")
    assert status == "200", content
    return content


def test_there_are_lines() -> None:
    assert len(LINES) >= 5


@pytest.mark.parametrize("line", LINES)
def test_lines_of_the_page(server: ServerProcess, line: str) -> None:
    assert "localhost:8000" in line
    content = answer(line.replace("localhost:8000", f"localhost:{server.port}"))
    if '"stream": true' in line:
        assert content.rstrip().endswith("data: [DONE]")
    elif "/metrics" in line:
        assert "edgelm_requests_total" in content
    else:
        assert content.startswith("{")


def test_the_line_on_the_start_screen(server: ServerProcess) -> None:
    assert server.process.stderr is not None
    shown = next(line for line in iter(server.process.stderr.readline, "") if line.startswith("  try "))
    assert '"text_completion"' in answer(shown.removeprefix("  try").strip())
