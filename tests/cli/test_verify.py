"""Measurements and refusals of ``edgelm verify`` and ``edgelm compare`` on the committed bundles."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgelm.bundle.certificate import Reference
from edgelm.bundle.folder import Bundle, default_bundle_path, file_fact
from edgelm.bundle.reference import ReferenceData, encode_reference, read_reference
from edgelm.engine.graph import Graph
from edgelm.errors import BundleError
from edgelm.scoring.verification import Check, Drift, Figures, checks, drift, figures, observe, observe_session
from tests.conftest import ROOT, TINY_BUNDLE, RunCommand, edit_manifest

DIALOGUE = ROOT / "models" / "dialogue-6m-int8"


def write_reference(bundle: Path, content: bytes) -> None:
    """Replace the reference file, and correct its hash and the digest."""
    path = bundle / "reference.bin"
    path.write_bytes(content)
    fact = file_fact(path)
    edit_manifest(
        bundle, lambda m: m["files"].update({path.name: {"size_bytes": fact.size_bytes, "sha256": fact.sha256}})
    )


def restate(bundle: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest's facts about the reference."""
    edit_manifest(bundle, lambda m: edit(m["certificate"]["reference"]))


@pytest.mark.parametrize("path", [TINY_BUNDLE, default_bundle_path(), DIALOGUE], ids=lambda path: path.name)
@pytest.mark.parametrize("threads", ["1", "2"])
def test_committed_bundles_pass(path: Path, threads: str, edgelm_command: RunCommand) -> None:
    if not path.is_dir():
        pytest.skip("the dialogue model lies in the repository only")
    done = edgelm_command("verify", str(path), "--json", "--threads", threads)
    assert done.status == 0, done.stderr
    content = json.loads(done.stdout)
    measured = content["measured"]
    assert len(content["digest"]) == 64 and measured["threads"] == int(threads)
    assert all(check["passed"] for check in measured["checks"])
    assert measured["tokens"] > 500 and 0.98 < measured["perplexity_ratio"] < 1.01


def test_verify_in_words(edgelm_command: RunCommand) -> None:
    done = edgelm_command("verify", str(TINY_BUNDLE))
    assert done.status == 0
    first, second, *rest = done.stdout.splitlines()
    assert first.startswith("ok: 9 files") and second.startswith("measured on 576 tokens")
    assert len(rest) == 7 and sum(line.endswith(" ok") for line in rest) == 4 and max(map(len, rest)) < 80
    assert "measuring on 576 tokens" in done.stderr


def test_without_a_certificate_only_hashes_can_be_checked(tiny_copy: Path, edgelm_command: RunCommand) -> None:
    (tiny_copy / "reference.bin").unlink()
    edit_manifest(tiny_copy, lambda m: (m.update(certificate=None), m["files"].pop("reference.bin")))
    assert edgelm_command("verify", str(tiny_copy), "--hashes-only").status == 0
    done = edgelm_command("verify", str(tiny_copy))
    assert done.status == 1 and "nothing to measure it against" in done.stderr.splitlines()[-1]
    assert edgelm_command("compare", str(tiny_copy), str(TINY_BUNDLE)).status == 1
    assert edgelm_command("info", str(tiny_copy)).status == 0


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r.update(tokens=575), "but bundle.json describes"),
        (lambda r: r.update(top_count=7), "but bundle.json describes"),
        (lambda r: r.update(tokens=2**20, top_count=64), "but bundle.json describes"),
        (lambda r: r.update(row_tokens=65), "row_tokens is 65, but the context holds 64"),
    ],
)
def test_references_of_another_shape_are_refused(
    tiny_copy: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    restate(tiny_copy, edit)
    with pytest.raises(BundleError, match=message):
        read_reference(Bundle.read(tiny_copy))


def test_reference_ids_outside_the_vocabulary_are_refused(tiny_copy: Path) -> None:
    _, data = read_reference(Bundle.read(tiny_copy))
    data.ids[5] = 300
    write_reference(tiny_copy, encode_reference(data))
    with pytest.raises(BundleError, match="token id outside the vocabulary"):
        read_reference(Bundle.read(tiny_copy))


def test_numbers_that_are_none_are_refused(tiny_copy: Path) -> None:
    _, data = read_reference(Bundle.read(tiny_copy))
    data.bundle_mean[0] = np.nan
    write_reference(tiny_copy, encode_reference(data))
    with pytest.raises(BundleError, match="a NaN or infinity"):
        read_reference(Bundle.read(tiny_copy))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.integers(0, 40_000))
def test_any_damage_to_the_reference_is_refused_or_read(tiny_copy: Path, junk: bytes, at: int) -> None:
    original = (TINY_BUNDLE / "reference.bin").read_bytes()
    write_reference(tiny_copy, original[:at] + junk + original[at + len(junk) :])
    try:
        _, data = read_reference(Bundle.read(tiny_copy))
        assert data.ids.max() < 300
    except BundleError:
        pass


def test_a_reference_that_was_made_anew_must_fit_the_manifest(tiny_copy: Path) -> None:
    bundle = Bundle.read(tiny_copy)
    facts, data = read_reference(bundle)
    data.source_next[1] -= 1.0
    write_reference(tiny_copy, encode_reference(data))
    facts, data = read_reference(Bundle.read(tiny_copy))
    changed = Bundle.read(tiny_copy)
    observed = observe_session(facts, data, Graph.open(changed, device="cpu", threads=1).session())
    made = checks(facts, data, figures(facts, data, observed), drift(data, observed))
    assert [check.name for check in made if not check.passed] == ["source's perplexity"]


