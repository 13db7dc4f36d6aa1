"""Scores of token ids, computed with a session. This module knows no text.

Shapes: T tokens, V vocabulary, D hidden size.
"""

import math
import sys
from collections.abc import Callable, Sequence
from typing import Protocol, get_args

import numpy as np
import numpy.typing as npt

from edgelm.decoding.logprobs import BROKEN_LOGITS, IdLogprob, log_softmax, logprobs_of, with_alternatives
from edgelm.decoding.request import DecodingSession
from edgelm.errors import ConfigError, ContextError, DeviceError, PromptError, shown
from edgelm.ids import IdArray, Logits, Logprobs, prompt_chunks
from edgelm.scoring.results import Perplexity, Pooling

Ids = Sequence[int] | IdArray
Vector = npt.NDArray[np.float32]
Progress = Callable[[float], None]
"""Called with the share, from 0 to 1, of a computation that is done."""

BROKEN_STATES = (
    "the model computed NaN or infinite hidden states, which are no vector: it does not work on this device; "
    "run `edgelm verify`, or use a bundle of another precision"
)

_LOGITS_ROWS = 256
"""Logits of this many tokens are computed at once; (256, 50257) takes 51 MB. A multiple of 4, like prefill chunks."""


class ScoringSession(DecodingSession, Protocol):
    """The part of `edgelm.engine.session.Session` that scoring needs."""

    def score(self, ids: Ids) -> Logits: ...

    def reset(self) -> None: ...


def continuation_logprobs(session: ScoringSession, prompt: Ids, continuations: Sequence[Ids]) -> list[Logprobs]:
    """The log-probabilities of each continuation's tokens after `prompt`, one array (T,) per continuation.

    The prompt is computed once, in the empty `session`, which rewinds to its end for each continuation. The last token
    of a continuation is never fed, so a prompt and a continuation may together have one token more than the context.
    Raises ContextError if they have more, and DeviceError if a log-probability is NaN or infinite.
    """
    limit = session.context_length + 1
    longest = len(prompt) + max(map(len, continuations))
    if longest > limit:
        raise ContextError(
            f"prompt and continuation have {longest} tokens, but this model, with a context of "
            f"{session.context_length}, scores {limit} at most: shorten them"
        )
    logits = session.step(prompt)  # (V,)
    end = session.position
    logprobs = []
    for ids in continuations:
        session.rewind(session.position - end)
        logprobs.append(_logprobs_after(session, logits, np.asarray(ids, np.int64)))
    if not all(np.isfinite(of_tokens).all() for of_tokens in logprobs):
        raise DeviceError(BROKEN_LOGITS)
    return logprobs


def _logprobs_after(session: ScoringSession, logits: Logits, ids: IdArray) -> Logprobs:
    """Log-probabilities (T,) of `ids` (T,) after the session's tokens, whose last position gave `logits` (V,)."""
    parts = [logprobs_of(logits[None], ids[:1])]
    for start in range(0, len(ids) - 1, _LOGITS_ROWS):
        stop = min(start + _LOGITS_ROWS, len(ids) - 1)
        parts.append(logprobs_of(session.score(ids[start:stop]), ids[start + 1 : stop + 1]))
    return np.concatenate(parts)


def text_logprobs(session: ScoringSession, ids: Ids, count: int) -> list[tuple[IdLogprob, ...]]:
    """For each token of `ids` but the first: the token, then the `count` likeliest tokens at its place.

    The `session` is empty, or holds what precedes the text. Raises ContextError if the text has more than one token
    more than the context, and DeviceError if a log-probability is NaN or infinite.
    """
    if len(ids) > session.context_length + 1:
        raise ContextError(
            f"the text has {len(ids)} tokens, but this model, with a context of {session.context_length}, scores "
            f"{session.context_length + 1} at most: shorten it"
        )
    array = np.asarray(ids, np.int64)
    found, place = [], 1
    for piece in prompt_chunks(array[:-1], _LOGITS_ROWS) if len(array) > 1 else ():
        for row, token in zip(session.score(piece), array[place : place + len(piece)].tolist(), strict=True):
            found.append(with_alternatives(row, token, count))
        place += len(piece)
    return found


