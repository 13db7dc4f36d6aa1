"""What scoring returns, value objects only, and the names of its options.

Log-probabilities are natural logarithms (nats), never above 0.
"""

from dataclasses import dataclass
from typing import Literal

LengthNormalization = Literal["none", "token", "character"]
"""What to divide an option's log-probability by."""
Pooling = Literal["mean", "last"]
"""How the hidden states of a text's tokens become one vector."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and how likely the model found it."""

    token_id: int
    text: str
    """The token alone, decoded; a piece of a character shows as U+FFFD."""
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs(TokenLogprob):
    """The same, with what else could have stood there."""

    top: tuple[TokenLogprob, ...]
    """The likeliest tokens, likeliest first; the token itself is one of them if it is that likely."""


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a text is after another; ``float()`` is its log-probability."""

    logprob: float
    """The sum over `tokens`."""
    tokens: tuple[TokenLogprob, ...]

    def __float__(self) -> float:
        return self.logprob


@dataclass(frozen=True, slots=True)
class Option:
    """One of the texts to choose from."""

    text: str
    probability: float
    """Softmax of the options' `score`: they sum to 1."""
    score: float
    """What the options are compared by: `logprob` after calibration and length normalisation."""
    logprob: float
    """Of the option after the prompt."""
    tokens: int


@dataclass(frozen=True, slots=True)
class Selection:
    """The result of `Model.choose`; ``str()`` is the text of the best option."""

    best: Option
    index: int
    """Which of the options, counted from 0."""
    options: tuple[Option, ...]
    """All of them, in the order given."""

    def __str__(self) -> str:
        return self.best.text


@dataclass(frozen=True, slots=True)
class Perplexity:
    """How surprised the model is by a text; ``float()`` is the perplexity."""

    value: float
    tokens: int
    """How many tokens count: a window's first new one does not."""

    def __float__(self) -> float:
        return self.value
