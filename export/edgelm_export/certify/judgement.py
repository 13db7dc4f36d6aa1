"""Compares a bundle with its source, token by token, and judges the comparison; `certificate.py` puts it together."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edgelm.bundle.certificate import Quality
from edgelm.bundle.manifest import Precision
from edgelm.engine.session import Session
from edgelm.ids import IdArray, Logits
from edgelm.scoring.comparison import Comparison

SourceLogits = Callable[[IdArray], Logits]
"""Computes the source's logits (T, V) of a text (T,)."""

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
    """How many greedy tokens of a bundle its source would have chosen too, over several prompts."""

    tokens_equal: int
    tokens_compared: int
    first_divergence: int | None
    """Number of equal tokens in the text that differs first; None where all texts are equal."""


def count_equal_greedy(source: SourceLogits, session: Session, texts: Sequence[IdArray]) -> Greedy:
    """Count the greedy tokens of a bundle that its source would have chosen too, up to the first different token.

    The first quarter of each text, at most 16 tokens, is a prompt. `GREEDY_TOKENS` tokens are compared after it, fewer
    where the context ends.
    """
    equal = compared = 0
    divergences: list[int] = []
    for ids in texts:
        prompt = ids[: max(1, min(16, len(ids) // 4))]
        session.reset()
        logits = session.step(prompt)
        tokens: list[int] = []
        for _ in range(min(GREEDY_TOKENS, session.context_length - len(prompt) + 1)):
            tokens.append(int(logits.argmax()))
            if session.position == session.context_length:
                break
            logits = session.step([tokens[-1]])
        # The source reads the bundle's choices: it agrees with a token exactly if its argmax is that token.
        expected = source(np.concatenate([prompt, tokens[:-1]]).astype(np.int64)).argmax(axis=1)[len(prompt) - 1 :]
        differs = np.flatnonzero(expected != np.array(tokens))
        equal += int(differs[0]) if len(differs) else len(tokens)
        compared += len(tokens)
        divergences += [int(at) for at in differs[:1]]
    session.reset()
    return Greedy(equal, compared, min(divergences, default=None))


def quality(text: str, measured: Comparison, greedy: Greedy) -> Quality:
    """The measurements on the text called `text`, as the manifest states them."""
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
    """A quality gate in words, and whether the bundle passes it.

    Args:
        precision: name of the bundle's recipe.
        drawn: measured on the text drawn from the source.
        limit: maximum of the perplexity ratio; None for the recipe's own gate.
    """
    if precision == "fp32":
        is_same_text = drawn.greedy_tokens_equal == drawn.greedy_tokens_compared
        gate = f"max |logit difference| <= {FP32_LOGIT_GATE} and the same greedy tokens"
        return gate, drawn.max_abs_logit_difference <= FP32_LOGIT_GATE and is_same_text
    limit = limit or PERPLEXITY_GATES[precision]
    return f"perplexity ratio <= {limit}", drawn.perplexity_ratio <= limit
