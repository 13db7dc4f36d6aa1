"""A recipe for a budget: chooses the bits of every matrix, so that the bundle fits and loses least.

One matrix at a time is stored in each possible way, and the mean KL divergence from the source is measured on text that
the source drew. On such text the expected logarithm of the perplexity ratio is that divergence, and the divergences of
small errors add up. A plan therefore chooses one option per matrix: it begins with the smallest options, and takes the
step that saves the most nats per byte, again and again.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from edgelm.errors import ExportError
from edgelm.ids import IdArray
from edgelm_export.model.decoder import PRODUCTS, DecoderWeights
from edgelm_export.model.forward import DecoderForward
from edgelm_export.quantize.calibrate import as_product, store, store_table
from edgelm_export.quantize.recipe import BLOCK4, BLOCK4_FINE, BLOCK8, StorageRecipe, uniform_storage
from edgelm_export.quantize.storage import FLOAT32, Storage, block_size_for, stored_bytes

OPTIONS = (BLOCK4, BLOCK4_FINE, BLOCK8)
"""The ways to store a matrix, the smallest first."""
MARGIN = 0.9
"""Share of a perplexity limit that a plan uses, because it is judged on different text than it was made on."""


@dataclass(frozen=True)
class Budget:
    """Limits of a bundle; None where there is no limit."""

    max_disk_bytes: int | None = None
    max_ram_bytes: int | None = None
    """Memory of a process in which one text fills the context."""
    max_perplexity_ratio: float | None = None
    """Perplexity of the bundle, divided by that of the source."""


def check_budget(budget: Budget, disk_bytes: int, peak_rss_bytes: int) -> None:
    """Compare a finished bundle with its budget.

    Raises:
        ExportError: the bundle is larger, or was measured to need more memory.
    """
    disk = ("takes", disk_bytes, budget.max_disk_bytes)
    memory = ("was measured to need a memory of", peak_rss_bytes, budget.max_ram_bytes)
    for verb, measured, limit in (disk, memory):
        if limit is not None and measured > limit:
            raise ExportError(
                f"the bundle {verb} {measured / 1e6:.1f} MB, more than the {limit / 1e6:.1f} MB allowed, because the "
                f"forecast was too low; nothing was written; set the limit to "
                f"{limit / 1e6 - 1.1 * (measured - limit) / 1e6:.1f} MB"
            )


@dataclass(frozen=True)
class Option:
    """One way to store one matrix."""

    storage: Storage
    disk_bytes: int
    ram_bytes: int
    """Memory of the packed form, with which the kernels compute."""
    loss_nats: float
    """Mean KL divergence from the source where only this matrix is stored in this way."""


Options = Mapping[str, Sequence[Option]]
"""The options of each matrix by its name, the smallest first."""


def plan(options: Options, disk_bytes: float, ram_bytes: float, loss_nats: float) -> dict[str, Option]:
    """Choose an option for every matrix, so that all matrices together take at most `disk_bytes` and `ram_bytes`.

    The total loss becomes as small as these limits allow. The choice stops at a total of `loss_nats`, because a smaller
    loss is not worth its bytes.

    Raises:
        ExportError: even the smallest options do not fit.
    """
    chosen = {name: choices[0] for name, choices in options.items()}
    disk, ram = sum(o.disk_bytes for o in chosen.values()), sum(o.ram_bytes for o in chosen.values())
    if disk > disk_bytes or ram > ram_bytes:
        place, need, limit = ("disk", disk, disk_bytes) if disk > disk_bytes else ("memory", ram, ram_bytes)
        raise ExportError(
            f"the weights need at least {need / 1e6:.1f} MB of {place}, but the budget leaves "
            f"{max(limit, 0) / 1e6:.1f} MB for them: raise the limit or take a smaller model"
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


def check_smallest(weights: DecoderWeights, disk_bytes: float, ram_bytes: float) -> None:
    """Refuse, as `plan` does, a budget that not even the smallest options fit, before anything is measured."""
    smallest = {linear.name: [_option(OPTIONS[0], linear.weight.shape, 0.0)] for linear in weights.products}
    for table in weights.tables:
        smallest[table.name] = [_option(OPTIONS[0], table.weight.shape[::-1], 0.0, table is weights.token_table)]
    plan(smallest, disk_bytes, ram_bytes, 0.0)


def mixed_recipe(chosen: Mapping[str, Option]) -> StorageRecipe:
    """The recipe of a plan."""
    return StorageRecipe("mixed", {name: option.storage for name, option in chosen.items()})


def given_up(chosen: Mapping[str, Option]) -> str:
    """One line that says how many matrices got which bits, what that costs, and which matrix costs most."""
    counts = Counter(f"{o.storage.bits} bits in blocks of {o.storage.block_size}" for o in chosen.values())
    worst = max(chosen, key=lambda name: chosen[name].loss_nats)
    ratio = math.exp(sum(option.loss_nats for option in chosen.values()))
    kinds = ", ".join(f"{count} at {kind}" for kind, count in sorted(counts.items()))
    return (
        f"of {len(chosen)} matrices {kinds}; expected perplexity x {ratio:.4f}; "
        f"{worst} costs most, {chosen[worst].loss_nats:.4f} nats at {chosen[worst].storage.bits} bits"
    )


def base_recipe(weights: DecoderWeights) -> StorageRecipe:
    """The recipe that smoothing prepares for: all matrices at the smallest option."""
    return StorageRecipe("mixed", uniform_storage(weights, BLOCK4, BLOCK4))


def measure_options(weights: DecoderWeights, calibration: IdArray, judged: IdArray) -> Options:
    """Measure what every option of every matrix costs.

    Args:
        weights: smoothed for `base_recipe`.
        calibration: text for GPTQ, (R, T).
        judged: different text, on which the divergence is measured, (R, T).
    """
    forward = DecoderForward(weights)
    streams = [forward.embed(judged)]  # the residual stream (R, T, D) that enters each layer, and the last layer's
    for layer in weights.layers:
        streams.append(forward.layer(layer, streams[-1]))
    source = forward.log_probabilities(forward.final(streams[-1]))  # (R, T, V)

    def loss(changed: DecoderWeights, first_layer: int, x: Tensor) -> float:
        """The mean divergence of `changed`, where `x` (R, T, D) enters its layer `first_layer`."""
        candidate = DecoderForward(changed)
        for layer in changed.layers[first_layer:]:
            x = candidate.layer(layer, x)
        log_probabilities = candidate.log_probabilities(candidate.final(x))
        return max(0.0, float((source.exp() * (source - log_probabilities)).sum(dim=-1).mean()))

    options: dict[str, list[Option]] = {name: [] for name in base_recipe(weights).storage}
    for storage in OPTIONS:
        stored = store(weights, StorageRecipe("mixed", uniform_storage(weights, storage, FLOAT32)), calibration).stored
        for index, layer in enumerate(weights.layers):
            for field in PRODUCTS:
                linear = layer.product(field)
                layers = list(weights.layers)
                layers[index] = layer.with_weight(field, as_product(stored[linear.name]))
                nats = loss(replace(weights, layers=tuple(layers)), index, streams[index])
                options[linear.name].append(_option(storage, linear.weight.shape, nats))
    calibrated = forward.embed(calibration)
    for layer in weights.layers:
        calibrated = forward.layer(layer, calibrated)
    head_inputs = forward.into_head(forward.final(calibrated))  # (R, T, D)
    tokens, head = weights.token_table, weights.head
    for storage in OPTIONS:
        rows = store_table(tokens.weight, storage, head_inputs if head is None else None).restored()
        changed = replace(weights, token_table=replace(tokens, weight=rows))
        nats = loss(changed, 0, DecoderForward(changed).embed(judged))
        options[tokens.name].append(_option(storage, rows.shape[::-1], nats, True))
        if head is not None:
            rows = store_table(head.weight, storage, head_inputs).restored()
            nats = loss(replace(weights, head=replace(head, weight=rows)), len(weights.layers), streams[-1])
            options[head.name].append(_option(storage, rows.shape[::-1], nats))
    return options


def _option(storage: Storage, shape: tuple[int, ...], loss_nats: float, is_looked_up: bool = False) -> Option:
    """An option of a matrix (K, N): a table whose rows are looked up, or only a product."""
    k, n = shape
    assert storage.block_size is not None
    size = block_size_for(k, storage.block_size)
    blocks = -(-k // size)
    codes, scales = n * blocks * size * storage.bits // 8, 4 * n * blocks
    # In the packed form every block has a sum beside its scale. The lookup needs the scales once more, unpacked.
    ram = codes + (3 if is_looked_up else 2) * scales
    return Option(storage, stored_bytes(codes) + stored_bytes(scales), ram, loss_nats)
