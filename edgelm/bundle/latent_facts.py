"""What a manifest says of a bundle's latent part: the sizes of its two maps, and how to measure it again."""

from dataclasses import dataclass
from typing import Annotated, Literal

from edgelm.bundle.strict_json import Between

LATENT_FEATURE = "latent"


@dataclass(frozen=True, slots=True)
class LatentReference:
    """The file of reference texts, and what the export measured on them. Any machine can measure them again.

    Each text was drawn from the source behind a vector of its own, drawn from the prior.
    """

    file: str
    texts: Annotated[int, Between(1, 1024)]
    longest: Annotated[int, Between(2, 4096)]
    """Tokens of the longest text, the one before it included."""
    max_posterior_difference: Annotated[float, Between(0, 1e9)]
    """Largest difference of a mean or a log variance from the source's."""
    posterior_shift: Annotated[float, Between(0, 1e9)]
    """Root mean square of (mean - the source's mean) / the source's standard deviation."""
    max_logprob_difference: Annotated[float, Between(0, 1e9)]
    """Largest difference of a token's log-probability behind a vector from the source's, in nats."""
    source_perplexity: Annotated[float, Between(1, 1e12)]
    """Of the texts behind their vectors."""
    perplexity_ratio: Annotated[float, Between(0, 1e12)]
    """The bundle's perplexity, divided by the source's."""
    posterior_noise: Annotated[float, Between(0, 1)]
    """How far two correct machines may be apart, in means and log variances: the root mean square difference between
    the stored ones and those of the same tokens fed one by one, which uses other kernels."""
    logprob_noise: Annotated[float, Between(0, 1)]
    """Like `posterior_noise`, for log-probabilities, in nats."""
    gate: str
    passed: bool


@dataclass(frozen=True, slots=True)
class LatentFacts:
    """The latent part: a map from pooled hidden states to q(z|x), and a map from z to keys and values."""

    file: str
    """The maps' numbers."""
    dtype: Literal["float32", "float16"]
    size: Annotated[int, Between(1, 4096)]
    """Z: dimensions of z."""
    prefix_tokens: Annotated[int, Between(1, 64)]
    """N: how many positions of the context the keys and values of a vector take, in every layer."""
    begin_token_id: Annotated[int, Between(0, 2**22)]
    """The token before every text, for the encoder and for the decoder."""
    end_token_id: Annotated[int, Between(0, 2**22)]
    """The token that ends a text that the decoder writes."""
    reference: LatentReference | None
