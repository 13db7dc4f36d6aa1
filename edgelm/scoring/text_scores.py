"""Scores of texts: where a prompt ends and what follows it begins, in tokens.

A prompt and its continuation are tokenized as the one text they make, as the model has seen texts; the tokens that text
begins with as the prompt alone does are the prompt, the rest is what is scored. So a space may stand at the end of the
prompt or at the beginning of the continuation: it is the same text. Where a token reaches over the border ("un" +
"happy"), all of it is scored, and of several options every one from the same place on, so that they stay comparable.
What is given as token ids is joined as it is. The text of a prefix stands before every prompt; it is not scored.
"""

from collections.abc import Sequence
from typing import get_args

from edgelm.decoding.logprobs import IdLogprob, Logprobs
from edgelm.engine.session import Session
from edgelm.errors import PromptError
from edgelm.ids import common_prefix
from edgelm.reuse.prompts import PromptEncoder
from edgelm.scoring.results import (
    LengthNormalization,
    Option,
    Perplexity,
    Pooling,
    Score,
    Selection,
    TokenLogprob,
    TokenLogprobs,
)
from edgelm.scoring.token_scores import Vector, check_name, continuation_logprobs, option_scores
from edgelm.scoring.token_scores import embed as embed_ids
from edgelm.scoring.token_scores import perplexity as perplexity_of_ids
from edgelm.text.prompts import Prompt, prompt_ids
from edgelm.text.tokenizer import Tokenizer


def split(encoder: PromptEncoder, prompt: Prompt, continuations: Sequence[Prompt]) -> tuple[list[int], list[list[int]]]:
    """The token ids of the prompt, prefix included, and of each continuation, none of them empty; see above.

    Raises:
        PromptError: a part is empty, or no token of the prompt is left before a continuation.
    """
    known = encoder.ids(prompt)
    alone = [prompt_ids(encoder.tokenizer, continuation, "continuation") for continuation in continuations]
    if not (isinstance(prompt, str) and all(isinstance(continuation, str) for continuation in continuations)):
        return known, alone
    wholes = [encoder.ids(f"{prompt}{continuation}") for continuation in continuations]
    shared = min(common_prefix(known, whole) for whole in wholes)
    rests = [whole[shared:] for whole in wholes]
    if shared == 0 or not all(rests):
        raise PromptError(
            f"the prompt {prompt[-40:]!r} melts into the continuation: no token is left to begin with; "
            "give a longer prompt, or both as token ids"
        )
    return known[:shared], rests


def score(session: Session, encoder: PromptEncoder, prompt: Prompt, continuation: Prompt) -> Score:
    """How likely the model finds `continuation` after `prompt`.

    Raises:
        PromptError: either is empty.
        ContextError: both together do not fit the context.
    """
    (ids,), (logprobs,) = _logprobs(session, encoder, prompt, [continuation])
    tokens = [named(encoder.tokenizer, pair) for pair in zip(ids, logprobs.tolist(), strict=True)]
    return Score(float(logprobs.sum()), tuple(tokens))


def choose(
    session: Session,
    encoder: PromptEncoder,
    prompt: Prompt,
    options: Sequence[Prompt],
    length_normalization: LengthNormalization = "none",
    calibrate: Prompt | None = None,
) -> Selection:
    """Which of `options` the model finds likeliest after `prompt`; the first of equals.

    Args:
        length_normalization: what to divide an option's log-probability by: nothing, its tokens, its characters.
        calibrate: a prompt that says nothing about the question; what the options are worth after it is subtracted.

    Raises:
        PromptError: fewer than two options, two equal ones, or an empty one.
        ContextError: the prompt and an option do not fit the context.
        ConfigError: `length_normalization` is unknown.
    """
    check_name("length_normalization", length_normalization, get_args(LengthNormalization))
    if isinstance(options, (str, bytes)) or len(options) < 2:
        raise PromptError("there is nothing to choose: give a list of at least two options")
    before, ids = split(encoder, prompt, options)
    texts = [o if isinstance(o, str) else encoder.tokenizer.decode(i) for o, i in zip(options, ids, strict=True)]
    for text in texts:
        if texts.count(text) > 1:
            raise PromptError(f"the option {text[:40]!r} is given twice: give each once")
    sums = _sums(continuation_logprobs(session, encoder.begin(session, before), ids))
    neutral = None if calibrate is None else _sums(_logprobs(session, encoder, calibrate, options)[1])
    lengths = {"none": None, "token": [len(i) for i in ids], "character": [max(1, len(text)) for text in texts]}
    scores, probabilities = option_scores(sums, neutral, lengths[length_normalization])
    found = tuple(
        Option(text, probability, value, logprob, len(i))
        for text, probability, value, logprob, i in zip(texts, probabilities, scores, sums, ids, strict=True)
    )
    index = scores.index(max(scores))
    return Selection(found[index], index, found)


def perplexity(session: Session, encoder: PromptEncoder, text: Prompt, stride: int | None = None) -> Perplexity:
    """How surprised the model is by `text`, of any length; see `token_scores.perplexity`. Each of its windows stands
    behind the prefix."""
    return perplexity_of_ids(session, encoder.begin(session, encoder.ids(text, "text")), stride)


def embed(
    session: Session, encoder: PromptEncoder, text: Prompt, pooling: Pooling = "mean", *, normalize: bool = False
) -> Vector:
    """`text` as a vector, float32 (D,), as it is behind the prefix; see `edgelm.scoring.token_scores.embed`."""
    ids = encoder.begin(session, encoder.ids(text, "text"), least_left=1)
    return embed_ids(session, ids, pooling, normalize=normalize)


def named(tokenizer: Tokenizer, pair: IdLogprob) -> TokenLogprob:
    """A token id and its log-probability, with the token's text."""
    return TokenLogprob(pair[0], tokenizer.decode([pair[0]]), pair[1])


def named_with_alternatives(tokenizer: Tokenizer, pairs: Sequence[IdLogprob]) -> TokenLogprobs:
    """The same for a token and, after it, its alternatives."""
    token, *top = (named(tokenizer, pair) for pair in pairs)
    return TokenLogprobs(token.token_id, token.text, token.logprob, tuple(top))


def _logprobs(
    session: Session, encoder: PromptEncoder, prompt: Prompt, continuations: Sequence[Prompt]
) -> tuple[list[list[int]], list[Logprobs]]:
    """The token ids of each continuation and their log-probabilities, (T,) each."""
    before, ids = split(encoder, prompt, continuations)
    return ids, continuation_logprobs(session, encoder.begin(session, before), ids)


def _sums(logprobs: Sequence[Logprobs]) -> list[float]:
    return [float(found.sum()) for found in logprobs]
