"""The stored form of a checkpoint: as a recipe's name says, or as a budget allows."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgelm.bundle.manifest import FixedPrecision
from edgelm.errors import ExportError
from edgelm.ids import PREFILL_CHUNK_TOKENS
from edgelm_export.graph.writer import stored_bytes
from edgelm_export.model.forward import Activation
from edgelm_export.model.gpt2 import PRODUCTS, Gpt2Weights, collect_weights
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
from edgelm_export.quantize.calibrate import StoredGpt2, smooth, store
from edgelm_export.quantize.recipe import Recipe, fixed_recipe
from edgelm_export.source.checkpoint import Checkpoint
from edgelm_export.source.drawn_text import draw_texts

CALIBRATION_TOKENS = 8_192
CALIBRATION_SEED = 1
JUDGED_TOKENS = 2_048
JUDGED_SEED = 2

PAPERS_BYTES = 120_000
"""Room in a bundle for model card, settings, and the certificate's reference."""
PAPERS_BYTES_A_LAYER = 8_000
"""Room for a layer's nodes in the graph and its matrices in the manifest."""

Report = Callable[[str], None]


def store_as(checkpoint: Checkpoint, precision: FixedPrecision, report: Report) -> StoredGpt2:
    """Store a checkpoint by the recipe of that name."""
    weights = collect_weights(checkpoint.model)
    recipe = fixed_recipe(precision, weights)
    if not recipe.is_quantized:
        return store(weights, recipe, _activations(checkpoint), None)
    rows = _calibration(checkpoint, report)
    report("smoothing, and rounding with GPTQ" if recipe.wants_inputs else "smoothing")
    return store(smooth(weights, recipe, _activations(checkpoint), rows), recipe, _activations(checkpoint), rows)


def store_within(
    checkpoint: Checkpoint, budget: Budget, tokenizer_json: Path, report: Report, prefix_bytes: int = 0
) -> tuple[StoredGpt2, str]:
    """Store a checkpoint with bits chosen matrix by matrix, so that it keeps `budget` and loses least.

    Limits of size are used up; a limit of perplexity alone gives the smallest weights that keep it.

    Args:
        tokenizer_json: the bundle's, already written: it takes disk and memory too.
        prefix_bytes: what the bundle's prefix takes of both.

    Returns:
        The stored model, and what was given up, in one line.

    Raises:
        ExportError: the budget cannot be kept.
    """
    weights, activations = collect_weights(checkpoint.model), _activations(checkpoint)
    disk, ram = (room - prefix_bytes for room in _room(budget, weights, tokenizer_json))
    check_smallest(weights, disk, ram)
    rows = _calibration(checkpoint, report)
    report("smoothing")
    smoothed = smooth(weights, base_recipe(weights), activations, rows)
    report("measuring what every matrix loses at 4 bits, at 4 bits in finer blocks, and at 8")
    judged = np.stack(draw_texts(checkpoint.model, JUDGED_TOKENS, JUDGED_SEED))
    options = measure_options(smoothed, activations, rows, judged)
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
    recipe: Recipe = mixed_recipe(chosen)
    return store(smoothed, recipe, activations, rows), given_up(chosen)


def _activations(checkpoint: Checkpoint) -> list[Activation]:
    return [block.mlp.act for block in checkpoint.model.transformer.h]


def _calibration(checkpoint: Checkpoint, report: Report) -> npt.NDArray[np.int64]:
    report(f"drawing {CALIBRATION_TOKENS:,} tokens from the source to calibrate on")
    return np.stack(draw_texts(checkpoint.model, CALIBRATION_TOKENS, CALIBRATION_SEED))  # (R, T)


def _room(budget: Budget, weights: Gpt2Weights, tokenizer_json: Path) -> tuple[float, float]:
    """Bytes of disk and of memory that a budget leaves to the matrices."""
    facts = weights.architecture
    vectors = [weights.position_table, *[weights.final_norm.weight] * 2]
    for layer in weights.layers:
        vectors += [layer.attention_norm.weight, layer.mlp_norm.weight] * 2
        vectors += [layer.product(field).bias for field in PRODUCTS]
    floats = sum(stored_bytes(vector.nbytes) for vector in vectors)
    disk = ram = math.inf
    if budget.max_disk_bytes is not None:
        papers = PAPERS_BYTES + facts.num_layers * (PAPERS_BYTES_A_LAYER + 4 * facts.num_heads * facts.head_dim)
        papers += tokenizer_json.stat().st_size
        disk = budget.max_disk_bytes - floats - papers
    if budget.max_ram_bytes is not None:
        kv = 4 * facts.cache_values_per_token * facts.context_length
        width = 3 * facts.num_heads * facts.head_dim + weights.layers[0].mlp_in.weight.shape[1] + 4 * facts.hidden_size
        chunk = 4 * min(PREFILL_CHUNK_TOKENS, facts.context_length) * width
        # The table is mapped beside its packed form, and once more in memory while it is packed.
        table = 2 * weights.token_table.size  # a byte a value, where it has 8 bits
        base = _runtime_bytes(tokenizer_json)
        ram = budget.max_ram_bytes - base - floats - kv - 2 * chunk - table
    return disk, ram


def _runtime_bytes(tokenizer_json: Path) -> int:
    """The memory of a process that has loaded the runtime and this tokenizer, but no graph."""
    code = (
        "import sys, edgelm.engine.session; from edgelm.engine.device import import_onnxruntime; import_onnxruntime();"
        "from edgelm.text.tokenizer import Tokenizer; from edgelm.engine.memory import peak_rss_bytes;"
        "Tokenizer.from_json(open(sys.argv[1], encoding='utf-8').read()); print(peak_rss_bytes())"
    )
    command = [sys.executable, "-c", code, str(tokenizer_json)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
