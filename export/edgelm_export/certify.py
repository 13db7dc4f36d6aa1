"""Measures what a bundle lost: its logits through the shipped runtime against the reference's, token by token."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgelm.manifest import Certificate, Precision
from edgelm.session import Session

Logits = npt.NDArray[np.float32]

PERPLEXITY_GATES: dict[Precision, float] = {"fp32": 1.001, "fp16": 1.01, "int8": 1.01, "int4": 1.05, "mixed": 1.05}
FP32_LOGIT_GATE = 1e-3
GREEDY_PROMPTS = 8
GREEDY_TOKENS = 64


@dataclass(frozen=True)
class Comparison:
    """Sums over predicted tokens of one text or many."""

    tokens: int = 0
    source_nats: float = 0.0
    bundle_nats: float = 0.0
    kl_nats: float = 0.0
    same_top1: int = 0
    max_abs_logit_difference: float = 0.0

    def __add__(self, other: "Comparison") -> "Comparison":
        return Comparison(
            self.tokens + other.tokens,
            self.source_nats + other.source_nats,
            self.bundle_nats + other.bundle_nats,
            self.kl_nats + other.kl_nats,
            self.same_top1 + other.same_top1,
            max(self.max_abs_logit_difference, other.max_abs_logit_difference),
        )


def compare_logits(source: Logits, bundle: Logits, targets: npt.NDArray[np.int64]) -> Comparison:
    """Compare two models' logits (T, V) where token t predicts `targets[t]` (T,)."""
    source_log, bundle_log = _log_softmax(source), _log_softmax(bundle)  # (T, V)
    rows = np.arange(len(targets))
    return Comparison(
        tokens=len(targets),
        source_nats=-float(source_log[rows, targets].sum()),
        bundle_nats=-float(bundle_log[rows, targets].sum()),
        kl_nats=float((np.exp(source_log) * (source_log - bundle_log)).sum()),
        same_top1=int((source.argmax(axis=1) == bundle.argmax(axis=1)).sum()),
        max_abs_logit_difference=float(np.abs(source - bundle).max()),
    )


def compare_texts(
    reference: Callable[[npt.NDArray[np.int64]], Logits],
    session: Session,
    texts: Sequence[npt.NDArray[np.int64]],
    progress: Callable[[float], None] = lambda share: None,
) -> Comparison:
    """Compare `reference` (ids (T,) to logits (T, V)) with the bundle's `session` over whole texts."""
    total = Comparison()
    for done, ids in enumerate(texts):
        session.reset()
        source, bundle = reference(ids), session.score(ids)  # (T, V)
        for start in range(0, len(ids) - 1, 64):  # in slices: float64 copies of (T, V) are large
            part = slice(start, min(start + 64, len(ids) - 1))
            total += compare_logits(source[part], bundle[part], ids[part.start + 1 : part.stop + 1])
        progress((done + 1) / len(texts))
    session.reset()
    return total


def count_equal_greedy(
    reference: Callable[[npt.NDArray[np.int64]], Logits],
    session: Session,
    texts: Sequence[npt.NDArray[np.int64]],
    new_tokens: int = GREEDY_TOKENS,
) -> tuple[int, int]:
    """Greedy tokens of the bundle that the reference would have chosen too, before the first that differs.

    Each text's first quarter, 16 tokens at most, is the prompt. Returns (equal, compared).
    """
    equal = compared = 0
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
    session.reset()
    return equal, compared


def certificate(
    precision: Precision, text: str, measured: Comparison, greedy: tuple[int, int], limit: float | None = None
) -> Certificate:
    """Judge a measurement by its recipe's gate, or by another `limit` of the perplexity ratio."""
    limit = limit or PERPLEXITY_GATES[precision]
    ratio = math.exp((measured.bundle_nats - measured.source_nats) / measured.tokens)
    gate = f"perplexity ratio <= {limit}"
    passed = ratio <= limit
    if precision == "fp32":
        gate = f"max |logit difference| <= {FP32_LOGIT_GATE} and the same greedy tokens"
        passed = measured.max_abs_logit_difference <= FP32_LOGIT_GATE and greedy[0] == greedy[1]
    return Certificate(
        text=text,
        tokens=measured.tokens,
        source_perplexity=math.exp(measured.source_nats / measured.tokens),
        bundle_perplexity=math.exp(measured.bundle_nats / measured.tokens),
        perplexity_ratio=ratio,
        mean_kl_divergence=measured.kl_nats / measured.tokens,
        top1_agreement=measured.same_top1 / measured.tokens,
        max_abs_logit_difference=measured.max_abs_logit_difference,
        greedy_tokens_equal=greedy[0],
        greedy_tokens_compared=greedy[1],
        gate=gate,
        passed=passed,
    )


def _log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    totals: npt.NDArray[np.float64] = np.exp(shifted).sum(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(totals), np.float64)
