"""Processors: pure functions that change one row of logits, float32 of shape (V,), given the token ids so far.

Meaning and order are those of transformers' logits processors where transformers has them. Every function returns a
new row, or the row itself where nothing changes; tokens that are ruled out are -inf. `ids` are the prompt and the text
so far, int64 of shape (T,).
"""

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from edgelm.decoding.generation_config import GenerationConfig, LogitsProcessor
from edgelm.errors import ConfigError
from edgelm.ids import IdArray, Logits

MASKED = np.float32(-np.inf)
DRY_LONGEST_RUN = 64
"""Maximum length of a repeated run that raises the penalty: 1.75 ** 62 is beyond any logit."""


def bias_tokens(ids: IdArray, logits: Logits, tokens: IdArray, biases: Logits) -> Logits:
    """Add `biases` (N,) to the logits of the distinct `tokens` (N,)."""
    result = logits.copy()
    result[tokens] += biases
    return result


class SequenceBias:
    """Adds a bias to a sequence's last token where the ids end with its other tokens; -inf forbids the sequence.

    As in transformers, a sequence counts only where there are at least as many ids as the sequence has tokens. `biases`
    are distinct sequences of at least one token, each with its bias.
    """

    def __init__(self, biases: Iterable[tuple[Sequence[int], float]]) -> None:
        pairs = list(biases)
        single = [(sequence[0], bias) for sequence, bias in pairs if len(sequence) == 1]
        self._tokens = np.array([token for token, _ in single], np.int64)
        self._biases = np.array([bias for _, bias in single], np.float32)
        self._longer: dict[int, list[tuple[IdArray, float]]] = {}  # by the last token but one
        for sequence, bias in pairs:
            if len(sequence) > 1:
                self._longer.setdefault(sequence[-2], []).append((np.array(sequence, np.int64), bias))

    def __call__(self, ids: IdArray, logits: Logits) -> Logits:
        result = bias_tokens(ids, logits, self._tokens, self._biases)
        for sequence, bias in self._longer.get(int(ids[-1]), ()):
            prefix = sequence[:-1]
            if len(sequence) <= len(ids) and np.array_equal(ids[-len(prefix) :], prefix):
                result[sequence[-1]] += np.float32(bias)
        return result


def penalize_repetition(ids: IdArray, logits: Logits, penalty: float) -> Logits:
    """Divide positive and multiply negative logits of the tokens in `ids` by `penalty` (CTRL, arXiv 1909.05858)."""
    result = logits.copy()
    values = result[ids]
    result[ids] = np.where(values < 0, values * np.float32(penalty), values / np.float32(penalty))
    return result


def penalize_presence_and_frequency(
    ids: IdArray, logits: Logits, presence: float, frequency: float, prompt_tokens: int
) -> Logits:
    """Subtract `presence` + count · `frequency` from the logits of tokens of the new text (OpenAI's penalties)."""
    new = ids[prompt_tokens:]
    result = logits.copy()
    np.subtract.at(result, new, np.float32(frequency))
    result[new] = result[new] - np.float32(presence)  # once, however often a token is in `new`
    return result


def dry(ids: IdArray, logits: Logits, multiplier: float, base: float, allowed_length: int, breakers: IdArray) -> Logits:
    """Penalize tokens that would lengthen a run of tokens that ends `ids` and appears earlier in `ids` too.

    The penalty is multiplier · base ** (length of the run - allowed length), for runs of the allowed length and longer.
    A run does not cross a token of `breakers` (p-e-w, github.com/oobabooga/text-generation-webui/pull/5677).
    """
    broken = np.isin(ids, breakers)
    if len(ids) < 2 or broken[-1]:
        return logits
    at = np.flatnonzero(ids[:-1] == ids[-1])  # the ends of the earlier runs; the token after each end would repeat it
    result = logits.copy()
    for length in range(1, min(DRY_LONGEST_RUN, len(ids)) + 1):
        if length >= allowed_length:
            penalty = np.float32(min(multiplier * base ** (length - allowed_length), 1e30))
            tokens = ids[at + 1]
            result[tokens] = np.minimum(result[tokens], logits[tokens] - penalty)
        at = at[at >= length]
        if len(at) == 0 or len(ids) <= length or broken[-1 - length]:
            break
        at = at[ids[at - length] == ids[-1 - length]]
        if len(at) == 0:
            break
    return result


