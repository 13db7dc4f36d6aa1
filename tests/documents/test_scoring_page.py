"""The examples of docs/scoring.md, run as they stand; what they print is what the page says."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGE = ROOT / "docs" / "scoring.md"
TEXT = PAGE.read_text(encoding="utf-8")
EXAMPLE = re.compile(r"^```python\n(.*?)^```\n```text\n(.*?)^```", re.MULTILINE | re.DOTALL)
EXAMPLES: list[tuple[str, str]] = EXAMPLE.findall(TEXT)
SHELL_LINES = [
    line for block in re.findall(r"^```sh\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL) for line in block.splitlines()
]
COMMANDS = [line for line in SHELL_LINES if re.match(r"(printf .* \| )?edgelm ", line)]
NUMBER = re.compile(r"-?\d+\.\d+")


def output_of(snippet: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, cwd=folder, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("snippet", "expected"), EXAMPLES)
def test_examples_print_what_the_page_says(snippet: str, expected: str, tmp_path: Path) -> None:
    """EDGELM_UPDATE_SCORING=1 writes the page's outputs anew."""
    found = output_of(snippet, tmp_path)
    if os.environ.get("EDGELM_UPDATE_SCORING") == "1":
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(
            text.replace(f"{snippet}```\n```text\n{expected}```", f"{snippet}```\n```text\n{found}```"), "utf-8"
        )
        return
    # Processors differ in the last bits, and eight bits of activation make more of that.
    assert NUMBER.sub("_", found) == NUMBER.sub("_", expected)
    numbers = [[float(number) for number in NUMBER.findall(text)] for text in (found, expected)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.02, abs=0.02)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 6 and len(COMMANDS) >= 6


@pytest.mark.skipif(os.name == "nt", reason="the page's commands are for a POSIX shell")
@pytest.mark.parametrize("line", COMMANDS)
def test_commands_run(line: str, tmp_path: Path) -> None:
    command = re.sub(r"(^|\| )edgelm ", rf"\1{shlex.quote(sys.executable)} -m edgelm ", line)
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 0 and done.stderr == "" and done.stdout
