"""Why a model went on as it did: how likely each token was, what else could have come, and where each head looked.

Shapes: L layers, A query heads, T explained tokens, P tokens before them, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edgelm.bundle.manifest import Architecture
from edgelm.decoding.logprobs import IdLogprob, with_alternatives
from edgelm.engine.graph import Graph
from edgelm.errors import ContextError, PromptError
from edgelm.ids import Attention, KeysValues, Logits
from edgelm.reuse.pool import check_limit_bytes
from edgelm.reuse.prefix import PromptEncoder
from edgelm.scoring.results import TokenLogprob
from edgelm.scoring.text_scores import check_top, named
from edgelm.text.prompts import Prompt

MAX_ATTENTION_BYTES = 256 * 10**6
"""The most memory that the attention of one text may take."""


@dataclass(frozen=True, slots=True)
class ExplainedToken:
    """A token of a text, and what the model expected in its place."""

    token_id: int
    text: str
    """The token decoded by itself; an incomplete character shows as U+FFFD."""
    logprob: float | None
    """Its log-probability after the tokens before it, in nats; None where nothing precedes it."""
    top: tuple[TokenLogprob, ...]
    """The likeliest tokens in its place, likeliest first; empty where nothing precedes it."""


@dataclass(frozen=True, slots=True, eq=False)
class Explanation:
    """A text as a model saw it: the result of `Model.explain`."""

    tokens: tuple[ExplainedToken, ...]
    """The text's T tokens."""
    following: tuple[TokenLogprob, ...]
    """The likeliest tokens after the text, likeliest first."""
    attentions: Attention
    """float32 (L, A, T, P + T): of what head a of layer l takes for token t, the share that comes from each token.

    A row sums to 1, and has zeros for the tokens behind t. The first P columns are the prefix's tokens.
    """
    prefix_tokens: int
    """P: how many tokens stand before the text; 0 without a prefix."""

    @property
    def perplexity(self) -> float | None:
        """The exponential of the mean of -`logprob`; None where no token has one."""
        logprobs = [token.logprob for token in self.tokens if token.logprob is not None]
        return float(np.exp(-np.mean(logprobs))) if logprobs else None


def attention_bytes(facts: Architecture, tokens: int, all_tokens: int) -> int:
    """Memory of the attention of `tokens` tokens to `all_tokens`: a float32 for each layer, head and pair."""
    return facts.num_layers * facts.num_heads * tokens * all_tokens * 4


def explain(
    graph: Graph,
    prefix: KeysValues | None,
    encoder: PromptEncoder,
    text: Prompt,
    top: int = 5,
    max_attention_bytes: int = MAX_ATTENTION_BYTES,
) -> Explanation:
    """Explain `text` behind `prefix`, whose text `encoder` knows if it has one.

    Args:
        top: how many of the likeliest tokens to tell at each place.
        max_attention_bytes: the most memory that the attention may take; meanwhile it takes twice as much.

    Raises:
        PromptError: the text is empty, or its attention takes more than `max_attention_bytes`.
        ContextError: the text does not fit into the context.
        ConfigError: `top` is not a whole number from 0 to 1024, or `max_attention_bytes` is no number of bytes.
        DeviceError, BundleError, InsufficientMemoryError, ClosedError: as `Graph.showing_attention`.
    """
    check_top(top)
    check_limit_bytes("max_attention_bytes", max_attention_bytes)
    facts = graph.bundle.manifest.architecture
    ids = encoder.ids(text, "text")
    own, everything = len(ids) - encoder.prefix_tokens(ids), len(ids) + encoder.learned_tokens
    if everything > facts.context_length:
        size = f"{own} tokens" + (f" behind a prefix of {everything - own}" if everything > own else "")
        raise ContextError(
            f"the text has {size}, but this model's context holds {facts.context_length}: shorten the text"
        )
    needed = attention_bytes(facts, own, everything)
    if needed > max_attention_bytes:
        raise PromptError(
            f"the attention of {own:,} tokens in {facts.num_layers} layers of {facts.num_heads} heads takes "
            f"{needed / 1e6:,.0f} MB, more than {max_attention_bytes / 1e6:,.0f} MB: explain a shorter text"
        )
    with graph.showing_attention(2 * needed) as copy:  # the result, and what the graph writes
        session = copy.session(prefix)
        # The last token of a prefix's text is read again: its logits say how likely the first token of `text` was.
        read = encoder.begin(session, ids, least_left=own + 1)
        predictions, attentions = follow(session, read, own, everything, top)

    likeliest = predictions.pop()
    assert likeliest is not None, "the text precedes what follows it"
    tokens = []
    for token, prediction in zip(ids[-own:], predictions, strict=True):
        logprob = None if prediction is None else prediction[0][1]
        top_here = () if prediction is None else _named(encoder, prediction[1:])
        tokens.append(ExplainedToken(token, encoder.tokenizer.decode([token]), logprob, top_here))
    return Explanation(tuple(tokens), _named(encoder, likeliest[1:]), attentions, everything - own)


def _named(encoder: PromptEncoder, pairs: Sequence[IdLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(named(encoder.tokenizer, pair) for pair in pairs)


class AttendedSession(Protocol):
    """The part of `edgelm.engine.session.Session` that explanations need."""

    def attended_pieces(self, ids: Sequence[int]) -> Iterator[tuple[Logits, Attention]]: ...


def follow(
    session: AttendedSession, ids: Sequence[int], own: int, everything: int, top: int
) -> tuple[list[tuple[IdLogprob, ...] | None], Attention]:
    """Feed `ids` to `session`, whose last `own` tokens are the text, of `everything` tokens in its cache at the end.

    Returns T + 1 predictions and the attention (L, A, T, P + T). A prediction is that of each token and then that of
    what follows: the token (of what follows, the likeliest one) and the `top` likeliest ones. It is None for a token
    that nothing precedes.
    """
    before = len(ids) - own  # read again, and not explained
    predictions: list[tuple[IdLogprob, ...] | None] = [] if before else [None]
    attentions: Attention | None = None
    read = 0
    for logits, shares in session.attended_pieces(ids):
        for row in logits[max(0, before - 1 - read) :]:
            place = before + len(predictions)
            token = ids[place] if place < len(ids) else int(row.argmax())
            predictions.append(with_alternatives(row, token, top))
        if attentions is None:
            attentions = np.zeros((*shares.shape[:2], own, everything), np.float32)
        skipped = max(0, before - read)
        explained = shares[:, :, skipped:]
        at = read + skipped - before
        attentions[:, :, at : at + explained.shape[2], : explained.shape[3]] = explained
        read += len(logits)
    assert attentions is not None, "there is at least one token"
    return predictions, attentions
