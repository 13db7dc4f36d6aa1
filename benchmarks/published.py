"""Published figures of a model, and what a bundle gives for the same questions."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgelm.model import Model
from edgelm.scoring.comparison import Logits, log_softmax

Ids = npt.NDArray[np.int64]

PUBLISHED = Path(__file__).with_name("gpt2_published.json")
STRIDE = 512
"""Of the perplexity in Hugging Face's documentation, which the published figures follow."""


@dataclass(frozen=True)
class Answers:
    """What one bundle gave."""

    greedy_equal: int
    greedy_cases: int
    log_probability_error: float
    """Largest difference from a published log-probability, of a token or of a whole continuation, in nats."""
    wikitext2_perplexity: float
    wikitext2_tokens: int
    lambada_accuracy: float
    lambada_perplexity: float
    lambada_passages: int


def read_published(path: Path, name: str) -> dict[str, Any]:
    """The figures of the model `name`."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if name not in content:
        raise SystemExit(f"{path} has no figures of {name!r}, only of {', '.join(k for k in content if k != 'about')}")
    found: dict[str, Any] = content[name]
    return found


def count_greedy(model: Model, cases: Sequence[dict[str, Any]]) -> int:
    """How many published greedy texts the model gives to the last character."""
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
    """Logits (T, V) that predict `continuation` (T,) after `context`, whose beginning is cut where it does not fit."""
    session = model.session
    session.reset()
    context = context[-(session.context_length + 1 - len(continuation)) :]
    if len(context) > 2:  # no logits are wanted there; two stay, for a chunk of one has another kernel
        session.step(context[:-2])
        context = context[-2:]
    return session.score(np.concatenate([context, continuation[:-1]]))[len(context) - 1 :]


def log_probabilities(logits: Logits, continuation: Ids) -> npt.NDArray[np.float64]:
    """Of every id of `continuation` (T,) under `logits` (T, V), in nats."""
    return log_softmax(logits)[np.arange(len(continuation)), continuation]


def log_probability_error(model: Model, figures: dict[str, Any]) -> float:
    """Largest difference from the published log-probabilities, in nats; 0 where none are published."""

    def ids(text: str) -> Ids:
        return np.array(model.tokenizer.encode(text), np.int64)

    errors = [0.0]
    for case in figures["token_log_probabilities"]:
        text = ids(case["text"])
        found = log_probabilities(continuation_logits(model, ids(case["prefix"]), text), text)
        errors.append(float(np.abs(found - np.array(case["values"])).max()))
    for case in figures["continuations"]:
        text = ids(case["continuation"])
        found = log_probabilities(continuation_logits(model, ids(case["context"]), text), text)
        errors.append(abs(float(found.sum()) - case["log_likelihood"]))
    return max(errors)


def stride_perplexity(model: Model, ids: Ids, stride: int = STRIDE) -> float:
    """Perplexity of a long text by the usual stride method (huggingface.co/docs/transformers/perplexity).

    Windows of the whole context begin every `stride` tokens; each predicts what no earlier window has, with the rest
    of the window as its context.
    """
    session = model.session
    window = session.context_length
    stride = min(stride, window // 2)
    nats, predicted, done = 0.0, 0, 1  # the first token has nothing before it
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        if end <= done:
            break
        found = log_probabilities(continuation_logits(model, ids[begin:done], ids[done:end]), ids[done:end])
        nats -= float(found.sum())
        predicted, done = predicted + len(found), end
        if end == len(ids):
            break
    return math.exp(nats / predicted)


def lambada(model: Model, passages: Sequence[str]) -> tuple[float, float]:
    """Accuracy on the last word, and its perplexity a word, as lm-evaluation-harness has them."""
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
    """Everything there is a published figure for."""
    report("greedy texts and log-probabilities")
    equal, error = count_greedy(model, figures["greedy"]), log_probability_error(model, figures)
    ids = np.array(model.tokenizer.encode(wikitext2), np.int64)[:token_limit]
    report(f"WikiText-2, {len(ids):,} tokens")
    perplexity = stride_perplexity(model, ids)
    report(f"LAMBADA, {len(passages):,} passages")
    accuracy, word_perplexity = lambada(model, passages)
    return Answers(equal, len(figures["greedy"]), error, perplexity, len(ids), accuracy, word_perplexity, len(passages))
