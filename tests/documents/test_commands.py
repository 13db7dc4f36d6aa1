"""Every shell command of a page runs as it stands.

A shell block that needs the network or hours of training has the comment ``<!-- not run: REASON -->`` above it; its
commands are only checked in `test_pages.py`. Commands that install something, and benchmarks, which take minutes, are
not run either.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.documents.pages import BLOCKS, Block

COMMANDS = [
    (block, command)
    for block in BLOCKS
    if block.language == "sh" and block.not_run is None
    for command in block.commands
    if not command.startswith(("python -m benchmarks.", "pip "))
]


def test_there_are_commands_to_run() -> None:
    """As many commands as ever: a page that loses its marks would lose its tests."""
    assert len(COMMANDS) >= 22


@pytest.mark.skipif(os.name == "nt", reason="the pages' commands are for a POSIX shell")
@pytest.mark.parametrize("block, command", COMMANDS, ids=[f"{block}: {command}" for block, command in COMMANDS])
def test_commands_run(block: Block, command: str, tmp_path: Path) -> None:
    if "models/dialogue" in command and not (ROOT / "models" / "dialogue-6m-int8").is_dir():
        pytest.skip("the dialogue model lies in the repository only")
    for name in ("models", "examples", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    python = shlex.quote(sys.executable)
    command = re.sub(r"(^|\| |&& )edgelm ", rf"\1{python} -m edgelm ", command)
    command = re.sub(r"(^|\| |&& )python ", rf"\1{python} ", command)
    environment = {name: value for name, value in os.environ.items() if name != "EDGELM_MODEL"}
    done = subprocess.run(
        ["sh", "-c", command], stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=tmp_path, env=environment,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert "Traceback" not in done.stderr
