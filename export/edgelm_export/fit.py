"""The stored form of a checkpoint: as the name of a recipe says, or as a budget allows."""

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgelm.bundle.manifest import CacheType, FixedPrecision
from edgelm.engine.memory import ModelMemory
from edgelm.errors import ExportError
from edgelm.ids import IdArray
from edgelm_export.model.decoder import DecoderWeights
from edgelm_export.model.families import collect_weights
from edgelm_export.quantize.budget import (
    MARGIN,
    Budget,
    base_recipe,
    check_smallest,
    given_up,
    measure_options,
    mixed_recipe,
    plan,
)
from edgelm_export.quantize.cache_scales import cache_scales
from edgelm_export.quantize.calibrate import StoredDecoder, smooth, store
from edgelm_export.quantize.recipe import fixed_recipe, with_two_stage_head
from edgelm_export.quantize.storage import stored_bytes
from edgelm_export.source.checkpoint import Checkpoint
from edgelm_export.source.drawn_text import TextDrawer

CALIBRATION_TOKENS = 8_192
CALIBRATION_SEED = 1
JUDGED_TOKENS = 2_048
JUDGED_SEED = 2

PAPERS_BYTES = 120_000
"""Disk for the model card, the settings and the certificate's reference."""
PAPERS_BYTES_A_LAYER = 8_000
"""Disk for a layer's nodes in the graph and for its matrices in the manifest."""

Report = Callable[[str], None]


def store_as(
    checkpoint: Checkpoint,
    precision: FixedPrecision,
    drawer: TextDrawer,
    report: Report,
    *,
    two_stage_head: bool = False,
    int8_cache: bool = False,
) -> StoredDecoder:
    """Store a checkpoint by the recipe called `precision`; raises ExportError if an option does not go with it.

    Args:
        drawer: draws the text to calibrate on from the checkpoint.
        report: gets the name of each stage.
        two_stage_head: whether a coarse head of 4 bits finds the likeliest tokens, whose logits are then exact.
        int8_cache: whether keys and values are kept in 8 bits.
    """
    weights = collect_weights(checkpoint.model)
    recipe = fixed_recipe(precision, weights)
    if two_stage_head:
        recipe = with_two_stage_head(recipe, weights)
    if not recipe.is_quantized:
        assert not int8_cache, "`export` refuses an int8 cache where nothing is quantized"
        return store(weights, recipe, None)
    rows = _calibration(drawer, report)
    report("smoothing, and rounding with GPTQ" if recipe.needs_inputs else "smoothing")
    stored = store(smooth(weights, recipe, rows), recipe, rows)
    return _with_int8_cache(stored, rows) if int8_cache else stored


def store_within(
    checkpoint: Checkpoint,
    budget: Budget,
    drawer: TextDrawer,
    tokenizer_json: Path,
    prefix_bytes: int,
    report: Report,
    *,
    int8_cache: bool = False,
) -> tuple[StoredDecoder, str]:
    """Store a checkpoint with bits chosen matrix by matrix, so that it keeps `budget` and loses least.

    Limits of size are used up; a limit of perplexity alone gives the smallest weights that keep it.

    Args:
        drawer: draws the text to calibrate on from the checkpoint.
        tokenizer_json: the bundle's tokenizer, already written. It takes disk and memory too.
        prefix_bytes: size of the bundle's prefix, on disk and in memory.
        report: gets the name of each stage.
        int8_cache: whether keys and values are kept in 8 bits.

    Returns:
        The stored model, and one line that says what was given up.

    Raises:
        ExportError: the budget cannot be kept.
    """
    weights = collect_weights(checkpoint.model)
    disk, ram = _room(budget, weights, tokenizer_json, prefix_bytes, "int8" if int8_cache else "float32")
    check_smallest(weights, disk, ram)
    rows = _calibration(drawer, report)
    report("smoothing")
    smoothed = smooth(weights, base_recipe(weights), rows)
    report("measuring what every matrix loses at 4 bits, at 4 bits in finer blocks, and at 8 bits")
    judged = np.stack(drawer.draw(JUDGED_TOKENS, JUDGED_SEED))
    options = measure_options(smoothed, rows, judged)
    report("choosing bits, and rounding with GPTQ")
    limit = math.log(budget.max_perplexity_ratio or 1) * MARGIN
    only_quality = budget.max_disk_bytes is None and budget.max_ram_bytes is None
    chosen = plan(options, disk, ram, limit if only_quality else 0.0)
    expected = sum(option.loss_nats for option in chosen.values())
    if budget.max_perplexity_ratio is not None and expected > math.log(budget.max_perplexity_ratio):
        raise ExportError(
            f"no choice of bits keeps the perplexity within x {budget.max_perplexity_ratio:g}"
            f"{'' if only_quality else ' inside the other limits'}: the best one is expected at "
            f"x {math.exp(expected):.4f} ({given_up(chosen)})"
        )
    stored = store(smoothed, mixed_recipe(chosen), rows)
    return _with_int8_cache(stored, rows) if int8_cache else stored, given_up(chosen)


