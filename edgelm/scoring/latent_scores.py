"""What a latent part computes with a session: q(z|x) of a text, and p(x|z) behind a vector; and both measured again.

Shapes: T tokens, E hidden size, Z latent dimensions, M reference texts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgelm.bundle.latent_facts import LatentFacts, LatentReference
from edgelm.bundle.latent_maps import LatentMaps, LatentReferenceData, Vector
from edgelm.engine.session import Session
from edgelm.errors import ContextError, DeviceError, PromptError
from edgelm.ids import KeysValues, Logprobs
from edgelm.scoring.token_scores import BROKEN_STATES, continuation_logprobs
from edgelm.scoring.verification import FLOOR_NATS, NOISE_FACTOR, Check

POSTERIOR_FLOOR = 0.002
"""Added to the tolerance of means and log variances, for float32 sums in another order."""


def posterior(session: Session, maps: LatentMaps, ids: list[int]) -> tuple[Vector, Vector]:
    """Mean and log variance of q(z|x), float32 (Z,) each, of a text's `ids`, the token before it included.

    The session begins behind nothing from now on. Raises ContextError if the text is longer than the context, and
    DeviceError if a number is NaN or infinite.
    """
    session.begin_after(None)
    if len(ids) > session.context_length:
        raise ContextError(
            f"the text has {len(ids)} tokens with the one before it, but this model's context holds "
            f"{session.context_length}: shorten the text"
        )
    hidden = session.step_hidden(ids)[1].astype(np.float64)  # (T, E)
    return _checked_posterior(maps, hidden.mean(axis=0))


def vector_prefix(session_kv_dtype: str, maps: LatentMaps, z: Vector) -> KeysValues:
    """The keys and values of `z` (Z,), (2·layers, G, N, p), for a cache of this type.

    Raises PromptError if they do not fit into it, because the numbers of `z` are too large.
    """
    content = maps.keys_values(z)
    if not (np.abs(content) <= np.finfo(np.dtype(session_kv_dtype)).max).all():
        largest = float(np.abs(z).max())
        raise PromptError(
            f"the latent vector has numbers up to {largest:g}, which are too large for this model: those of texts are "
            "mostly between -4 and 4"
        )
    return content


def reconstruction_logprobs(session: Session, prefix: KeysValues, ids: list[int], end: int) -> Logprobs:
    """log p(x|z) of each token behind `prefix`, (T,), in nats: of `ids` but the first, and of the token `end`.

    The session begins behind `prefix` from now on. Raises as `continuation_logprobs`.
    """
    session.begin_after(prefix)
    return continuation_logprobs(session, ids[:1], [[*ids[1:], end]])[0]


@dataclass(frozen=True, slots=True)
class LatentObserved:
    """A bundle's results on the M reference texts; arrays as in `LatentReferenceData`."""

    mean: Vector
    log_variance: Vector
    logprobs: Vector


def observe_latent(
    facts: LatentFacts,
    maps: LatentMaps,
    data: LatentReferenceData,
    session: Session,
    *,
    one_by_one: bool = False,
    progress: Callable[[float], None] = lambda share: None,
) -> LatentObserved:
    """Run a bundle over its reference texts, in chunks or `one_by_one`, whose difference is the bundle's noise.

    `progress` is called with the share of the texts that is done.
    """
    mean, log_variance = np.zeros_like(data.z), np.zeros_like(data.z)
    logprobs = np.zeros_like(data.source_logprobs)
    kv_dtype = session.bundle.manifest.graph.kv_dtype
    for text in range(len(data.z)):
        ids = data.text_ids(text)
        prefix = vector_prefix(kv_dtype, maps, data.z[text])
        if one_by_one:
            session.begin_after(None)
            hidden = np.concatenate([session.step_hidden([token])[1] for token in ids]).astype(np.float64)
            mean[text], log_variance[text] = _checked_posterior(maps, hidden.mean(axis=0))
            session.begin_after(prefix)
            rows = np.stack([session.step([token]) for token in ids]).astype(np.float64)
            following = np.array([*ids[1:], facts.end_token_id])
            rows -= rows.max(axis=1, keepdims=True)
            of_tokens = rows[np.arange(len(ids)), following] - np.log(np.exp(rows).sum(axis=1))
        else:
            mean[text], log_variance[text] = posterior(session, maps, ids)
            of_tokens = reconstruction_logprobs(session, prefix, ids, facts.end_token_id)
        logprobs[text, : len(ids)] = of_tokens
        progress((text + 1) / len(data.z))
    session.begin_after(None)
    return LatentObserved(mean, log_variance, logprobs)