def option_scores(
    logprobs: Sequence[float], unconditional: Sequence[float] | None, lengths: Sequence[int] | None
) -> tuple[list[float], list[float]]:
    """Make several options comparable; returns a score and a probability for each option.

    Args:
        logprobs: log-probability of each option after the prompt, summed over its tokens, in nats.
        unconditional: log-probability of each option after a neutral prompt, in nats. The score is then the pointwise
            mutual information of option and prompt (Holtzman et al., arXiv 2104.08315).
        lengths: length of each option; scores are divided by it.
    """
    scores = np.array(logprobs, np.float64)
    if unconditional is not None:
        scores -= unconditional
    if lengths is not None:
        scores /= lengths
    return scores.tolist(), np.exp(log_softmax(scores)).tolist()


def perplexity(
    session: ScoringSession, ids: Ids, stride: int | None = None, progress: Progress = lambda share: None
) -> Perplexity:
    """The exponential of the mean negative log-probability of a text's tokens; the text may have any length.

    A window of the context's length begins every `stride` tokens. Each window counts the tokens that the previous
    window did not see. The result equals the recipe "Perplexity of fixed-length models" in transformers' documentation.
    As in that recipe, the mean over a window's n new tokens counts n - 1 times.

    The default of `stride` is half the context. A smaller stride is slower and more accurate, because every token is
    predicted from more tokens. A stride of 1 would count only the first window. `progress` is called after each window
    with the share of the text that is done.

    Raises:
        PromptError: the text has fewer than two tokens.
        ConfigError: `stride` is not a whole number from 2 to the context's length.
        DeviceError: a logit is NaN or infinite, or the perplexity is larger than any float.
    """
    window = session.context_length
    stride = max(2, window // 2) if stride is None else stride
    if not isinstance(stride, int) or isinstance(stride, bool) or not 2 <= stride <= window:
        limits = f"from 2 to {window}, this model's context"
        raise ConfigError(f"stride must be a whole number {limits}, got {shown(stride)}")
    if len(ids) < 2:
        raise PromptError(f"the text has {len(ids)} token, and a perplexity needs 2 at least: give a longer text")
    array = np.asarray(ids, np.int64)
    nats, tokens, seen = 0.0, 0, 0
    for begin in range(0, len(array), stride):
        end = min(begin + window, len(array))
        counted = end - seen - 1
        if counted:
            first = max(seen, begin + 1)  # no token precedes a window's first one, so nothing predicts it
            session.reset()
            logits = session.step(array[begin:first])  # (V,)
            nats -= float(_logprobs_after(session, logits, array[first:end]).mean()) * counted
            tokens += counted
        seen = end
        progress(end / len(array))
        if end == len(array):
            break
    if not nats / tokens < math.log(sys.float_info.max):
        raise DeviceError(BROKEN_LOGITS)
    return Perplexity(math.exp(nats / tokens), tokens)


def embed(session: ScoringSession, ids: Ids, pooling: Pooling = "mean", *, normalize: bool = False) -> Vector:
    """The hidden states of a text pooled into one vector, float32 (D,), which `normalize` scales to length 1.

    "mean" averages the hidden states of all tokens; "last" takes that of the last token, the only token that has seen
    the whole text.

    Raises:
        ContextError: the text is longer than the context.
        ConfigError: `pooling` is unknown, or `normalize` is neither True nor False.
        DeviceError: a hidden state is NaN or infinite.
    """
    check_name("pooling", pooling, get_args(Pooling))
    if not isinstance(normalize, bool):
        raise ConfigError(f"normalize must be True or False, got {shown(normalize)}")
    if len(ids) > session.context_length:
        raise ContextError(
            f"the text has {len(ids)} tokens, but this model's context holds {session.context_length}: shorten the text"
        )
    hidden = session.step_hidden(ids)[1].astype(np.float64)  # (T, D)
    pooled = hidden.mean(axis=0) if pooling == "mean" else hidden[-1]  # (D,)
    length = float(np.linalg.norm(pooled))
    with np.errstate(over="ignore"):
        vector = np.asarray(pooled / length if normalize and length else pooled, np.float32)
    if not np.isfinite(vector).all():
        raise DeviceError(BROKEN_STATES)
    return vector


def check_name(option: str, value: object, known: Sequence[str]) -> None:
    """Raise ConfigError if `value` is not one of the `known` names."""
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"{option} must be {', '.join(map(repr, known[:-1]))} or {known[-1]!r}, got {shown(value)}")