def _with_int8_cache(stored: StoredDecoder, rows: IdArray) -> StoredDecoder:
    return replace(stored, cache_scales=cache_scales(stored.restored, rows))


def _calibration(drawer: TextDrawer, report: Report) -> IdArray:
    report(f"drawing {CALIBRATION_TOKENS:,} tokens from the source to calibrate on")
    return np.stack(drawer.draw(CALIBRATION_TOKENS, CALIBRATION_SEED))  # (R, T)


def _room(
    budget: Budget, weights: DecoderWeights, tokenizer_json: Path, prefix_bytes: int, cache_type: CacheType
) -> tuple[float, float]:
    """The bytes of disk and of memory that a budget leaves for the matrices."""
    sizes = weights.architecture
    vectors = [*weights.final_norm.vectors]
    if weights.position_table is not None:
        vectors.append(weights.position_table.weight)
    for rotary in weights.rotaries:
        vectors += [rotary.cos, rotary.sin]
    for layer in weights.layers:
        vectors += [vector for norm in layer.norms for vector in norm.vectors]
        vectors += [linear.bias for linear in layer.products if linear.bias is not None]
    floats = sum(stored_bytes(vector.nbytes) for vector in vectors)
    disk = ram = math.inf
    if budget.max_disk_bytes is not None:
        value_divisors = 4 * sizes.num_key_value_heads * sizes.head_dim
        papers = PAPERS_BYTES + sizes.num_layers * (PAPERS_BYTES_A_LAYER + value_divisors)
        disk = budget.max_disk_bytes - floats - papers - tokenizer_json.stat().st_size - prefix_bytes
    if budget.max_ram_bytes is not None:
        without_weights = ModelMemory.forecast(sizes, cache_type, 0, prefix_bytes).forecast_bytes
        # The token table is mapped beside its packed form, and once more in memory while it is packed.
        table = 2 * weights.token_table.weight.size  # a value takes a byte where it has 8 bits
        ram = budget.max_ram_bytes - _runtime_bytes(tokenizer_json) - without_weights - floats - table
    return disk, ram


def _runtime_bytes(tokenizer_json: Path) -> int:
    """The memory of a process that has loaded ONNX Runtime and this tokenizer, but no graph."""
    code = (
        "import sys, edgelm.engine.session; from edgelm.engine.device import import_onnxruntime; import_onnxruntime();"
        "from edgelm.text.tokenizer import Tokenizer; from edgelm.engine.memory import peak_rss_bytes;"
        "Tokenizer.from_json(open(sys.argv[1], encoding='utf-8').read()); print(peak_rss_bytes())"
    )
    command = [sys.executable, "-P", "-c", code, str(tokenizer_json)]  # -P: nothing of the current folder is imported
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
