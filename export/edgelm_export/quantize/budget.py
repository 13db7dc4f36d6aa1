"""A recipe made to measure: bits for every matrix, so that a bundle fits a budget and loses least.

How much each matrix suffers from each way of storing it is measured, one matrix at a time, on text the source drew:
the mean KL divergence from the source. On such text the logarithm of the perplexity ratio is that divergence in
expectation, and the divergences of small errors add up, so a plan is a choice of one option per matrix: start with the
smallest and take, again and again, the step that saves the most nats per byte.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from torch import Tensor

from edgelm.errors import ExportError
from edgelm_export.graph.writer import stored_bytes
from edgelm_export.model.forward import Activation, Gpt2Forward
from edgelm_export.model.gpt2 import PRODUCTS, Gpt2Weights
from edgelm_export.quantize.calibrate import as_product, store, store_table
from edgelm_export.quantize.recipe import (
    BLOCK4,
    BLOCK4_FINE,
    BLOCK8,
    HEAD,
    POSITION_TABLE,
    TOKEN_TABLE,
    Recipe,
    body_matrices,
    table_matrices,
)
from edgelm_export.quantize.storage import FLOAT32, Storage, block_size_for

OPTIONS = (BLOCK4, BLOCK4_FINE, BLOCK8)
"""The smallest first."""
MARGIN = 0.9
"""Of a perplexity limit: a plan aims below it, for it is judged on other text than it was made on."""


@dataclass(frozen=True)
class Budget:
    """What a bundle may cost; None where it does not matter."""

    max_disk_bytes: int | None = None
    max_ram_bytes: int | None = None
    max_perplexity_ratio: float | None = None


def check_budget(budget: Budget, disk_bytes: int, peak_rss_bytes: int) -> None:
    """Compare a finished bundle with its budget.

    Raises:
        ExportError: it is larger, or was measured to need more memory.
    """
    for what, found, limit in (
        ("takes", disk_bytes, budget.max_disk_bytes),
        ("was measured to need a memory of", peak_rss_bytes, budget.max_ram_bytes),
    ):
        if limit is not None and found > limit:
            raise ExportError(
                f"the bundle {what} {found / 1e6:.1f} MB, more than the {limit / 1e6:.1f} MB allowed; nothing was "
                f"written; the forecast was short: ask for {limit / 1e6 - 1.1 * (found - limit) / 1e6:.1f} MB instead"
            )


@dataclass(frozen=True)
class Option:
    """One way to store one matrix."""

    storage: Storage
    disk_bytes: int
    ram_bytes: int
    """Of the form the kernels work with."""
    loss_nats: float
    """Mean KL divergence from the source when this matrix alone is stored so."""


Options = Mapping[str, Sequence[Option]]
"""By matrix, the smallest first."""


def plan(options: Options, disk_bytes: float, ram_bytes: float, loss_nats: float) -> dict[str, Option]:
    """Choose an option for every matrix.

    Within `disk_bytes` and `ram_bytes` (of the matrices together) the loss is made as small as it gets, but not
    smaller than `loss_nats`: what is good enough is not paid for.

    Raises:
        ExportError: even the smallest options do not fit.
    """
    chosen = {name: several[0] for name, several in options.items()}
    disk, ram = sum(o.disk_bytes for o in chosen.values()), sum(o.ram_bytes for o in chosen.values())
    if disk > disk_bytes or ram > ram_bytes:
        what, need, limit = ("disk", disk, disk_bytes) if disk > disk_bytes else ("memory", ram, ram_bytes)
        raise ExportError(
            f"the weights need at least {need / 1e6:.1f} MB of {what}, but the budget leaves them "
            f"{max(limit, 0) / 1e6:.1f} MB: raise the limit or take a smaller model"
        )
    while sum(o.loss_nats for o in chosen.values()) > loss_nats:
        steps = [
            ((now.loss_nats - better.loss_nats) / max(1, better.disk_bytes - now.disk_bytes), name, better)
            for name, now in chosen.items()
            for better in options[name]
            if better.loss_nats < now.loss_nats
            and disk + better.disk_bytes - now.disk_bytes <= disk_bytes
            and ram + better.ram_bytes - now.ram_bytes <= ram_bytes
        ]
        if not steps:
            break
        _, name, better = max(steps, key=lambda step: step[0])
        disk += better.disk_bytes - chosen[name].disk_bytes
        ram += better.ram_bytes - chosen[name].ram_bytes
        chosen[name] = better
    return chosen


def check_smallest(weights: Gpt2Weights, disk_bytes: float, ram_bytes: float) -> None:
    """Refuse a budget that not even the smallest options fit, before anything is measured.

    Raises:
        ExportError: as `plan`.
    """
    smallest = {
        layer.product(field).name: [_option(OPTIONS[0], layer.product(field).weight.shape, 0.0)]
        for layer in weights.layers
        for field in PRODUCTS
    }
    for name, table in ((TOKEN_TABLE, weights.token_table), (HEAD, weights.head)):
        if table is not None:
            smallest[name] = [_option(OPTIONS[0], table.shape[::-1], 0.0, is_table=name == TOKEN_TABLE)]
    plan(smallest, disk_bytes, ram_bytes, 0.0)


def mixed_recipe(chosen: Mapping[str, Option]) -> Recipe:
    """The recipe of a plan."""
    storage = {name: option.storage for name, option in chosen.items()}
    return Recipe("mixed", {**storage, POSITION_TABLE: FLOAT32})


def given_up(chosen: Mapping[str, Option]) -> str:
    """What a plan gave up, in one line, the costliest matrix named."""
    counts: dict[str, int] = {}
    for option in chosen.values():
        kind = f"{option.storage.bits} bits in blocks of {option.storage.block_size}"
        counts[kind] = counts.get(kind, 0) + 1
    worst = max(chosen, key=lambda name: chosen[name].loss_nats)
    ratio = math.exp(sum(option.loss_nats for option in chosen.values()))
    kinds = ", ".join(f"{count} at {kind}" for kind, count in sorted(counts.items()))
    return (
        f"of {len(chosen)} matrices {kinds}; expected perplexity x {ratio:.4f}; "
        f"{worst} costs most, {chosen[worst].loss_nats:.4f} nats at {chosen[worst].storage.bits} bits"
    )


def base_recipe(weights: Gpt2Weights) -> Recipe:
    """All matrices at the smallest option: what smoothing prepares for."""
    body, tables = dict.fromkeys(body_matrices(weights), BLOCK4), dict.fromkeys(table_matrices(weights), BLOCK4)
    return Recipe("mixed", {**body, **tables, POSITION_TABLE: FLOAT32})


def measure_options(
    weights: Gpt2Weights,
    activations: Sequence[Activation],
    calibration: npt.NDArray[np.int64],
    judged: npt.NDArray[np.int64],
) -> Options:
    """Measure what every option of every matrix costs.

    Args:
        weights: smoothed for `base_recipe`.
        activations: of every layer's MLP.
        calibration: text (R, T) for GPTQ.
        judged: other text (R, T), on which the divergence is measured.
    """
    forward = Gpt2Forward(weights, activations)
    streams = [forward.embed(judged)]  # what enters each layer
    for index, layer in enumerate(weights.layers):
        streams.append(forward.layer(index, layer, streams[-1]))
    source = forward.log_probabilities(forward.final(streams[-1]))  # (R, T, V)

    def loss(changed: Gpt2Weights, first_layer: int, x: Tensor) -> float:
        other = Gpt2Forward(changed, activations)
        for index in range(first_layer, len(changed.layers)):
            x = other.layer(index, changed.layers[index], x)
        found = other.log_probabilities(other.final(x))
        return max(0.0, float((source.exp() * (source - found)).sum(dim=-1).mean()))

    options: dict[str, list[Option]] = {name: [] for name in [*body_matrices(weights), *table_matrices(weights)]}
    for storage in OPTIONS:
        same = Recipe("mixed", dict.fromkeys(options, storage) | _float_tables(weights))
        stored = store(weights, same, activations, calibration).stored
        for index, layer in enumerate(weights.layers):
            for field in PRODUCTS:
                linear = layer.product(field)
                other = layer.with_weight(field, as_product(stored[linear.name]))
                layers = (*weights.layers[:index], other, *weights.layers[index + 1 :])
                nats = loss(replace(weights, layers=layers), index, streams[index])
                options[linear.name].append(_option(storage, linear.weight.shape, nats))
    calibrated = forward.embed(calibration)
    for index, layer in enumerate(weights.layers):
        calibrated = forward.layer(index, layer, calibrated)
    head_inputs = forward.final(calibrated)  # (R, T, D)
    for storage in OPTIONS:
        table = store_table(weights.token_table, storage, head_inputs if weights.head is None else None).restored()
        changed = replace(weights, token_table=table)
        x = Gpt2Forward(changed, activations).embed(judged)
        options[TOKEN_TABLE].append(_option(storage, table.shape[::-1], loss(changed, 0, x), is_table=True))
        if weights.head is not None:
            head = store_table(weights.head, storage, head_inputs).restored()
            nats = loss(replace(weights, head=head), len(weights.layers), streams[-1])
            options[HEAD].append(_option(storage, head.shape[::-1], nats))
    return options


def _float_tables(weights: Gpt2Weights) -> dict[str, Storage]:
    return dict.fromkeys([*table_matrices(weights), POSITION_TABLE], FLOAT32)


def _option(storage: Storage, shape: tuple[int, ...], loss_nats: float, *, is_table: bool = False) -> Option:
    """An option of a matrix (K, N)."""
    k, n = shape
    assert storage.block_size is not None
    size = block_size_for(k, storage.block_size)
    blocks = -(-k // size)
    codes, scales = n * blocks * size * storage.bits // 8, 4 * n * blocks
    # Packed, every block has a sum beside its scale; a table's scales are also kept as they are, for the lookup.
    disk = stored_bytes(codes) + stored_bytes(scales)
    return Option(storage, disk, codes + (3 if is_table else 2) * scales, loss_nats)
