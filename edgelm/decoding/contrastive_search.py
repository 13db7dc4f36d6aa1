"""Contrastive search (Su et al., arXiv 2202.06417), as transformers 4.55.4 does it.

Of the likeliest `top_k` tokens it takes one that is likely and whose hidden state is unlike those of the text so far.

Shapes: K candidates, T tokens so far, D hidden size, V vocabulary.
"""

from collections.abc import Iterator

import numpy as np

from edgelm.decoding.request import DecodingSession, Request, Step
from edgelm.decoding.sampling import largest
from edgelm.ids import Hidden


def contrastive_search(session: DecodingSession, request: Request) -> Iterator[Step]:
    """The steps of the one text that contrastive search finds; all candidates for a place run as one batch.

    `session` is empty; the configuration has `penalty_alpha` and `top_k`. Raises DeviceError and ConfigError as
    `Request.processed`.
    """
    config, prompt_tokens, alpha = request.config, len(request.prompt), np.float32(request.config.penalty_alpha or 0)
    candidates = min(config.top_k or 1, request.vocab_size)
    pieces = request.in_pieces(session.step_hidden, request.prompt)
    if pieces is None:
        yield Step(None, "cancelled")
        return
    logits, hidden = pieces[-1][0], np.concatenate([part for _, part in pieces])  # (V,), (T, D)
    text = request.text_buffer()[0]
    directions = np.empty((len(text), hidden.shape[1]), np.float32)
    directions[:prompt_tokens] = _directions(hidden)
    batch = session.batch(candidates, min(len(text), session.context_length)) if request.new_token_limit else None
    for count in range(request.new_token_limit):
        reason = request.interruption
        if reason == "cancelled" or (count and reason is not None):
            yield Step(None, reason)
            return
        end = prompt_tokens + count
        row = request.processed(text[:end], logits)
        weights = np.exp(row - row.max())
        tokens = largest(row, candidates)  # (K,)
        probabilities = weights[tokens] / np.float32(weights.sum(dtype=np.float64))
        if end < session.context_length:
            assert batch is not None
            all_logits, all_hidden = batch.step_hidden(tokens)  # (K, V), (K, D)
            new_directions = _directions(all_hidden)
            likeness = (directions[:end] @ new_directions.T).max(axis=0)  # (K,)
            scores = (1 - alpha) * probabilities - alpha * likeness
            scores[probabilities == 0] = -np.inf  # tokens that the processors ruled out
            winner = int(np.argmax(scores))
            batch.reorder([winner] * candidates)
            logits, directions[end] = all_logits[winner].copy(), new_directions[winner]
        else:  # the last token that the context takes is never fed, so there is nothing to compare
            winner = 0
        token = int(tokens[winner])
        if token in config.eos_token_id:
            yield Step(None, "eos")
            return
        text[end] = token
        yield Step(token, None)
    yield Step(None, request.limit_reason)


def _directions(hidden: Hidden) -> Hidden:
    """Hidden states (N, D), each scaled to length 1."""
    result: Hidden = hidden / np.linalg.norm(hidden, axis=1, keepdims=True)
    return result
