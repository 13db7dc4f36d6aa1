"""Processors: pure functions that change one row of logits, float32 of shape (V,), in view of the token ids so far.

Meaning and order are those of transformers' logits processors where it has them. Every function returns a new row;
tokens ruled out are -inf. `ids` are the prompt and the text so far, int64 of shape (T,).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgelm.errors import ConfigError

if TYPE_CHECKING:
    from edgelm.decoding.generation_config import GenerationConfig

Row = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
LogitsProcessor = Callable[[Ids, Row], Row]
"""From the ids so far (T,) and the logits (V,) to new logits (V,)."""

MASKED = np.float32(-np.inf)
DRY_LONGEST_RUN = 64
"""Longer repeated runs are not penalized more: 1.75 ** 62 is beyond any logit."""


def bias_tokens(ids: Ids, logits: Row, tokens: Ids, biases: Row) -> Row:
    """Add `biases` (N,) to the logits of the distinct `tokens` (N,)."""
    result = logits.copy()
    result[tokens] += biases
    return result


class SequenceBias:
    """Adds a bias to a sequence's last token where the ids end with its other tokens; -inf forbids the sequence.

    As in transformers a sequence counts only where there are at least as many ids as it has tokens.
    """

    def __init__(self, biases: Iterable[tuple[Sequence[int], float]]) -> None:
        """Args: distinct sequences of one token or more, with their biases."""
        pairs = list(biases)
        single = [(sequence[0], bias) for sequence, bias in pairs if len(sequence) == 1]
        self._tokens, self._biases = _ids(t for t, _ in single), np.array([b for _, b in single], np.float32)
        self._longer: dict[int, list[tuple[Ids, float]]] = {}  # by the token before the last
        for sequence, bias in pairs:
            if len(sequence) > 1:
                self._longer.setdefault(sequence[-2], []).append((_ids(sequence), bias))

    def __call__(self, ids: Ids, logits: Row) -> Row:
        result = bias_tokens(ids, logits, self._tokens, self._biases)
        for sequence, bias in self._longer.get(int(ids[-1]), ()):
            before = len(sequence) - 1
            if len(sequence) <= len(ids) and np.array_equal(ids[-before:], sequence[:-1]):
                result[sequence[-1]] += np.float32(bias)
        return result


def penalize_repetition(ids: Ids, logits: Row, penalty: float) -> Row:
    """Divide positive and multiply negative logits of the tokens in `ids` by `penalty` (CTRL, arXiv 1909.05858)."""
    result = logits.copy()
    values = result[ids]
    result[ids] = np.where(values < 0, values * np.float32(penalty), values / np.float32(penalty))
    return result


def penalize_presence_and_frequency(
    ids: Ids, logits: Row, presence: float, frequency: float, prompt_tokens: int
) -> Row:
    """Subtract `presence` + count · `frequency` from the logits of tokens of the new text (OpenAI's penalties)."""
    new = ids[prompt_tokens:]
    result = logits.copy()
    np.subtract.at(result, new, np.float32(frequency))
    result[new] = result[new] - np.float32(presence)  # once for all times a token is there
    return result


def dry(ids: Ids, logits: Row, multiplier: float, base: float, allowed_length: int, breakers: Ids) -> Row:
    """Penalize tokens that would lengthen a run of tokens which `ids` end with and hold earlier too.

    The penalty is multiplier · base ** (length of the run - allowed length), from the allowed length on; runs end at
    the tokens `breakers` (p-e-w, github.com/oobabooga/text-generation-webui/pull/5677).
    """
    broken = np.isin(ids, breakers)
    if len(ids) < 2 or broken[-1]:
        return logits
    at = np.flatnonzero(ids[:-1] == ids[-1])  # where each earlier run ends; the token after it would repeat it
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


def forbid_repeated_ngrams(ids: Ids, logits: Row, size: int) -> Row:
    """Rule out tokens that would make a run of `size` tokens appear twice (Paulus et al., arXiv 1705.04304)."""
    starts = len(ids) - size + 1  # how many whole runs there are
    if starts < 1:
        return logits
    same = np.ones(starts, bool)
    for offset in range(size - 1):
        same &= ids[offset : offset + starts] == ids[len(ids) - size + 1 + offset]
    return suppress(ids, logits, ids[size - 1 :][same])


def suppress(ids: Ids, logits: Row, tokens: Ids) -> Row:
    """Rule out `tokens`."""
    result = logits.copy()
    result[tokens] = MASKED
    return result


def suppress_before(ids: Ids, logits: Row, tokens: Ids, length: int) -> Row:
    """Rule out `tokens` while there are fewer than `length` ids."""
    return suppress(ids, logits, tokens) if len(ids) < length else logits


def suppress_at(ids: Ids, logits: Row, tokens: Ids, length: int) -> Row:
    """Rule out `tokens` where there are exactly `length` ids."""
    return suppress(ids, logits, tokens) if len(ids) == length else logits


def force_at(ids: Ids, logits: Row, tokens: Ids, length: int) -> Row:
    """Where there are exactly `length` ids, leave `tokens` alone, all as likely."""
    if len(ids) != length:
        return logits
    result = np.full_like(logits, MASKED)
    result[tokens] = 0
    return result


def hasten_end(ids: Ids, logits: Row, tokens: Ids, start: int, factor: float) -> Row:
    """Beyond `start` ids, add |logit| · (factor ** (ids beyond it) - 1) to the logits of `tokens`."""
    if len(ids) <= start:
        return logits
    allowed = tokens[logits[tokens] > MASKED]
    result = logits.copy()
    result[allowed] += np.abs(logits[allowed]) * np.float32(min(factor ** float(len(ids) - start) - 1, 1e30))
    return result


def checked(ids: Ids, logits: Row, processor: LogitsProcessor) -> Row:
    """A caller's processor, whose result must be a row of the same length without NaN.

    Raises:
        ConfigError: it is not.
    """
    result = np.asarray(processor(ids.copy(), logits.copy()))
    if result.shape != logits.shape or result.dtype.kind != "f" or np.isnan(result).any():
        raise ConfigError(
            f"logits_processor must return {len(logits)} floats, none of them NaN, "
            f"got {result.dtype} of shape {result.shape} from {getattr(processor, '__name__', processor)!r}"
        )
    return result.astype(np.float32, copy=False)


def processors_of(
    config: "GenerationConfig", prompt_tokens: int, vocab_size: int, *, after_biases: Sequence[LogitsProcessor] = ()
) -> tuple[LogitsProcessor, ...]:
    """The processors a configuration asks for, in transformers' order.

    Args:
        after_biases: more of them, to stand where transformers puts the penalty between groups of beams.

    Raises:
        ConfigError: an option names a token outside the vocabulary.
    """
    check_tokens(config, vocab_size)
    end = _ids(config.eos_token_id)
    last = prompt_tokens + config.new_token_limit(prompt_tokens) - 1
    forbidden = [b for b in config.bad_words_ids if len(b) > 1 or b[0] not in config.eos_token_id]

    def wanted() -> Iterator[LogitsProcessor]:
        if config.logit_bias:
            biases = dict(config.logit_bias)
            yield partial(bias_tokens, tokens=_ids(biases), biases=np.array([*biases.values()], np.float32))
        if config.sequence_bias:
            yield SequenceBias(dict(config.sequence_bias).items())
        yield from after_biases
        if config.repetition_penalty != 1:
            yield partial(penalize_repetition, penalty=config.repetition_penalty)
        if config.presence_penalty or config.frequency_penalty:
            yield partial(
                penalize_presence_and_frequency,
                presence=config.presence_penalty,
                frequency=config.frequency_penalty,
                prompt_tokens=prompt_tokens,
            )
        if config.dry_multiplier:
            yield partial(
                dry,
                multiplier=config.dry_multiplier,
                base=config.dry_base,
                allowed_length=config.dry_allowed_length,
                breakers=_ids(b for b in config.dry_sequence_breakers if isinstance(b, int)),
            )
        if config.no_repeat_ngram_size:
            yield partial(forbid_repeated_ngrams, size=config.no_repeat_ngram_size)
        if forbidden:
            yield SequenceBias(dict.fromkeys(forbidden, -np.inf).items())
        if len(end) and config.min_length:
            yield partial(suppress_before, tokens=end, length=config.min_length)
        if len(end) and config.min_new_tokens:
            yield partial(suppress_before, tokens=end, length=prompt_tokens + config.min_new_tokens)
        if config.forced_bos_token_id is not None:
            yield partial(force_at, tokens=_ids([config.forced_bos_token_id]), length=1)
        if config.forced_eos_token_id:
            yield partial(force_at, tokens=_ids(config.forced_eos_token_id), length=last)
        if len(end) and config.exponential_decay_length_penalty is not None:
            start, factor = config.exponential_decay_length_penalty
            yield partial(hasten_end, tokens=end, start=prompt_tokens + start, factor=factor)
        if config.suppress_tokens:
            yield partial(suppress, tokens=_ids(config.suppress_tokens))
        if config.begin_suppress_tokens:
            # A token that is forced to come first puts the beginning one place later.
            begin = prompt_tokens + (prompt_tokens == 1 and config.forced_bos_token_id is not None)
            yield partial(suppress_at, tokens=_ids(config.begin_suppress_tokens), length=begin)
        for processor in config.logits_processor:
            yield partial(checked, processor=processor)

    return tuple(wanted())


def process(processors: Iterable[LogitsProcessor], ids: Ids, logits: Row, *, required: bool = True) -> Row:
    """All `processors` in turn.

    Raises:
        ConfigError: they leave no token to choose, though one is `required`.
    """
    for processor in processors:
        logits = processor(ids, logits)
    if required and logits.max() == MASKED:
        raise ConfigError(
            f"no token is left to choose after {len(ids)} tokens: bad_words_ids, suppress_tokens, "
            "no_repeat_ngram_size, min_new_tokens and the like rule out the whole vocabulary"
        )
    return logits


def check_tokens(config: "GenerationConfig", vocab_size: int) -> None:
    """Refuse ids the model does not know.

    Raises:
        ConfigError: with the option's name.
    """
    named: dict[str, Iterable[Any]] = {
        name: getattr(config, name)
        for name in ("eos_token_id", "suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id")
    }
    named["forced_bos_token_id"] = () if config.forced_bos_token_id is None else (config.forced_bos_token_id,)
    named["logit_bias"] = (token for token, _ in config.logit_bias)
    named["sequence_bias"] = chain.from_iterable(sequence for sequence, _ in config.sequence_bias)
    named["bad_words_ids"] = chain.from_iterable(config.bad_words_ids)
    named["dry_sequence_breakers"] = (b for b in config.dry_sequence_breakers if isinstance(b, int))
    for name, tokens in named.items():
        for token in tokens:
            if token >= vocab_size:
                raise ConfigError(f"{name}: token {token} is out of range, this model knows 0 to {vocab_size - 1}")


def _ids(tokens: Iterable[int]) -> Ids:
    return np.fromiter(tokens, np.int64)
