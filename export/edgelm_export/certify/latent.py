"""The latent part of a draft: its file, and the reference texts on which it is measured against the source."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgelm.bundle.folder import Bundle
from edgelm.bundle.latent_facts import LatentFacts, LatentReference
from edgelm.bundle.latent_maps import (
    LatentReferenceData,
    encode_latent_reference,
    encode_numbers,
    prefix_shape,
    read_latent_maps,
)
from edgelm.bundle.manifest import Architecture, Precision
from edgelm.engine.graph import Graph
from edgelm.errors import ExportError
from edgelm.scoring.latent_scores import latent_drift, latent_figures, observe_latent
from edgelm_export.certify.judgement import PERPLEXITY_GATES
from edgelm_export.model.decoder import DecoderWeights
from edgelm_export.model.latent import LatentMaps, draw, encode, token_logprobs

MAPS_NAME, REFERENCE_NAME = "latent.bin", "latent_reference.bin"
REFERENCE_TEXTS, LONGEST_TOKENS = 16, 32
FP32_GATE = 1e-3
SHIFT_GATE = 0.25
"""Of the posteriors' means, in standard deviations: sampling moves a vector by one."""


def write_latent(
    maps: LatentMaps, weights: DecoderWeights, precision: Precision, tokens: tuple[int, int], draft: Path
) -> LatentFacts:
    """Write the maps into `draft`, in the form of the bundle's cache; returns their facts without the reference.

    Args:
        maps: of the source.
        weights: of the bundle, which smoothing may have scaled.
        precision: name of the recipe; all but fp32 store 16-bit floats where these hold the numbers.
        tokens: the token before every text, and the one that ends it.
        draft: folder of the bundle.
    """
    sizes = weights.architecture
    if maps.tokens + 8 > sizes.context_length:
        raise ExportError(f"latent vectors take {maps.tokens} tokens, which leaves no room in {sizes.context_length}")
    facts = LatentFacts(MAPS_NAME, "float32", maps.size, maps.tokens, *tokens, None)
    arrays = {
        "posterior_weight": maps.posterior.weight.numpy(),
        "posterior_bias": maps.posterior.bias.numpy(),
        "prefix_weight": _as_cached(maps.prefix.weight.numpy(), maps, weights, facts),
        "prefix_bias": _as_cached(maps.prefix.bias.numpy()[:, None], maps, weights, facts)[:, 0],
    }
    largest = max(float(np.abs(array).max()) for array in arrays.values())
    if precision != "fp32" and largest < np.finfo(np.float16).max:
        facts = replace(facts, dtype="float16")
    (draft / MAPS_NAME).write_bytes(encode_numbers(arrays, facts.dtype))
    return facts


def _as_cached(
    rows: npt.NDArray[np.float32], maps: LatentMaps, weights: DecoderWeights, facts: LatentFacts
) -> npt.NDArray[np.float32]:
    """Rows (2·L·H·N·h, C) as rows (2·L·H·N·p, C): heads padded with zeros, and values divided as smoothing did."""
    sizes: Architecture = weights.architecture
    shape = prefix_shape(facts, sizes)
    padded = np.zeros((*shape, rows.shape[1]), np.float32)
    padded[..., : maps.head_dim, :] = rows.reshape(*shape[:3], maps.head_dim, -1)
    for index, layer in enumerate(weights.layers):
        if layer.value_divisors is not None:
            padded[2 * index + 1] /= layer.value_divisors.reshape(shape[1], 1, shape[3], 1)
    return padded.reshape(-1, rows.shape[1])


def certify_latent(draft: Bundle, model: Any, maps: LatentMaps) -> LatentReference:
    """Measure the latent part of a sealed draft against its source, and write the reference texts.

    The draft must be sealed again afterwards.

    Args:
        draft: the bundle to measure.
        model: the source, a ``transformers.GPT2LMHeadModel`` in float32.
        maps: of the source.
    """
    facts, bundle_maps = read_latent_maps(draft)
    session = Graph.open(draft, device="cpu").session()
    longest = min(LONGEST_TOKENS, draft.manifest.architecture.context_length - facts.prefix_tokens)
    z = torch.randn((REFERENCE_TEXTS, facts.size), generator=torch.Generator().manual_seed(0))
    begin, end = facts.begin_token_id, facts.end_token_id
    texts = [draw(model, maps, vector, begin, end, longest, seed) for seed, vector in enumerate(z)]
    posteriors = [encode(model, maps, ids) for ids in texts]
    mean, log_variance = (np.stack([pair[place].numpy() for pair in posteriors]) for place in (0, 1))
    of_texts = [token_logprobs(model, maps, [*ids, end], vector).numpy() for ids, vector in zip(texts, z, strict=True)]
    logprobs = _padded(of_texts, longest).astype(np.float32)
    data = LatentReferenceData(
        lengths=np.array([len(ids) for ids in texts]),
        ids=_padded(texts, longest).astype(np.int64),
        z=z.numpy(),
        source_mean=mean,
        source_log_variance=log_variance,
        bundle_mean=mean,
        bundle_log_variance=log_variance,
        source_logprobs=logprobs,
        bundle_logprobs=logprobs,
    )
    observed = observe_latent(facts, bundle_maps, data, session)
    data = replace(
        data,
        bundle_mean=observed.mean,
        bundle_log_variance=observed.log_variance,
        bundle_logprobs=observed.logprobs,
    )
    noise = latent_drift(data, observe_latent(facts, bundle_maps, data, session, one_by_one=True))
    (draft.path / REFERENCE_NAME).write_bytes(encode_latent_reference(data))
    figures = latent_figures(data, observed)
    if draft.manifest.recipe.name == "fp32":
        gate = f"posteriors and log-probabilities differ by <= {FP32_GATE}"
        passed = max(figures.max_posterior_difference, figures.max_logprob_difference) <= FP32_GATE
    else:
        limit = PERPLEXITY_GATES[draft.manifest.recipe.name]
        gate = f"perplexity ratio <= {limit}, posteriors shifted by <= {SHIFT_GATE} standard deviations"
        passed = figures.perplexity_ratio <= limit and figures.posterior_shift <= SHIFT_GATE
    return LatentReference(
        file=REFERENCE_NAME,
        texts=REFERENCE_TEXTS,
        longest=longest,
        max_posterior_difference=figures.max_posterior_difference,
        posterior_shift=figures.posterior_shift,
        max_logprob_difference=figures.max_logprob_difference,
        source_perplexity=figures.source_perplexity,
        perplexity_ratio=figures.perplexity_ratio,
        posterior_noise=min(1.0, noise[0]),
        logprob_noise=min(1.0, noise[1]),
        gate=gate,
        passed=passed,
    )


def _padded(rows: Sequence[Sequence[float] | npt.NDArray[np.float64]], length: int) -> npt.NDArray[np.float64]:
    """Rows of different lengths as an array (M, `length`), with zeros behind each."""
    array = np.zeros((len(rows), length))
    for place, row in enumerate(rows):
        array[place, : len(row)] = row
    return array
