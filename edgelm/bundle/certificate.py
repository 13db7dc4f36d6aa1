"""The certificate in a manifest: what a bundle lost, what it costs, and the means to measure that again."""

from dataclasses import dataclass
from typing import Annotated

from edgelm.bundle.strict_json import Between, Bytes, Count


@dataclass(frozen=True, slots=True)
class Quality:
    """What the bundle lost on one text, measured against the source on the same tokens through the shipped runtime."""

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
    """Over several prompts, each up to its first difference."""
    greedy_tokens_compared: Annotated[int, Between(0, 2**31)]
    greedy_first_divergence: Annotated[int, Between(0, 2**31)] | None
    """Equal tokens of the prompt whose greedy text differs first; None where none differs."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Speed and memory on the machine that made the bundle, in a process of its own. Another machine differs."""

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
    """The file that lets anybody measure the bundle again, and what the export measured on its tokens."""

    file: str
    tokens: Annotated[int, Between(2, 2**20)]
    row_tokens: Annotated[int, Between(2, 2**20)]
    """Tokens of each row; the last one may be shorter."""
    top_count: Annotated[int, Between(1, 64)]
    source_perplexity: Annotated[float, Between(1, 1e12)]
    perplexity_ratio: Annotated[float, Between(0, 1e12)]
    mean_kl_divergence: Annotated[float, Between(-1e-2, 1e6)]
    """Over the source's top tokens and the rest as one."""
    top1_agreement: Annotated[float, Between(0, 1)]
    value_noise: Annotated[float, Between(0, 1)]
    """Root mean square difference, in nats, of the stored log-probabilities when tokens are fed one by one, which
    takes other kernels: as far apart two correct machines may be."""
    mean_noise: Annotated[float, Between(0, 1)]
    """The same of the mean log-probabilities."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """What the export lost against its source, and the means to measure that again."""

    texts: tuple[Quality, ...]
    """First the text drawn from the source itself, then every --eval-text."""
    gate: str
    passed: bool
    weights_bytes: Bytes
    """Of the graph and its weights file."""
    source_weights_bytes: Bytes
    """Of the source's parameters as 32-bit floats."""
    footprint: Footprint
    reference: Reference

    @property
    def drawn(self) -> Quality:
        """On the text drawn from the source itself, which the gate judges."""
        return self.texts[0]
