"""The programs of docs/embedding.md, run as they stand: snippets that import edgelm; others are excerpts."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "embedding.md").read_text(encoding="utf-8")
SNIPPETS: list[str] = [
    snippet
    for snippet in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    if "import edgelm" in snippet
]


def test_nothing_is_left_to_fill_in() -> None:
    assert "@@" not in PAGE


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) >= 6


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_run(snippet: str, tmp_path: Path) -> None:
    if '"fork"' in snippet and sys.platform in ("win32", "darwin"):
        pytest.skip("no fork here, or none that is safe")
    script = tmp_path / "snippet.py"
    script.write_text(snippet, encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout
