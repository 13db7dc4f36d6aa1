"""Measures what a bundle lost: its logits through the shipped runtime against the reference's, token by token.

Pure comparisons; `certificate.py` puts them together.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgelm.bundle.certificate import Quality
from edgelm.bundle.manifest import Precision
from edgelm.engine.session import Session
from edgelm.ids import Logits
from edgelm.scoring.comparison import Comparison

PERPLEXITY_GATES: dict[Precision, float] = {
    "fp32": 1.001,
    "fp16": 1.01,
    "int8": 1.01,
    "w8a8": 1.01,
    "int4": 1.05,
    "int4-small": 1.05,
    "mixed": 1.05,
}
FP32_LOGIT_GATE = 1e-3
GREEDY_PROMPTS = 8
GREEDY_TOKENS = 64


@dataclass(frozen=True)
class Greedy:
    """How long greedy texts of the bundle stay those of the source, over several prompts."""

    tokens_equal: int
    tokens_compared: int
    first_divergence: int | None
    """Equal tokens of the text that differs first; None where none differs."""


def count_equal_greedy(
    reference: Callable[[npt.NDArray[np.int64]], Logits],
    session: Session,
    texts: Sequence[npt.NDArray[np.int64]],
    new_tokens: int = GREEDY_TOKENS,
) -> Greedy:
    """Greedy tokens of the bundle that the reference would have chosen too, before the first that differs.

    Each text's first quarter, 16 tokens at most, is the prompt.
    """
    equal = compared = 0
    divergences: list[int] = []
    for ids in texts:
        prompt = ids[: max(1, min(16, len(ids) // 4))]
        session.reset()
        logits = session.step(prompt)
        tokens: list[int] = []
        for _ in range(min(new_tokens, session.context_length - len(prompt) + 1)):
            tokens.append(int(logits.argmax()))
            if session.position == session.context_length:
                break
            logits = session.step([tokens[-1]])
        # Feeding the bundle's own choices: the reference agrees up to a token exactly if its argmax is that token.
        wanted = reference(np.concatenate([prompt, tokens[:-1]]).astype(np.int64)).argmax(axis=1)[len(prompt) - 1 :]
        differs = np.flatnonzero(wanted != np.array(tokens))
        equal += int(differs[0]) if len(differs) else len(tokens)
        compared += len(tokens)
        divergences += [int(at) for at in differs[:1]]
    session.reset()
    return Greedy(equal, compared, min(divergences, default=None))


def quality(text: str, measured: Comparison, greedy: Greedy) -> Quality:
    """A measurement on `text`, as the manifest states it."""
    return Quality(
        text=text,
        tokens=measured.tokens,
        source_perplexity=math.exp(measured.source_nats / measured.tokens),
        bundle_perplexity=math.exp(measured.bundle_nats / measured.tokens),
        perplexity_ratio=math.exp((measured.bundle_nats - measured.source_nats) / measured.tokens),
        mean_kl_divergence=measured.kl_nats / measured.tokens,
        top1_agreement=measured.same_top1 / measured.tokens,
        max_abs_logit_difference=measured.max_abs_logit_difference,
        greedy_tokens_equal=greedy.tokens_equal,
        greedy_tokens_compared=greedy.tokens_compared,
        greedy_first_divergence=greedy.first_divergence,
    )


def judge(precision: Precision, drawn: Quality, limit: float | None = None) -> tuple[str, bool]:
    """A gate in words, and whether the bundle passes it on the text drawn from the source.

    Args:
        limit: of the perplexity ratio; None for the recipe's own gate.
    """
    if precision == "fp32":
        same = drawn.greedy_tokens_equal == drawn.greedy_tokens_compared
        gate = f"max |logit difference| <= {FP32_LOGIT_GATE} and the same greedy tokens"
        return gate, drawn.max_abs_logit_difference <= FP32_LOGIT_GATE and same
    limit = limit or PERPLEXITY_GATES[precision]
    return f"perplexity ratio <= {limit}", drawn.perplexity_ratio <= limit
