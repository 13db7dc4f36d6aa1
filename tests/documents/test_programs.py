"""Every Python program of a page runs as it stands, and prints what the page says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.build_side import MISSING
from tests.conftest import ROOT
from tests.documents.pages import BLOCKS, Block

PROGRAMS = [block for block in BLOCKS if block.language == "python" and block.not_run is None]
NUMBER = re.compile(r"-?\d+\.\d+")


def test_there_are_programs_to_run() -> None:
    """As many programs as ever: a page that loses its marks would lose its tests."""
    assert len(PROGRAMS) >= 20
    assert len([block for block in PROGRAMS if block.expected is not None]) >= 6


@pytest.mark.parametrize("block", PROGRAMS, ids=str)
def test_programs_run(block: Block, tmp_path: Path) -> None:
    """EDGELM_UPDATE_PAGES=1 writes what the programs print into the pages."""
    if '"fork"' in block.body and sys.platform in ("win32", "darwin"):
        pytest.skip("no fork here, or none that is safe")
    if "edgelm_export" in block.body and MISSING:
        pytest.skip(f"the build side is not installed ({', '.join(MISSING)} missing)")
    script = tmp_path / "program.py"
    script.write_text(block.body, encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout, "a program of a page prints something"
    if block.expected is None:
        return
    if os.environ.get("EDGELM_UPDATE_PAGES") == "1":
        path = ROOT / block.page
        old, new = (f"{block.body}```\n```text\n{printed}```" for printed in (block.expected, done.stdout))
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
        return
    # Processors differ in the last bits, and eight bits of activation make more of that.
    assert NUMBER.sub("_", done.stdout) == NUMBER.sub("_", block.expected)
    printed, stated = ([float(n) for n in NUMBER.findall(text)] for text in (done.stdout, block.expected))
    assert printed == pytest.approx(stated, rel=0.02, abs=0.02)
