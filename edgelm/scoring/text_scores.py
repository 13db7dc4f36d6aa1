"""Scores of texts: at which token a prompt ends and its continuation begins.

A prompt and its continuation are tokenized as one text, because the model has learned from whole texts. The tokens that
this text shares with the prompt alone are the prompt; the remaining tokens are scored. A space may therefore end the
prompt or begin the continuation: both make the same text. If a token crosses the border ("un" + "happy"), the whole
token is scored. With several options, the scored tokens of all options start at the same place, so that their scores
stay comparable. Parts given as token ids are joined unchanged. A prefix precedes every prompt; its text is not scored.
"""

from collections.abc import Sequence
from typing import get_args

from edgelm.decoding.logprobs import IdLogprob
from edgelm.engine.session import Session
from edgelm.errors import ConfigError, PromptError, shown
from edgelm.ids import Logprobs, common_prefix
from edgelm.reuse.prefix import PromptEncoder
from edgelm.scoring import token_scores
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
from edgelm.scoring.token_scores import Progress, Vector, check_name, continuation_logprobs, option_scores
from edgelm.text.prompts import Prompt, prompt_ids
from edgelm.text.tokenizer import Tokenizer

MAX_TOP = 1024
"""Maximum number of likeliest tokens at a place."""


def split(encoder: PromptEncoder, prompt: Prompt, continuations: Sequence[Prompt]) -> tuple[list[int], list[list[int]]]:
    """Token ids of the prompt (prefix included) and of each continuation; no list is empty. See the module's docstring.

    Raises PromptError if a part is empty, or if a continuation leaves no token of the prompt before it.
    """
    alone = encoder.ids(prompt)
    added = [prompt_ids(encoder.tokenizer, part, "continuation", begins_text=False) for part in continuations]
    if not (isinstance(prompt, str) and all(isinstance(continuation, str) for continuation in continuations)):
        return alone, added
    wholes = [encoder.ids(f"{prompt}{continuation}") for continuation in continuations]
    shared = min(common_prefix(alone, whole) for whole in wholes)
    scored = [whole[shared:] for whole in wholes]
    if shared == 0 or not all(scored):
        raise PromptError(
            f"the prompt {prompt[-40:]!r} melts into the continuation: no token is left to begin with; "
            "give a longer prompt, or both as token ids"
        )
    return alone[:shared], scored


def score(session: Session, encoder: PromptEncoder, prompt: Prompt, continuation: Prompt) -> Score:
    """The log-probability of `continuation` after `prompt`, in all and of each token.

    Raises:
        PromptError: the prompt or the continuation is empty.
        ContextError: both together do not fit into the context.
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
    """The option that the model finds likeliest after `prompt`; of equally likely options the first.

    Args:
        length_normalization: divide an option's log-probability by nothing ("none"), or by its number of tokens or
            characters.
        calibrate: a prompt without content. Each option's log-probability after it is subtracted from the option's
            log-probability after `prompt`.

    Raises:
        PromptError: there are fewer than two options, two equal options, or an empty option.
        ContextError: the prompt and an option do not fit into the context.
        ConfigError: `length_normalization` is unknown.
    """
    check_name("length_normalization", length_normalization, get_args(LengthNormalization))
    try:
        options = [] if isinstance(options, (str, bytes)) else list(options)
    except TypeError:
        options = []
    if len(options) < 2:
        raise PromptError("there is nothing to choose: give a list of at least two options")
    context, ids = split(encoder, prompt, options)
    texts = [o if isinstance(o, str) else encoder.tokenizer.decode(i) for o, i in zip(options, ids, strict=True)]
    for text in texts:
        if texts.count(text) > 1:
            raise PromptError(f"the option {text[:40]!r} is given twice: give each once")
    sums = _sums(continuation_logprobs(session, encoder.begin(session, context), ids))
    neutral = None if calibrate is None else _sums(_logprobs(session, encoder, calibrate, options)[1])
    lengths = {"none": None, "token": [len(i) for i in ids], "character": [max(1, len(text)) for text in texts]}
    scores, probabilities = option_scores(sums, neutral, lengths[length_normalization])
    columns = zip(texts, probabilities, scores, sums, map(len, ids), strict=True)
    judged = tuple(Option(*values) for values in columns)
    index = scores.index(max(scores))
    return Selection(judged[index], index, judged)


def perplexity(
    session: Session,
    encoder: PromptEncoder,
    text: Prompt,
    stride: int | None = None,
    progress: Progress = lambda share: None,
) -> Perplexity:
    """The perplexity of `text`, of any length; see `token_scores.perplexity`. The prefix precedes each window."""
    return token_scores.perplexity(session, encoder.begin(session, encoder.ids(text, "text")), stride, progress)


def token_logprobs(session: Session, encoder: PromptEncoder, text: Prompt, top: int = 0) -> tuple[TokenLogprobs, ...]:
    """The log-probability of each token of `text` after those before it, with the `top` likeliest tokens at its place.

    Nothing precedes a text's first token, so it has none. Behind a prefix that is a text every token has one.

    Raises:
        PromptError: the text is empty.
        ContextError: the text does not fit into the context.
        ConfigError: `top` is not a whole number from 0 to 1024.
    """
    check_top(top)
    ids = encoder.ids(text, "text")
    own = len(ids) - encoder.prefix_tokens(ids)
    # The last token of a prefix's text is read again: its logits say how likely the first token of `text` is.
    read = encoder.begin(session, ids, least_left=own + 1)
    found = token_scores.text_logprobs(session, read, top)
    return tuple(named_with_alternatives(encoder.tokenizer, pairs) for pairs in found[-own:])


def check_top(top: int) -> None:
    """Raise ConfigError unless `top` is a number of likeliest tokens that is told."""
    if isinstance(top, bool) or not (isinstance(top, int) and 0 <= top <= MAX_TOP):
        raise ConfigError(f"top must be a whole number from 0 to {MAX_TOP}, got {shown(top)}")


def embed(
    session: Session, encoder: PromptEncoder, text: Prompt, pooling: Pooling = "mean", *, normalize: bool = False
) -> Vector:
    """`text`, read after the prefix, as a vector: float32 (D,); see `token_scores.embed`."""
    ids = encoder.begin(session, encoder.ids(text, "text"), least_left=1)
    return token_scores.embed(session, ids, pooling, normalize=normalize)


def named(tokenizer: Tokenizer, pair: IdLogprob) -> TokenLogprob:
    """A token id and its log-probability, with the token's text."""
    return TokenLogprob(pair[0], tokenizer.decode([pair[0]]), pair[1])


def named_with_alternatives(tokenizer: Tokenizer, pairs: Sequence[IdLogprob]) -> TokenLogprobs:
    """A token with its alternatives: `pairs` holds the token first and the alternatives after it."""
    token, *top = (named(tokenizer, pair) for pair in pairs)
    return TokenLogprobs(token.token_id, token.text, token.logprob, tuple(top))


def _logprobs(
    session: Session, encoder: PromptEncoder, prompt: Prompt, continuations: Sequence[Prompt]
) -> tuple[list[list[int]], list[Logprobs]]:
    """The token ids of each continuation and their log-probabilities, (T,) each."""
    context, ids = split(encoder, prompt, continuations)
    return ids, continuation_logprobs(session, encoder.begin(session, context), ids)


def _sums(logprobs: Sequence[Logprobs]) -> list[float]:
    return [float(of_tokens.sum()) for of_tokens in logprobs]
