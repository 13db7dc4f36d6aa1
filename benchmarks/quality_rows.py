"""The rows of `benchmarks.quality`: ways to store a checkpoint, and what each of them loses.

Every row is a real graph run by the shipped runtime, compared with torch in float32.
"""

import math
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgelm.engine.graph import Graph
from edgelm.engine.session import Session
from edgelm.scoring.comparison import Comparison, compare_texts
from edgelm_export.graph.bare_bundle import write_bare_bundle
from edgelm_export.model.decoder import DecoderWeights
from edgelm_export.model.families import collect_weights
from edgelm_export.quantize.budget import base_recipe, measure_options, mixed_recipe, plan
from edgelm_export.quantize.calibrate import StoredDecoder, smooth, store
from edgelm_export.quantize.recipe import (
    BLOCK4,
    BLOCK4_FINE,
    BLOCK8,
    StorageRecipe,
    fixed_recipe,
    uniform_storage,
)
from edgelm_export.quantize.smooth import fold_norm
from edgelm_export.quantize.storage import Storage, quantize_blocks
from edgelm_export.source.checkpoint import Checkpoint
from edgelm_export.source.drawn_text import TextDrawer

Ids = npt.NDArray[np.int64]

WINDOW_TOKENS = 512
CALIBRATION_TOKENS = 8_192
JUDGED_TOKENS = 2_048
OUTLIER_FACTOR = 30
OUTLIER_CHANNELS = 6


@dataclass(frozen=True)
class Material:
    """The weights and token ids that every row is made from."""

    weights: DecoderWeights
    calibration: Ids
    """Token ids (R, T) to calibrate with."""
    judged: Ids
    """Token ids (R, T) to plan mixed recipes with."""


Make = Callable[[Material], StoredDecoder]


def with_outliers(weights: DecoderWeights) -> DecoderWeights:
    """Weights of the same function, with some channels of every LayerNorm 30 times as large."""
    rng = np.random.default_rng(0)
    layers = []
    for layer in weights.layers:
        width = len(layer.attention_norm.weight)
        loud = np.ones(width, np.float32)
        loud[rng.choice(width, OUTLIER_CHANNELS, replace=False)] = 1 / OUTLIER_FACTOR
        attention_norm, qkv = fold_norm(layer.attention_norm, layer.qkv, loud)
        mlp_norm, mlp_in = fold_norm(layer.mlp_norm, layer.mlp_in, loud)
        layers.append(replace(layer, attention_norm=attention_norm, qkv=qkv, mlp_norm=mlp_norm, mlp_in=mlp_in))
    return replace(weights, layers=tuple(layers))


def recipe_of(weights: DecoderWeights, body: Storage, table: Storage) -> StorageRecipe:
    """A recipe that stores all products in one way and the token table in another."""
    return StorageRecipe("mixed", uniform_storage(weights, body, table))


def uniform(body: Storage, table: Storage = BLOCK8, *, smoothed: bool = True, gptq: bool = True) -> Make:
    """A row with one storage for all products.

    Args:
        body: storage of the products.
        table: storage of the token table.
        smoothed: fold outliers of the activations into the weights first.
        gptq: use GPTQ at 4 bits; otherwise round to nearest with searched scales.
    """

    def make(material: Material) -> StoredDecoder:
        recipe = recipe_of(material.weights, body, table)
        weights = material.weights
        if smoothed:
            weights = smooth(weights, recipe, material.calibration)
        if gptq or body.bits == 8:
            return store(weights, recipe, material.calibration)
        stored = store(weights, recipe_of(weights, BLOCK8, table), None)
        assert body.block_size is not None
        for linear in weights.products:
            rows = np.ascontiguousarray(linear.weight.T)
            stored.stored[linear.name] = quantize_blocks(rows, body.bits, body.block_size)
        return stored

    return make


def within(ratio: float) -> Make:
    """A row with the smallest mixed recipe that is expected to keep the perplexity ratio below `ratio`."""

    def make(material: Material) -> StoredDecoder:
        base = base_recipe(material.weights)
        weights = smooth(material.weights, base, material.calibration)
        options = measure_options(weights, material.calibration, material.judged)
        recipe = mixed_recipe(plan(options, math.inf, math.inf, math.log(ratio)))
        return store(weights, recipe, material.calibration)

    return make


def named(name: Any) -> Make:
    """A row with the fixed recipe that `edgelm export --precision` makes under this name."""

    def make(material: Material) -> StoredDecoder:
        recipe = fixed_recipe(name, material.weights)
        if not recipe.is_quantized:
            return store(material.weights, recipe, None)
        weights = smooth(material.weights, recipe, material.calibration)
        return store(weights, recipe, material.calibration)

    return make


