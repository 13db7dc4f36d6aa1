"""Why a model went on as it did: how likely each token was, what else could have come, and where each head looked.

Shapes: L layers, A query heads, T explained tokens, P tokens before them, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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
    """The token's id."""
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
        scoring, attending = graph.session(prefix), copy.session(prefix)
        for session in (scoring, attending):
            # The last token of a prefix's text is read again: its logits say how likely the first token of `text` was.
            read = encoder.begin(session, ids, least_left=own + 1)
        predictions = predicted(scoring.score_pieces(read), read, own, top)
        attentions = joined(attending.attention_pieces(read), len(read) - own, own, everything)

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


def predicted(pieces: Iterable[Logits], ids: Sequence[int], own: int, top: int) -> list[tuple[IdLogprob, ...] | None]:
    """What `pieces`, the logits after each of `ids`, say of the last `own` ids and of what follows: T + 1 predictions.

    A prediction is the token (of what follows, the likeliest one) and then the `top` likeliest ones. It is None for a
    token that nothing precedes.
    """
    before = len(ids) - own
    predictions: list[tuple[IdLogprob, ...] | None] = [] if before else [None]
    place = 0  # of the token that the next row of logits predicts
    for logits in pieces:
        for row in logits:
            place += 1
            if place >= before:
                predictions.append(with_alternatives(row, ids[place] if place < len(ids) else int(row.argmax()), top))
    return predictions


def joined(pieces: Iterable[Attention], before: int, own: int, everything: int) -> Attention:
    """The attention of `own` tokens to `everything`, (L, A, T, P + T); `pieces` begin `before` tokens earlier."""
    whole: Attention | None = None
    at = -before
    for piece in pieces:
        if whole is None:
            whole = np.zeros((*piece.shape[:2], own, everything), np.float32)
        rows = piece[:, :, max(0, -at) :]
        start = max(0, at)
        whole[:, :, start : start + rows.shape[2], : rows.shape[3]] = rows
        at += piece.shape[2]
    assert whole is not None, "there is at least one token"
    return whole
