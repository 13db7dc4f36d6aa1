"""The commands and snippets of the README and of docs/generation.md, run as they stand."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
GENERATION = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


SHELL_LINES = [line for block in [*blocks("sh"), *blocks("sh", GENERATION)] for line in block.splitlines()]
RUNNABLE = [line for line in SHELL_LINES if re.match(r"(echo .* \| )?edgelm (run|info)", line)]


def test_ci_runs_the_very_test_command_of_the_readme() -> None:
    command = blocks("sh")[1].strip()
    assert command.endswith("&& pytest")
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert command in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()


def test_the_first_command_installs_and_runs() -> None:
    assert blocks("sh")[0].strip() == 'pip install ".[cpu]" && edgelm run "Once upon a time"'


@pytest.mark.skipif(os.name == "nt", reason="the README's commands are for a POSIX shell")
@pytest.mark.parametrize("line", RUNNABLE)
def test_shell_lines_run(line: str, tmp_path: Path) -> None:
    command = line.replace("edgelm ", f"{shlex.quote(sys.executable)} -m edgelm ", 1)
    if line.startswith("echo"):
        command = re.sub(r"\| edgelm ", f"| {shlex.quote(sys.executable)} -m edgelm ", line)
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_there_are_shell_lines_to_run() -> None:
    assert len(RUNNABLE) >= 5


@pytest.mark.parametrize("snippet", [*blocks("python"), *blocks("python", GENERATION)])
def test_python_snippets_run(snippet: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
