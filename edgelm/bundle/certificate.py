"""The quality certificate in a manifest: what a bundle lost, what it costs, and how to measure that again."""

from dataclasses import dataclass
from typing import Annotated

from edgelm.bundle.strict_json import Between, Bytes, Count


@dataclass(frozen=True, slots=True)
class Quality:
    """What the bundle lost on one text: both models computed the same tokens, the bundle through this runtime."""

    text: str
    tokens: Count
    source_perplexity: Annotated[float, Between(1, 1e12)]
    bundle_perplexity: Annotated[float, Between(1, 1e12)]
    perplexity_ratio: Annotated[float, Between(0, 1e12)]
    mean_kl_divergence: Annotated[float, Between(-1e-3, 1e6)]
    """Mean of KL(source || bundle) over all positions, in nats."""
    top1_agreement: Annotated[float, Between(0, 1)]
    max_abs_logit_difference: Annotated[float, Between(0, 1e9)]
    greedy_tokens_equal: Annotated[int, Between(0, 2**31)]
    """Number of equal greedy tokens. Several prompts are continued, each up to its first difference."""
    greedy_tokens_compared: Annotated[int, Between(0, 2**31)]
    greedy_first_divergence: Annotated[int, Between(0, 2**31)] | None
    """Number of equal tokens before the earliest difference of any prompt; None where every greedy text is equal."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Speed and memory of a separate process on the machine that made the bundle. Other machines differ."""

    cpu: str
    system: str
    onnxruntime: str
    threads: Annotated[int, Between(1, 1024)]
    prompt_tokens: Count
    new_tokens: Count
    prefill_tokens_per_second: Annotated[float, Between(0, 1e9)]
    decode_tokens_per_second: Annotated[float, Between(0, 1e9)]
    peak_rss_bytes: Bytes


@dataclass(frozen=True, slots=True)
class Reference:
    """The reference file, and what the export measured on its tokens. Any machine can measure them again."""

    file: str
    tokens: Annotated[int, Between(2, 2**20)]
    row_tokens: Annotated[int, Between(2, 2**20)]
    """Tokens of each row. The last row may be shorter."""
    top_count: Annotated[int, Between(1, 64)]
    source_perplexity: Annotated[float, Between(1, 1e12)]
    perplexity_ratio: Annotated[float, Between(0, 1e12)]
    mean_kl_divergence: Annotated[float, Between(-1e-2, 1e6)]
    """Over the source's top tokens, and all remaining tokens taken as one."""
    top1_agreement: Annotated[float, Between(0, 1)]
    value_noise: Annotated[float, Between(0, 1)]
    """How far two correct machines may be apart: the root mean square difference, in nats, between the stored
    log-probabilities and those of the same tokens fed one by one, which uses other kernels."""
    mean_noise: Annotated[float, Between(0, 1)]
    """Like `value_noise`, for the mean log-probabilities."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """What the bundle lost against its source, and how to measure that again."""

    texts: tuple[Quality, ...]
    """First the text drawn from the source itself, then the text of every ``--eval-text``."""
    gate: str
    passed: bool
    weights_bytes: Bytes
    """Size of the graph and its weights file."""
    source_weights_bytes: Bytes
    """Size of the source's parameters as 32-bit floats."""
    footprint: Footprint
    reference: Reference

    @property
    def drawn(self) -> Quality:
        """The quality on the text drawn from the source itself. The gate judges this text."""
        return self.texts[0]