@dataclass(frozen=True, slots=True)
class LatentFigures:
    """How far a bundle's latent part is from its source on the reference texts; as in `LatentReference`."""

    max_posterior_difference: float
    posterior_shift: float
    max_logprob_difference: float
    source_perplexity: float
    perplexity_ratio: float


def latent_figures(data: LatentReferenceData, observed: LatentObserved) -> LatentFigures:
    """How far the `observed` bundle is from its source on the reference texts."""
    shift = observed.mean - data.source_mean
    differences = np.abs([shift, observed.log_variance - data.source_log_variance])
    tokens = int(data.lengths.sum())
    nats = -float(data.source_logprobs.sum(dtype=np.float64)) / tokens
    lost = float((data.source_logprobs - observed.logprobs).sum(dtype=np.float64)) / tokens
    return LatentFigures(
        max_posterior_difference=float(differences.max()),
        posterior_shift=float(np.sqrt(np.square(shift / np.exp(0.5 * data.source_log_variance)).mean())),
        max_logprob_difference=float(np.abs(observed.logprobs - data.source_logprobs).max()),
        source_perplexity=math.exp(min(nats, 700.0)),
        perplexity_ratio=math.exp(min(lost, 700.0)),
    )


def latent_drift(data: LatentReferenceData, observed: LatentObserved) -> tuple[float, float]:
    """Root mean square differences from the results at the export: of the posterior, and of log-probabilities."""
    posteriors = np.stack([observed.mean - data.bundle_mean, observed.log_variance - data.bundle_log_variance])
    is_token = np.arange(data.ids.shape[1]) < data.lengths[:, None]
    logprobs = (observed.logprobs - data.bundle_logprobs)[is_token]
    return float(np.sqrt(np.square(posteriors).mean())), float(np.sqrt(np.square(logprobs).mean()))


def latent_checks(facts: LatentReference, data: LatentReferenceData, observed: LatentObserved) -> list[Check]:
    """Every comparison of the latent part that `edgelm verify` makes, with its tolerance."""
    figures, (of_posterior, of_logprobs) = latent_figures(data, observed), latent_drift(data, observed)
    spread = FLOOR_NATS + 4 * facts.logprob_noise / math.sqrt(int(data.lengths.sum()))
    perplexity, ratio = facts.source_perplexity, facts.perplexity_ratio
    tolerances = NOISE_FACTOR * facts.posterior_noise + POSTERIOR_FLOOR, NOISE_FACTOR * facts.logprob_noise + FLOOR_NATS
    return [
        # The reference file and the manifest state the same figure, so only rounding may differ.
        Check("latent: source's perplexity", figures.source_perplexity, perplexity, 1e-5 * perplexity),
        Check("latent: perplexity ratio", figures.perplexity_ratio, ratio, ratio * spread),
        Check("latent: posteriors differ by", of_posterior, 0.0, tolerances[0]),
        Check("latent: log-probabilities differ by, nats", of_logprobs, 0.0, tolerances[1]),
    ]


def _checked_posterior(maps: LatentMaps, hidden: Logprobs) -> tuple[Vector, Vector]:
    mean, log_variance = maps.posterior(hidden)
    if not (np.isfinite(mean).all() and np.isfinite(log_variance).all()):
        raise DeviceError(BROKEN_STATES)
    return mean, log_variance