def forbid_repeated_ngrams(ids: IdArray, logits: Logits, size: int) -> Logits:
    """Rule out tokens that would make a run of `size` tokens appear twice (Paulus et al., arXiv 1705.04304)."""
    starts = len(ids) - size + 1  # the number of complete runs
    if starts < 1:
        return logits
    same = np.ones(starts, bool)
    for offset in range(size - 1):
        same &= ids[offset : offset + starts] == ids[len(ids) - size + 1 + offset]
    return suppress(ids, logits, ids[size - 1 :][same])


def suppress(ids: IdArray, logits: Logits, tokens: IdArray) -> Logits:
    """Rule out `tokens`."""
    result = logits.copy()
    result[tokens] = MASKED
    return result


def suppress_before(ids: IdArray, logits: Logits, tokens: IdArray, length: int) -> Logits:
    """Rule out `tokens` while there are fewer than `length` ids."""
    return suppress(ids, logits, tokens) if len(ids) < length else logits


def suppress_at(ids: IdArray, logits: Logits, tokens: IdArray, length: int) -> Logits:
    """Rule out `tokens` where there are exactly `length` ids."""
    return suppress(ids, logits, tokens) if len(ids) == length else logits


def force_at(ids: IdArray, logits: Logits, tokens: IdArray, length: int) -> Logits:
    """Where there are exactly `length` ids, rule out all tokens but `tokens`, which become equally likely."""
    if len(ids) != length:
        return logits
    result = np.full_like(logits, MASKED)
    result[tokens] = 0
    return result


def hasten_end(ids: IdArray, logits: Logits, tokens: IdArray, start: int, factor: float) -> Logits:
    """After `start` ids, add |logit| · (factor ** (number of ids after `start`) - 1) to the logits of `tokens`."""
    if len(ids) <= start:
        return logits
    allowed = tokens[logits[tokens] > MASKED]
    result = logits.copy()
    result[allowed] += np.abs(logits[allowed]) * np.float32(min(factor ** float(len(ids) - start) - 1, 1e30))
    return result


def checked(ids: IdArray, logits: Logits, processor: LogitsProcessor) -> Logits:
    """The logits of a caller's processor; raises ConfigError unless they are `len(logits)` floats without NaN."""
    result = np.asarray(processor(ids.copy(), logits.copy()))
    if result.shape != logits.shape or result.dtype.kind != "f" or np.isnan(result).any():
        raise ConfigError(
            f"logits_processor must return {len(logits)} floats without NaN, "
            f"got {result.dtype} of shape {result.shape} from {getattr(processor, '__name__', processor)!r}"
        )
    return result.astype(np.float32, copy=False)


