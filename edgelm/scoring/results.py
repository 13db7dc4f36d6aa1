"""The results of scoring, which are value objects, and the names that its options take.

Log-probabilities are natural logarithms (nats) and never above 0.
"""

from dataclasses import dataclass
from typing import Literal

LengthNormalization = Literal["none", "token", "character"]
"""What an option's log-probability is divided by."""
Pooling = Literal["mean", "last"]
"""How the hidden states of a text's tokens become one vector."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its log-probability."""

    token_id: int
    """The token's id."""
    text: str
    """The token decoded by itself; an incomplete character shows as U+FFFD."""
    logprob: float
    """Its log-probability."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs(TokenLogprob):
    """A token with the likeliest tokens at its place."""

    top: tuple[TokenLogprob, ...]
    """The likeliest tokens, likeliest first; they include the token itself if it is likely enough."""


@dataclass(frozen=True, slots=True)
class Score:
    """The log-probability of a continuation after a prompt, which ``float()`` returns."""

    logprob: float
    """The sum of the log-probabilities of `tokens`."""
    tokens: tuple[TokenLogprob, ...]
    """The tokens of the continuation."""

    def __float__(self) -> float:
        return self.logprob


@dataclass(frozen=True, slots=True)
class Option:
    """One of the texts that `Model.choose` compared."""

    text: str
    """The option's text."""
    probability: float
    """Softmax over the scores of all options: the probabilities sum to 1."""
    score: float
    """`logprob` after calibration and length normalization; the option with the highest score is the best."""
    logprob: float
    """Log-probability of the option after the prompt."""
    tokens: int
    """Number of scored tokens."""


@dataclass(frozen=True, slots=True)
class Selection:
    """The result of `Model.choose`; ``str()`` is the text of the best option."""

    best: Option
    """The likeliest `Option`; `str(selection)` is its text."""
    index: int
    """Index of the best option, counted from 0."""
    options: tuple[Option, ...]
    """All options, in the order given."""

    def __str__(self) -> str:
        return self.best.text


@dataclass(frozen=True, slots=True)
class Perplexity:
    """The perplexity of a text, which ``float()`` returns."""

    value: float
    """The perplexity; `float(perplexity)` is the same."""
    tokens: int
    """Number of tokens that count; the first new token of a window does not."""

    def __float__(self) -> float:
        return self.value
