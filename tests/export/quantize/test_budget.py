"""Bits chosen matrix by matrix: plans computed by hand, and an export within limits that no fixed recipe keeps."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm.errors import ExportError
from edgelm_export.model.decoder import PRODUCTS, DecoderWeights
from edgelm_export.model.families import collect_weights
from edgelm_export.model.forward import DecoderForward
from edgelm_export.pipeline import export
from edgelm_export.quantize.budget import (
    OPTIONS,
    Budget,
    Option,
    _option,
    check_budget,
    given_up,
    measure_options,
    mixed_recipe,
    plan,
)
from edgelm_export.quantize.calibrate import as_product, store
from edgelm_export.quantize.recipe import BLOCK4, BLOCK4_FINE, BLOCK8, StorageRecipe, uniform_storage
from edgelm_export.quantize.storage import FLOAT32, Storage, block_size_for, quantize_blocks, stored_bytes
from tests.build_side import Report
from tests.conftest import RunCommand
from tests.export.checkpoints import FOOTPRINT, Shape, TorchModel, save_checkpoint

pytestmark = pytest.mark.export


def option(size: int, loss: float) -> Option:
    return Option(BLOCK4 if size < 50 else BLOCK8, size, size, loss)


BY_HAND = {"a": [option(10, 0.9), option(20, 0.1)], "b": [option(10, 0.2), option(20, 0.1)]}


def sizes(chosen: dict[str, Option]) -> dict[str, int]:
    return {name: option.disk_bytes for name, option in chosen.items()}


def test_the_best_step_is_taken_first() -> None:
    assert sizes(plan(BY_HAND, 30, 100, 0)) == {"a": 20, "b": 10}


def test_everything_that_fits_is_taken() -> None:
    assert sizes(plan(BY_HAND, 40, 100, 0)) == {"a": 20, "b": 20}


def test_what_is_good_enough_is_not_paid_for() -> None:
    assert sizes(plan(BY_HAND, 100, 100, 0.31)) == {"a": 20, "b": 10}
    assert sizes(plan(BY_HAND, 100, 100, 1.1)) == {"a": 10, "b": 10}


def test_a_step_costs_what_it_adds_and_not_what_the_matrix_takes() -> None:
    """10 bytes more for a large matrix win against 20 more for a small one that gain less for each byte."""
    options = {"large": [option(100, 2.0), option(110, 1.0)], "small": [option(10, 2.0), option(30, 0.5)]}
    assert sizes(plan(options, 130, 1000, 0)) == {"large": 110, "small": 10}


def test_memory_limits_too() -> None:
    assert sizes(plan(BY_HAND, 100, 30, 0)) == {"a": 20, "b": 10}


def test_every_step_counts_once_against_both_limits() -> None:
    """Three matrices of 10 bytes and 5 of memory, which may become 20 and 25: exactly 60 and 75 take all steps."""
    small, large = replace(option(10, 0.5), ram_bytes=5), replace(option(20, 0.1), ram_bytes=25)
    options = {name: [small, large] for name in "abc"}
    assert sizes(plan(options, 60, 75, 0)) == {"a": 20, "b": 20, "c": 20}
    for disk, ram in ((59, 75), (60, 74)):
        assert sorted(sizes(plan(options, disk, ram, 0)).values()) == [10, 20, 20]


@pytest.mark.parametrize(
    ("storage", "k", "n", "disk", "ram"),
    [
        (BLOCK4, 512, 10, 4096 + 80, 2560 + 2 * 80),  # two blocks of 256 codes of half a byte, a scale of 4 bytes each
        (BLOCK8, 512, 10, 8192 + 80, 5120 + 2 * 80),
        (BLOCK4_FINE, 512, 10, 4096 + 640, 2560 + 2 * 640),
        (BLOCK4, 600, 3, 912 + 228, 912 + 2 * 228),  # 600 has no block of its own: 19 blocks of 32, the last padded
    ],
)
def test_what_an_option_takes(storage: Storage, k: int, n: int, disk: int, ram: int) -> None:
    found = _option(storage, (k, n), 0.5)
    assert (found.disk_bytes, found.ram_bytes, found.loss_nats) == (disk, ram, 0.5)
    stored = quantize_blocks(np.ones((n, k), np.float32), storage.bits, block_size_for(k, storage.block_size or 0))
    assert stored_bytes(stored.packed.nbytes) + stored_bytes(stored.scales.nbytes) == disk
    looked_up = _option(storage, (k, n), 0.5, True)
    assert looked_up.ram_bytes - found.ram_bytes == stored.scales.nbytes


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_what_an_option_costs(tied: bool, tmp_path: Path) -> None:
    """The mean KL divergence of the model whose one matrix is stored, from the model with all weights."""
    shape = Shape(width=32, heads=4, layers=2, vocab=80, context=32, tied=tied)
    weights = collect_weights(TorchModel(save_checkpoint(tmp_path / "m", shape)).model.requires_grad_(False))
    rng = np.random.default_rng(0)
    calibration, judged = rng.integers(0, 80, (4, 32)), rng.integers(0, 80, (3, 32))
    options = measure_options(weights, calibration, judged)
    assert set(options) == {table.name for table in weights.tables} | {linear.name for linear in weights.products}

    def logs(changed: DecoderWeights) -> np.ndarray:
        forward = DecoderForward(changed)
        x = forward.embed(judged)
        for layer in changed.layers:
            x = forward.layer(layer, x)
        found: np.ndarray = forward.log_probabilities(forward.final(x)).double().numpy()
        return found

    source = logs(weights)
    for storage in OPTIONS:
        recipe = StorageRecipe("mixed", uniform_storage(weights, storage, FLOAT32))
        stored = store(weights, recipe, calibration).stored
        at = OPTIONS.index(storage)
        for index, layer in enumerate(weights.layers):
            for field in PRODUCTS:
                name = layer.product(field).name
                layers = list(weights.layers)
                layers[index] = layer.with_weight(field, as_product(stored[name]))
                found = logs(replace(weights, layers=tuple(layers)))
                divergence = float((np.exp(source) * (source - found)).sum(axis=-1).mean())
                assert options[name][at].loss_nats == pytest.approx(divergence, rel=1e-2, abs=1e-6), name
    for choices in options.values():
        assert choices[0].loss_nats > 2 * choices[2].loss_nats  # 4 bits cost more than 8
    table = options[weights.token_table.name][0]
    assert table.ram_bytes == _option(BLOCK4, (32, 80), 0, True).ram_bytes
    if weights.head is not None:
        assert options[weights.head.name][0].ram_bytes == _option(BLOCK4, (32, 80), 0).ram_bytes


def test_what_cannot_fit_is_refused_with_numbers() -> None:
    with pytest.raises(ExportError, match=r"need at least 0\.0 MB of disk"):
        plan(BY_HAND, 19, 100, 0)
    with pytest.raises(ExportError, match="of memory"):
        plan(BY_HAND, 100, 19, 0)


@settings(deadline=None, max_examples=200)
@given(
    losses=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=6),
    limit=st.integers(60, 1000),
)
def test_plans_fit_and_lose_no_more_than_the_smallest(losses: list[tuple[float, ...]], limit: int) -> None:
    options = {
        str(i): [option(size, loss) for size, loss in zip((10, 15, 25), several, strict=True)]
        for i, several in enumerate(losses)
    }
    chosen = plan(options, limit, 10**9, 0)
    assert sum(o.disk_bytes for o in chosen.values()) <= limit
    assert sum(o.loss_nats for o in chosen.values()) <= sum(several[0].loss_nats for several in options.values())
    if limit >= 25 * len(losses):
        assert all(chosen[name].loss_nats == min(o.loss_nats for o in options[name]) for name in chosen)


def test_what_was_given_up_is_said() -> None:
    chosen = {"a": Option(BLOCK4, 1, 1, 0.02), "b": Option(BLOCK4_FINE, 1, 1, 0.01), "c": Option(BLOCK8, 1, 1, 0)}
    line = given_up(chosen)
    assert line.startswith(
        "of 3 matrices 1 at 4 bits in blocks of 256, 1 at 4 bits in blocks of 32, 1 at 8 bits in blocks of 256;"
    )
    assert "x 1.0305" in line
    assert "a costs most, 0.0200 nats at 4 bits" in line
    assert mixed_recipe(chosen).storage["b"] == BLOCK4_FINE


@pytest.mark.shared
def test_a_budget_that_no_fixed_recipe_meets(
    shared_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: Report
) -> None:
    # Of stories-6m int8 takes 6.8 MB, and int4 multiplies the perplexity by 1.003 to 1.004.
    monkeypatch.setattr("edgelm_export.certify.certificate.measure_footprint", lambda bundle: FOOTPRINT)
    monkeypatch.setattr("edgelm_export.fit.CALIBRATION_TOKENS", 1_024)
    monkeypatch.setattr("edgelm_export.fit.JUDGED_TOKENS", 512)
    budget = Budget(max_disk_bytes=5_400_000, max_perplexity_ratio=1.0025)
    exported = export(str(shared_folder / "checkpoints" / "stories-6m"), tmp_path / "out", budget)
    bundle, lost = exported.bundle, exported.certificate
    report(f"stories-6m within 5.4 MB and x 1.0025: {bundle.size_bytes:,} bytes; {exported.notes[-1]}")
    assert lost.passed
    assert bundle.size_bytes <= 5_400_000
    assert bundle.manifest.recipe.name == "mixed"
    assert len({(m.format, m.bits, m.block_size) for m in bundle.manifest.recipe.matrices}) >= 3


@pytest.mark.parametrize("budget", [Budget(max_disk_bytes=1000), Budget(max_ram_bytes=1000)])
def test_what_cannot_fit_is_refused_before_anything_is_measured(
    budget: Budget, tmp_path: Path, few_tokens: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgelm_export.fit.measure_options", None)
    source = save_checkpoint(tmp_path / "checkpoint", Shape(layers=1, context=16))
    with pytest.raises(ExportError, match="need at least"):
        export(str(source), tmp_path / "out", budget)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_a_finished_bundle_beyond_its_limits_is_refused_with_both_numbers() -> None:
    budget = Budget(max_disk_bytes=100_000_000, max_ram_bytes=200_000_000)
    check_budget(budget, 100_000_000, 200_000_000)
    with pytest.raises(ExportError, match=r"takes 101\.0 MB, more than the 100\.0 MB .* set the limit to 98\.9 MB"):
        check_budget(budget, 101_000_000, 200_000_000)
    with pytest.raises(ExportError, match=r"need a memory of 210\.0 MB, more than the 200\.0 MB"):
        check_budget(budget, 100_000_000, 210_000_000)


def test_limits_and_a_precision_exclude_each_other(edgelm_command: RunCommand) -> None:
    result = edgelm_command("export", "x", "-o", "y", "--precision", "int4", "--max-disk", "80M")
    assert result.status == 2
    assert "--precision and limits" in result.one_line()


@pytest.mark.parametrize("size", ["80X", "-5M", "0", "M", "nan", "1e9"])
def test_sizes_that_are_none(edgelm_command: RunCommand, size: str) -> None:
    result = edgelm_command("export", "x", "-o", "y", f"--max-disk={size}")
    assert result.status == 2
    assert "is not a size like 80M or 1.5G" in result.one_line()


@pytest.mark.parametrize("ratio", ["1", "0.5", "nan", "1000", "-1"])
def test_perplexity_limits_that_are_none(edgelm_command: RunCommand, ratio: str) -> None:
    result = edgelm_command("export", "x", "-o", "y", f"--max-ppl={ratio}")
    assert result.status == 2
    assert "--max-ppl must be more than 1" in result.one_line()
