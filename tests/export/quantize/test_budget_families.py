"""Limits of disk and quality for models of the families beside GPT-2: what comes out is within them."""

from pathlib import Path

import pytest

from edgelm_export.pipeline import export
from edgelm_export.quantize.budget import Budget
from tests.export.checkpoints import SMALL_FAMILIES, save_checkpoint

pytestmark = [pytest.mark.export, pytest.mark.usefixtures("few_tokens")]

LIMITS = {
    "llama": Budget(max_disk_bytes=252_000, max_perplexity_ratio=1.5),
    "gemma3_text": Budget(max_perplexity_ratio=1.05),
}


@pytest.mark.parametrize("family", LIMITS)
def test_a_bundle_keeps_its_limits(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgelm_export.fit.JUDGED_TOKENS", 200)
    source, budget = save_checkpoint(tmp_path / "source", SMALL_FAMILIES[family]), LIMITS[family]
    exported = export(str(source), tmp_path / "out", budget)
    matrices = exported.bundle.manifest.recipe.matrices
    assert exported.certificate.drawn.perplexity_ratio <= (budget.max_perplexity_ratio or 1)
    assert exported.bundle.size_bytes <= (budget.max_disk_bytes or exported.bundle.size_bytes)
    assert {matrix.bits for matrix in matrices} <= {4, 8}
