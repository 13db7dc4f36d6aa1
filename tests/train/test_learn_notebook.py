"""docs/learn.ipynb, from a text to verified bundles, runs from its first to its last cell with a tiny model."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.export


@pytest.mark.usefixtures("few_tokens")
def test_every_cell_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setattr("edgelm_export.pipeline.default_threads", lambda: 1)  # threads that wait slow tiny tensors down
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(ROOT / part) for part in ("", "export", "models")))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(ROOT / "docs")
    cells = json.loads((ROOT / "docs" / "learn.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {"__name__": "notebook"}
    small = 0
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None  # committed clean
            source = "".join(cell["source"])
            small += source.count("SMALL = False")
            exec(compile(source.replace("SMALL = False", "SMALL = True"), cell["id"], "exec"), names)
    assert small == 1
    printed = capsys.readouterr().out
    assert "206 stories" in printed and "--- temperature 1.3" in printed and "--- pirates" in printed
    drawn = names["int8"].certificate.drawn
    assert drawn.perplexity_ratio <= 1.01 and f"perplexity x {drawn.perplexity_ratio:.4f}" in printed
    losses = names["tuned"].report.losses
    assert losses["after"] < losses["before"]
    first, *_, last = [entry["eval_loss"] for entry in names["pretrained"].report.log if "eval_loss" in entry]
    assert last < first < 6.1  # log 400 is 5.99
    assert printed.count("ok: 10 files") == 2  # what `edgelm verify` says of both bundles
    assert (names["WORK"] / "pirates-int8" / "model.onnx").is_file()