def test_the_file_comes_back_as_it_was_written(tiny_copy: Path) -> None:
    _, data = read_reference(Bundle.read(tiny_copy))
    assert encode_reference(data) == (TINY_BUNDLE / "reference.bin").read_bytes()
    _, large = read_reference(Bundle.read(default_bundle_path()))
    assert len(encode_reference(large)) == Bundle.read(default_bundle_path()).manifest.files["reference.bin"].size_bytes


def by_hand() -> tuple[Reference, ReferenceData]:
    """A reference of two rows, (0, 1, 2) and (1, 0), of a model for which all four tokens are equally likely."""
    nat = -np.log(4.0)
    facts = Reference("reference.bin", 5, 3, 2, 4.0, 1.0, 0.0, 1.0, 0.0, 0.0)
    top = np.full((5, 2), nat)
    following = np.array([nat, nat, 0, nat, 0])
    ids, top_ids = np.array([0, 1, 2, 1, 0]), np.tile([0, 1], (5, 1))
    return facts, ReferenceData(ids, top_ids, top, top, following, following, np.full(4, nat))


def test_measuring_by_hand() -> None:
    facts, data = by_hand()
    fed: list[list[int]] = []

    def score(row: npt.NDArray[np.int64]) -> list[npt.NDArray[np.float32]]:
        fed.append(row.tolist())
        return [np.zeros((1, 4), np.float32), np.zeros((len(row) - 1, 4), np.float32)]

    observed = observe(facts, data.ids, data.top_ids, score, 4)
    assert fed == [[0, 1, 2], [1, 0]]
    assert observed.next == pytest.approx(data.source_next)
    quality, apart = figures(facts, data, observed), drift(data, observed)
    assert quality.perplexity_ratio == pytest.approx(1.0) and quality.mean_kl_divergence == pytest.approx(0.0)
    assert quality.top1_agreement == 1.0
    assert apart.values < 1 / 1024 and apart.means == pytest.approx(0.0)
    assert all(check.passed for check in checks(facts, data, quality, apart))


def test_a_sharper_model_by_hand() -> None:
    facts, data = by_hand()
    logits = np.array([0, 0, 0, np.log(5)], np.float32)  # token 3, which never comes: 5/8; the others 1/8 each
    observed = observe(facts, data.ids, data.top_ids, lambda row: [np.tile(logits, (len(row), 1))], 4)
    quality, apart = figures(facts, data, observed), drift(data, observed)
    assert quality.perplexity_ratio == pytest.approx(2.0)
    assert quality.mean_kl_divergence == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75))
    assert quality.top1_agreement == 0.0
    assert apart.values == pytest.approx(np.sqrt(13 / 15) * np.log(2), rel=1e-3)
    names = [check.name for check in checks(facts, data, quality, apart) if not check.passed]
    assert names == ["perplexity ratio", "log-probabilities differ by, nats", "their means differ by, nats"]


def test_a_nan_never_passes() -> None:
    assert not Check("x", float("nan"), 0.0, 1.0).passed
    facts, data = by_hand()
    assert not all(check.passed for check in checks(facts, data, Figures(1.0, 0.0, 1.0), Drift(float("nan"), 0.0)))


def test_compare_with_itself(edgelm_command: RunCommand) -> None:
    done = edgelm_command("compare", str(TINY_BUNDLE), str(TINY_BUNDLE), "--json")
    assert done.status == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["a"] == content["b"] and content["a"]["precision"] == "fp32"
    assert content["agreement"]["top1_agreement"] == 1.0
    assert content["agreement"]["mean_kl_divergence"] == pytest.approx(0.0, abs=1e-12)
    shown = edgelm_command("compare", str(TINY_BUNDLE), str(TINY_BUNDLE)).stdout
    for words in ("perplexity ratio", "tokens/s", "peak memory", "same most likely token    100.00%"):
        assert words in shown
    assert "_" not in shown.replace(str(TINY_BUNDLE), "")  # no names of JSON fields


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_tables_fit_the_terminal(edgelm_command: RunCommand, columns: int) -> None:
    path = str(TINY_BUNDLE)
    for args in (("info", path), ("compare", path, path)):
        wide = edgelm_command(*args).stdout
        narrow = edgelm_command(*args, env={"COLUMNS": str(columns)}).stdout
        assert max(map(len, wide.splitlines())) > 80  # what goes to a file or a pipe is not wrapped
        assert max(map(len, narrow.splitlines())) <= columns
        assert sorted("".join(narrow.split())) == sorted("".join(wide.split()))


def test_compare_needs_one_tokenizer(edgelm_command: RunCommand) -> None:
    done = edgelm_command("compare", str(TINY_BUNDLE), str(default_bundle_path()))
    assert done.status == 1 and "have different tokenizers" in done.one_line()


def test_the_reference_is_small_beside_its_bundle() -> None:
    bundle = Bundle.read(default_bundle_path())
    assert bundle.manifest.files["reference.bin"].size_bytes < 0.03 * bundle.size_bytes
    assert bundle.size_bytes < 8_000_000


def test_altered_weights_fail_without_torch_too(tmp_path: Path, edgelm_command: RunCommand) -> None:
    copy = Path(shutil.copytree(default_bundle_path(), tmp_path / "altered"))
    path = copy / "model.onnx.data"
    data = np.fromfile(path, np.uint8)
    page = data[3_000_000 // 4096 * 4096 :][:65_536]  # somewhere in the middle, all of it in some matrix
    page ^= 4
    data.tofile(path)
    fact = file_fact(path)
    edit_manifest(
        copy, lambda m: m["files"].update({path.name: {"size_bytes": fact.size_bytes, "sha256": fact.sha256}})
    )
    done = edgelm_command("verify", str(copy))
    assert done.status == 1 and "FAILED" in done.stdout
