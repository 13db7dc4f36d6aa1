"""Bundles in JavaScript: examples/node generates the ids of the Python runtime with the ONNX Runtimes of npm.

`EDGELM_TEST_NETWORK=1 pytest -n 0 tests/export/test_node.py` installs both packages with npm, for about five minutes.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgelm.bundle.folder import default_bundle_path
from edgelm.bundle.manifest import FixedPrecision
from edgelm.loading import load
from tests.conftest import ROOT, TINY_BUNDLE
from tests.environments import INSTALLS
from tests.export.checkpoints import SMALL_FAMILIES, Shape, TinyExport, greedy

pytestmark = [
    pytest.mark.export,
    *INSTALLS,
    pytest.mark.skipif(shutil.which("npm") is None, reason="needs Node with npm"),
]

EXAMPLE = ROOT / "examples" / "node"
PACKAGES = ("onnxruntime-node", "onnxruntime-web")
NEW_TOKENS = 16
LOGIT_TOLERANCE = 0.3
"""The logits of the tiny models are between -10 and 10."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example with the packages of npm. Scripts that download what npm does not have stay out."""
    folder = Path(shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("node") / "node"))
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", *PACKAGES]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=600)
    return folder


def generated(project: Path, bundle: Path, ids: list[int], package: str) -> list[int]:
    """What the example generates."""
    graph = [sys.executable, str(project / "graph_for_npm.py"), str(bundle), str(project / "graph.onnx")]
    subprocess.run(graph, check=True, timeout=60)
    prompt = ",".join(map(str, ids))
    command = ["node", "generate.mjs", str(bundle), "graph.onnx", prompt, str(NEW_TOKENS), package]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return [int(number) for number in done.stdout.split(",")]


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("bundle", [TINY_BUNDLE, default_bundle_path()], ids=["fp32", "embedded"])
def test_a_bundle_gives_the_same_ids(project: Path, package: str, bundle: Path) -> None:
    with load(bundle, threads=1) as model:
        ids = model.tokenizer.encode_prompt("Once upon a time")
        expected = greedy(model.session, ids, NEW_TOKENS)
    assert generated(project, bundle, ids, package) == expected


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("shape", [Shape(), SMALL_FAMILIES["llama"]], ids=["gpt2", "llama"])
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4", "int4-small", "w8a8"])
def test_a_tiny_export_gives_the_same_ids(
    project: Path, package: str, shape: Shape, precision: FixedPrecision, tiny_export: TinyExport
) -> None:
    """WebAssembly rounds otherwise, so there another id may be chosen, but only one that is nearly as likely."""
    tiny = tiny_export(shape, precision)
    ids, session = [5, 17, 250, 31], tiny.session()
    made = generated(project, tiny.exported.bundle.path, ids, package)
    if package == "onnxruntime-node" or precision == "fp32":
        assert made == greedy(session, ids, NEW_TOKENS)
    session.reset()
    logits = session.step(ids)
    for token in made:
        assert logits[token] >= logits.max() - LOGIT_TOLERANCE
        logits = session.step([token])


def test_without_arguments_the_example_says_how_to_start_it(project: Path) -> None:
    done = subprocess.run(["node", "generate.mjs"], cwd=project, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("usage: node generate.mjs BUNDLE GRAPH IDS COUNT")
