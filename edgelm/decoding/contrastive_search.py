"""Contrastive search (Su et al., arXiv 2202.06417), as transformers 4.55.4 does it: of the likeliest `top_k` tokens the
one wins that is likely and whose hidden state is unlike those of the text so far.

K candidates, T tokens so far, D hidden size, V vocabulary.
"""

from collections.abc import Iterator

import numpy as np

from edgelm.decoding.logits_processors import Row
from edgelm.decoding.request import DecodingSession, Request, Step
from edgelm.decoding.sampling import largest


def contrastive_search(session: DecodingSession, request: Request) -> Iterator[Step]:
    """The steps of the one row contrastive search finds; all candidates of a place run as one batch.

    Raises:
        BundleError: the bundle's graph has no hidden states.
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
    batch = session.batch(candidates, min(len(text), session.context_length)) if request.most_new_tokens else None
    for count in range(request.most_new_tokens):
        reason = request.interruption
        if reason == "cancelled" or (count and reason is not None):
            yield Step(None, reason)
            return
        end = prompt_tokens + count
        row = request.processed(text[:end], logits)
        weights = np.exp(row - row.max())
        places = largest(row, candidates)  # (K,)
        likely = weights[places] / np.float32(weights.sum(dtype=np.float64))
        if end < session.context_length:
            assert batch is not None
            all_logits, all_hidden = batch.step_hidden(places)  # (K, V), (K, D)
            found = _directions(all_hidden)
            likeness = (directions[:end] @ found.T).max(axis=0)  # (K,)
            scores = (1 - alpha) * likely - alpha * likeness
            scores[likely == 0] = -np.inf  # ruled out
            winner = int(np.argmax(scores))
            batch.reorder([winner] * candidates)
            logits, directions[end] = all_logits[winner].copy(), found[winner]
        else:  # the last token the context takes is never fed: there is nothing to compare
            winner = 0
        token = int(places[winner])
        if token in config.eos_token_id:
            yield Step(None, "eos")
            return
        text[end] = token
        yield Step(token, None)
    yield Step(None, request.last_reason)


def _directions(hidden: Row) -> Row:
    """Hidden states (N, D), each of length 1."""
    result: Row = hidden / np.linalg.norm(hidden, axis=1, keepdims=True)
    return result