INT8_ROW = Storage("int8_row", 8)
BLOCK4_128 = Storage("block", 4, 128)
ROWS: dict[str, Make] = {
    "**fp32**": named("fp32"),
    "**fp16**": named("fp16"),
    "**int8**: blocks of 256, smoothed": named("int8"),
    "8-bit blocks of 256, not smoothed": uniform(BLOCK8, smoothed=False),
    "8-bit blocks of 128, smoothed": uniform(Storage("block", 8, 128)),
    "**w8a8**: per row, smoothed": named("w8a8"),
    "W8A8 per row, not smoothed": uniform(INT8_ROW, smoothed=False),
    "**int4**: blocks of 256, smoothed, GPTQ": named("int4"),
    "blocks of 256, GPTQ, not smoothed": uniform(BLOCK4, smoothed=False),
    "blocks of 256, smoothed, round to nearest": uniform(BLOCK4, gptq=False),
    "blocks of 128, round to nearest, not smoothed": uniform(BLOCK4_128, smoothed=False, gptq=False),
    "blocks of 128, smoothed, GPTQ": uniform(BLOCK4_128),
    "blocks of 32, smoothed, GPTQ": uniform(BLOCK4_FINE),
    "blocks of 256, smoothed, GPTQ, 4-bit table in blocks of 32": uniform(BLOCK4, BLOCK4_FINE),
    "**int4-small**: blocks of 256, smoothed, GPTQ, 4-bit table in blocks of 256": named("int4-small"),
    "mixed for x 1.002": within(1.002),
    "mixed for x 1.02": within(1.02),
}


def open_session(stored: StoredDecoder, folder: Path) -> tuple[Session, int]:
    """A session of the shipped runtime on the stored model, and the bytes of its graph and weights."""
    bundle = write_bare_bundle(stored, folder)
    size = sum(fact.size_bytes for fact in bundle.manifest.files.values())
    return Graph.open(bundle, device="cpu").session(), size


def windows(path: Path, separator: str, encode: Callable[[str], list[int]], parts: int | None) -> list[Ids]:
    """The first `parts` texts of a file, each preceded by token 0, in windows of 512 tokens.

    Args:
        path: UTF-8 file.
        separator: text between the texts of the file.
        encode: tokenizer, from text to token ids.
        parts: number of texts; None for all.
    """
    text = path.read_text(encoding="utf-8")
    texts = [part for piece in text.split(separator) if (part := piece.strip())][:parts]
    ids = np.array([token for part in texts for token in (0, *encode(part))], np.int64)
    return np.split(ids, range(WINDOW_TOKENS, len(ids), WINDOW_TOKENS))


def measure(
    rows: Mapping[str, Make],
    material: Material,
    reference: Callable[[Ids], npt.NDArray[np.float32]],
    text: list[Ids],
) -> Iterator[Any]:
    """Make and measure rows.

    Args:
        rows: rows by name.
        material: the weights and token ids to make them from.
        reference: logits (T, V) of the source in float32 for token ids (T,).
        text: windows of held-out token ids.

    Yields:
        Name, bytes of graph and weights, and comparison with the reference of each row.
    """
    for name, make in rows.items():
        print(f"  {name}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            session, size = open_session(make(material), Path(folder))
            yield name, size, compare_texts(reference, session, text)


def facts(measured: Comparison) -> dict[str, float]:
    """Perplexity ratio, mean KL divergence and top-1 agreement of a comparison."""
    return {
        "perplexity_ratio": math.exp((measured.bundle_nats - measured.source_nats) / measured.tokens),
        "mean_kl_divergence_nats": measured.kl_nats / measured.tokens,
        "top1_agreement": measured.same_top1 / measured.tokens,
    }


def measure_checkpoint(
    checkpoint: Checkpoint, path: Path, separator: str, parts: int | None, names: Collection[str]
) -> tuple[int, dict[str, dict[str, Any]]]:
    """Measure rows on a checkpoint, as it is and with outliers put in.

    Args:
        checkpoint: the source, in float32.
        path: UTF-8 file of held-out text.
        separator: text between the texts of the file.
        parts: number of texts to measure on; None for all.
        names: names of the rows.

    Returns:
        Number of predicted tokens, and the numbers of each row by name.
    """
    text = windows(path, separator, checkpoint.tokenizer.encode, parts)
    known: dict[bytes, npt.NDArray[np.float32]] = {}

    def reference(ids: Ids) -> npt.NDArray[np.float32]:
        if ids.tobytes() not in known:
            known[ids.tobytes()] = checkpoint.model(torch.from_numpy(ids)[None]).logits[0].numpy()
        return known[ids.tobytes()]

    weights = collect_weights(checkpoint.model)
    with tempfile.TemporaryDirectory() as scratch:
        drawer = TextDrawer(checkpoint.model, Path(scratch) / "source")
        calibration, judged = (np.stack(drawer.draw(n, s)) for n, s in ((CALIBRATION_TOKENS, 1), (JUDGED_TOKENS, 2)))
    results: dict[str, dict[str, Any]] = {name: {} for name in names}
    rows = {name: ROWS[name] for name in names}
    for kind, source in (("plain", weights), ("outliers", with_outliers(weights))):
        print(kind, file=sys.stderr)
        for name, size, measured in measure(rows, Material(source, calibration, judged), reference, text):
            results[name] |= {"bytes": size} | {f"{kind}_{key}": value for key, value in facts(measured).items()}
    return sum(len(ids) - 1 for ids in text), results
