"""Published figures of a model, and a bundle's figures for the same questions."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgelm.decoding.logprobs import log_softmax
from edgelm.ids import Logits
from edgelm.model import Model

Ids = npt.NDArray[np.int64]

PUBLISHED = Path(__file__).with_name("gpt2_published.json")
STRIDE = 512
"""Stride of the perplexity in Hugging Face's documentation, in tokens. The published figures follow it."""


@dataclass(frozen=True)
class Answers:
    """The figures of one bundle."""

    greedy_equal: int
    greedy_cases: int
    log_probability_error: float
    """Largest difference from a published log-probability of a token or of a whole continuation, in nats."""
    wikitext2_perplexity: float
    wikitext2_tokens: int
    lambada_accuracy: float
    lambada_perplexity: float
    lambada_passages: int


def read_published(path: Path, name: str) -> dict[str, Any]:
    """The published figures of the model `name`.

    Raises:
        SystemExit: the file has no figures of this model.
    """
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if name not in content:
        raise SystemExit(f"{path} has no figures of {name!r}, only of {', '.join(k for k in content if k != 'about')}")
    figures: dict[str, Any] = content[name]
    return figures


def count_greedy(model: Model, cases: Sequence[dict[str, Any]]) -> int:
    """Number of published greedy texts that the model reproduces to the last character."""
    equal = 0
    for case in cases:
        prompt = case.get("prompt_ids") or model.tokenizer.encode(case["prompt"])
        new_tokens = case.get("max_new_tokens") or case["max_length"] - len(prompt)
        stop = case.get("stop_strings", ())
        text = model.generate(
            prompt, max_new_tokens=new_tokens, do_sample=False, stop_strings=stop, eos_token_id=()
        ).text
        equal += case.get("prompt", model.tokenizer.decode(prompt)) + text == case["output"]
    return equal


def continuation_logits(model: Model, context: Ids, continuation: Ids) -> Logits:
    """Logits that predict a continuation.

    Args:
        model: the loaded bundle.
        context: token ids that precede the continuation; its beginning is cut off where the window is too short.
        continuation: token ids (T,) to predict.

    Returns:
        Logits (T, V).
    """
    session = model.session
    session.reset()
    context = context[-(session.context_length + 1 - len(continuation)) :]
    if len(context) > 2:  # no logits are needed there; two tokens stay, because a chunk of one has another kernel
        session.step(context[:-2])
        context = context[-2:]
    return session.score(np.concatenate([context, continuation[:-1]]))[len(context) - 1 :]


def log_probabilities(logits: Logits, continuation: Ids) -> npt.NDArray[np.float64]:
    """Log-probability of every id of `continuation` (T,) under `logits` (T, V), in nats."""
    return log_softmax(logits)[np.arange(len(continuation)), continuation]


def log_probability_error(model: Model, figures: dict[str, Any]) -> float:
    """Largest difference from the published log-probabilities, in nats; 0 where no log-probability is published."""

    def ids(text: str) -> Ids:
        return np.array(model.tokenizer.encode(text), np.int64)

    errors = [0.0]
    for case in figures["token_log_probabilities"]:
        text = ids(case["text"])
        values = log_probabilities(continuation_logits(model, ids(case["prefix"]), text), text)
        errors.append(float(np.abs(values - np.array(case["values"])).max()))
    for case in figures["continuations"]:
        text = ids(case["continuation"])
        values = log_probabilities(continuation_logits(model, ids(case["context"]), text), text)
        errors.append(abs(float(values.sum()) - case["log_likelihood"]))
    return max(errors)


def stride_perplexity(model: Model, ids: Ids, stride: int = STRIDE) -> float:
    """Perplexity of a long text by the usual stride method (huggingface.co/docs/transformers/perplexity).

    A window of the whole context begins every `stride` tokens. Each window predicts the tokens that no earlier window
    has predicted; the tokens before those are their context.
    """
    session = model.session
    window = session.context_length
    stride = min(stride, window // 2)
    nats, predicted, done = 0.0, 0, 1  # the first token has no context
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        if end <= done:
            break
        values = log_probabilities(continuation_logits(model, ids[begin:done], ids[done:end]), ids[done:end])
        nats -= float(values.sum())
        predicted, done = predicted + len(values), end
        if end == len(ids):
            break
    return math.exp(nats / predicted)


def lambada(model: Model, passages: Sequence[str]) -> tuple[float, float]:
    """Accuracy on the last word of each passage, and perplexity per word, as lm-evaluation-harness defines them."""
    right, nats = 0, 0.0
    for passage in passages:
        context, _, last = passage.rpartition(" ")
        pair = [np.array(model.tokenizer.encode(text), np.int64) for text in (context, f" {last}")]
        context_ids, word = pair
        logits = continuation_logits(model, context_ids, word)
        right += np.array_equal(logits.argmax(axis=1), word)
        nats -= float(log_probabilities(logits, word).sum())
    return right / len(passages), math.exp(nats / len(passages))


def ask(
    model: Model,
    figures: dict[str, Any],
    wikitext2: str,
    passages: Sequence[str],
    token_limit: int | None,
    report: Callable[[str], None],
) -> Answers:
    """Compute every figure that was published for the model.

    Args:
        model: the loaded bundle.
        figures: the published figures.
        wikitext2: the test text of WikiText-2.
        passages: the passages of LAMBADA.
        token_limit: maximum number of tokens of WikiText-2; None for all.
        report: called with a line of progress.
    """
    report("greedy texts and log-probabilities")
    equal, error = count_greedy(model, figures["greedy"]), log_probability_error(model, figures)
    ids = np.array(model.tokenizer.encode(wikitext2), np.int64)[:token_limit]
    report(f"WikiText-2, {len(ids):,} tokens")
    perplexity = stride_perplexity(model, ids)
    report(f"LAMBADA, {len(passages):,} passages")
    accuracy, word_perplexity = lambada(model, passages)
    return Answers(equal, len(figures["greedy"]), error, perplexity, len(ids), accuracy, word_perplexity, len(passages))