def processors_of(
    config: GenerationConfig, prompt_tokens: int, vocab_size: int, *, after_biases: Sequence[LogitsProcessor] = ()
) -> tuple[LogitsProcessor, ...]:
    """The processors that a configuration uses, in transformers' order.

    `after_biases` are more processors, at the place where transformers has the penalty between groups of beams. Raises
    ConfigError if an option names a token outside the vocabulary.
    """
    check_tokens(config, vocab_size)
    end = np.array(config.eos_token_id, np.int64)
    processors: list[LogitsProcessor] = []
    add = processors.append
    if config.logit_bias:
        biases = dict(config.logit_bias)
        add(partial(bias_tokens, tokens=np.array([*biases], np.int64), biases=np.array([*biases.values()], np.float32)))
    if config.sequence_bias:
        add(SequenceBias(dict(config.sequence_bias).items()))
    processors += after_biases
    if config.repetition_penalty != 1:
        add(partial(penalize_repetition, penalty=config.repetition_penalty))
    if config.presence_penalty or config.frequency_penalty:
        presence, frequency = config.presence_penalty, config.frequency_penalty
        penalize = partial(penalize_presence_and_frequency, presence=presence, frequency=frequency)
        add(partial(penalize, prompt_tokens=prompt_tokens))
    if config.dry_multiplier:
        ids = [breaker for breaker in config.dry_sequence_breakers if isinstance(breaker, int)]
        penalize = partial(dry, multiplier=config.dry_multiplier, base=config.dry_base)
        add(partial(penalize, allowed_length=config.dry_allowed_length, breakers=np.array(ids, np.int64)))
    if config.no_repeat_ngram_size:
        add(partial(forbid_repeated_ngrams, size=config.no_repeat_ngram_size))
    if config.bad_words_ids:
        # As in transformers, an end-of-text token is no bad word.
        forbidden = [words for words in config.bad_words_ids if len(words) > 1 or words[0] not in config.eos_token_id]
        add(SequenceBias(dict.fromkeys(forbidden, -np.inf).items()))
    if len(end) and config.min_length:
        add(partial(suppress_before, tokens=end, length=config.min_length))
    if len(end) and config.min_new_tokens:
        add(partial(suppress_before, tokens=end, length=prompt_tokens + config.min_new_tokens))
    if config.forced_bos_token_id is not None:
        add(partial(force_at, tokens=np.array([config.forced_bos_token_id], np.int64), length=1))
    if config.forced_eos_token_id:
        last = prompt_tokens + config.new_token_limit(prompt_tokens) - 1
        add(partial(force_at, tokens=np.array(config.forced_eos_token_id, np.int64), length=last))
    if len(end) and config.exponential_decay_length_penalty is not None:
        start, factor = config.exponential_decay_length_penalty
        add(partial(hasten_end, tokens=end, start=prompt_tokens + start, factor=factor))
    if config.suppress_tokens:
        add(partial(suppress, tokens=np.array(config.suppress_tokens, np.int64)))
    if config.begin_suppress_tokens:
        # A token that is forced to come first puts the beginning one place later.
        begin = prompt_tokens + (prompt_tokens == 1 and config.forced_bos_token_id is not None)
        add(partial(suppress_at, tokens=np.array(config.begin_suppress_tokens, np.int64), length=begin))
    processors += [partial(checked, processor=processor) for processor in config.logits_processor]
    return tuple(processors)


def process(
    processors: Iterable[LogitsProcessor], ids: IdArray, logits: Logits, *, may_rule_out_all: bool = False
) -> Logits:
    """The `logits` (V,) after all `processors` in turn, given the prompt and the text so far, `ids` (T,).

    Raises ConfigError if they leave no token to choose, unless `may_rule_out_all`: this ends a beam, but no text.
    """
    for processor in processors:
        logits = processor(ids, logits)
    if not may_rule_out_all and logits.max() == MASKED:
        raise ConfigError(
            f"no token is left to choose after {len(ids)} tokens: bad_words_ids, suppress_tokens, "
            "no_repeat_ngram_size, min_new_tokens and the like rule out the whole vocabulary"
        )
    return logits


def check_tokens(config: GenerationConfig, vocab_size: int) -> None:
    """Raise ConfigError, with the option's name, if an option has a token id outside the vocabulary."""
    named: dict[str, Iterable[Any]] = {
        "eos_token_id": config.eos_token_id,
        "suppress_tokens": config.suppress_tokens,
        "begin_suppress_tokens": config.begin_suppress_tokens,
        "forced_eos_token_id": config.forced_eos_token_id,
        "forced_bos_token_id": () if config.forced_bos_token_id is None else (config.forced_bos_token_id,),
        "logit_bias": dict(config.logit_bias),
        "sequence_bias": chain.from_iterable(dict(config.sequence_bias)),
        "bad_words_ids": chain.from_iterable(config.bad_words_ids),
        "dry_sequence_breakers": [breaker for breaker in config.dry_sequence_breakers if isinstance(breaker, int)],
    }
    for name, tokens in named.items():
        for token in tokens:
            if token >= vocab_size:
                raise ConfigError(f"{name}: token {token} is out of range, this model knows 0 to {vocab_size - 1}")
