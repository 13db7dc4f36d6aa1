"""How to continue a prompt: Hugging Face's ``GenerationConfig`` names, each default and each limit once."""

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal, Protocol

from edgelm.bundle.folder import Bundle
from edgelm.bundle.strict_json import StrictJsonError, parse_json
from edgelm.decoding.logits_processors import LogitsProcessor
from edgelm.decoding.option_conflicts import check_combination, replaced_defaults
from edgelm.decoding.option_rules import (
    Rule,
    callables,
    number,
    option,
    or_none,
    sequence_biases,
    sequences,
    texts,
    texts_or_ids,
    token_biases,
    token_ids,
    true_or_false,
    whole,
)
from edgelm.errors import BundleError, ConfigError

DEFAULT_MAX_NEW_TOKENS = 128
MAX_RETURN_SEQUENCES = 1024
MAX_BEAMS = 256
MAX_STOP_STRINGS = 64
MAX_LOGPROBS = 1024
MAX_DRAFTED_TOKENS = 64

_SHARE = number(lambda p: 0 < p <= 1, "in (0, 1]")
_CUTOFF = number(lambda p: 0 <= p < 1, "in [0, 1)")
_PENALTY = number(lambda p: -100 <= p <= 100, "between -100 and 100")
_START, _FACTOR = whole(0), number(lambda f: 0 < f <= 1e3, "")


class Cancel(Protocol):
    """A signal that ends a generation; a ``threading.Event`` is one, and so is a ``multiprocessing.Event``."""

    def is_set(self) -> bool:
        """Whether to stop."""


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """Options of one generation; the same words in Python, in JSON and as CLI flags."""

    max_new_tokens: int | None = option(None, or_none(whole(0)))
    """Most tokens to add; 128 when `max_length` is not given either."""
    max_length: int | None = option(None, or_none(whole(1)))
    """Most tokens in all, prompt included."""
    do_sample: bool = option(False, true_or_false())
    """Draw tokens at random instead of taking the likeliest; a sampling option switches it on."""
    temperature: float = option(
        1.0,
        number(
            lambda t: 1e-3 <= t <= 1e3,
            "between 0.001 and 1000 (for greedy decoding use do_sample=False, --greedy on the command line)",
        ),
    )
    """Divides the logits before sampling: below 1 is more predictable."""
    top_k: int | None = option(None, or_none(whole(1)))
    """Sample among the k likeliest tokens; with `penalty_alpha`, how many candidates compete."""
    top_p: float = option(1.0, _SHARE)
    """Sample among the fewest tokens that hold this share of the probability."""
    min_p: float = option(0.0, number(lambda p: 0 <= p <= 1, "in [0, 1]"))
    """Sample among tokens at least this share as likely as the likeliest."""
    repetition_penalty: float = option(1.0, number(lambda p: 0 < p <= 1e3, "more than 0 and at most 1000"))
    """Above 1: makes tokens of the prompt and the text so far less likely."""
    num_return_sequences: int = option(1, whole(1, MAX_RETURN_SEQUENCES))
    """How many continuations of the prompt to return."""
    stop_strings: tuple[str, ...] = option((), texts(MAX_STOP_STRINGS))
    """Texts that end the generation; they are not in the result."""
    eos_token_id: tuple[int, ...] = option((), token_ids())
    """Tokens that end the generation; they are not in the result."""
    seed: int | None = option(None, or_none(whole(0, 2**64 - 1)))
    """Makes sampling repeatable; a fresh one is drawn when not given."""
    logprobs: int | None = option(None, or_none(whole(0, MAX_LOGPROBS)))
    """Return each token's log-probability under the model, before penalties, temperature and filters, and those of
    this many of the likeliest tokens."""

    min_new_tokens: int = option(0, whole(0))
    """No end-of-text token before this many new tokens."""
    min_length: int = option(0, whole(0))
    """No end-of-text token before this many tokens in all, prompt included."""
    max_time: float | None = option(None, or_none(number(lambda t: 0 < t <= 1e9, "more than 0, in seconds")))
    """Most seconds for the whole generation; what is there by then is returned."""

    cancel: Cancel | None = option(  # noqa: RUF009
        None, or_none(Rule(lambda v: callable(getattr(v, "is_set", None)), "a threading.Event, or what has is_set()"))
    )
    """Ends the generation before its next token once it is set, from whatever thread; what is there is returned."""
    context_overflow: Literal["stop", "truncate", "window"] = option(
        "stop", Rule(lambda v: v in ("stop", "truncate", "window"), '"stop", "truncate" or "window"')
    )
    """What happens at the end of the context. "stop": the text ends, and a longer prompt is refused; "truncate": the
    oldest tokens of a prompt are dropped, so that its continuation fits; "window": the text goes on, and the model
    forgets its oldest tokens when its context is full."""
    pinned_tokens: int = option(0, whole(0))
    """How many of the prompt's first tokens are never dropped or forgotten; at most half the context."""

    typical_p: float = option(1.0, _SHARE)
    """Sample among the tokens of the most typical surprise that hold this share of the probability."""
    epsilon_cutoff: float = option(0.0, _CUTOFF)
    """Sample among tokens at least this likely."""
    eta_cutoff: float = option(0.0, _CUTOFF)
    """Like `epsilon_cutoff`, but lower where the model is unsure."""
    top_n_sigma: float | None = option(None, or_none(number(lambda n: 0 < n <= 100, "more than 0 and at most 100")))
    """Sample among tokens whose logit is within this many standard deviations of the largest."""
    xtc_probability: float = option(0.0, number(lambda p: 0 <= p <= 1, "in [0, 1]"))
    """How often the likeliest choices are excluded, for variety."""
    xtc_threshold: float = option(0.1, number(lambda p: 0 < p <= 0.5, "in (0, 0.5]"))
    """All tokens at least this likely but the least likely of them are excluded."""
    mirostat_tau: float | None = option(None, or_none(number(lambda t: 0 < t <= 100, "more than 0, in bits")))
    """Mirostat 2: the surprise of each token to aim at, in bits."""
    mirostat_eta: float = option(0.1, number(lambda e: 0 < e <= 1, "in (0, 1]"))
    """How fast mirostat corrects itself."""

    presence_penalty: float = option(0.0, _PENALTY)
    """Subtracted from the logit of every token the new text already has."""
    frequency_penalty: float = option(0.0, _PENALTY)
    """Subtracted from a token's logit once for each time the new text has it."""
    no_repeat_ngram_size: int = option(0, whole(0, 1024))
    """No run of this many tokens appears twice, prompt included."""
    dry_multiplier: float = option(0.0, number(lambda m: 0 <= m <= 100, "in [0, 100]"))
    """DRY: the penalty of a token that would lengthen a repeated run."""
    dry_base: float = option(1.75, number(lambda b: 1 <= b <= 10, "in [1, 10]"))
    """How much DRY's penalty grows with each further token of the run."""
    dry_allowed_length: int = option(2, whole(1, 1024))
    """Repeated runs shorter than this go unpunished by DRY."""
    dry_sequence_breakers: tuple[str | int, ...] = option(("\n", ":", '"', "*"), texts_or_ids())
    """Texts (every token that holds one) and token ids over which DRY looks for no repetition."""

    logit_bias: tuple[tuple[int, float], ...] = option((), token_biases())
    """Added to the logits of these tokens."""
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = option((), sequence_biases())
    """Added to the logit of the last token of a sequence where the text ends with the others."""
    bad_words_ids: tuple[tuple[int, ...], ...] = option((), sequences())
    """Sequences of tokens that never appear."""
    suppress_tokens: tuple[int, ...] = option((), token_ids())
    """Tokens that never appear."""
    begin_suppress_tokens: tuple[int, ...] = option((), token_ids())
    """Tokens that are not the first new one."""
    forced_bos_token_id: int | None = option(None, or_none(whole(0)))
    """The token that follows a prompt of one token."""
    forced_eos_token_id: tuple[int, ...] = option((), token_ids())
    """The token, or tokens to choose from, that fill the last place `max_length` or `max_new_tokens` gives."""
    exponential_decay_length_penalty: tuple[int, float] | None = option(
        None,
        Rule(
            lambda v: (
                v is None or (isinstance(v, tuple) and len(v) == 2 and _START.check(v[0]) and _FACTOR.check(v[1]))
            ),
            "a pair of a number of new tokens, 0 or more, and a factor, more than 0",
            lambda v: tuple(v) if isinstance(v, list) else v,
        ),
    )
    """(start, factor): the end-of-text tokens grow likelier by the factor with each token after `start` new ones."""
    renormalize_logits: bool = option(False, true_or_false())
    """Turn logits back into log-probabilities after processors and filters; beams then compare like with like."""

    num_beams: int = option(1, whole(1, MAX_BEAMS))
    """Beam search: how many continuations to follow at once."""
    num_beam_groups: int = option(1, whole(1, MAX_BEAMS))
    """Beams in this many groups that avoid each other's tokens."""
    diversity_penalty: float = option(0.0, number(lambda p: 0 <= p <= 100, "in [0, 100]"))
    """How much a group avoids the tokens that earlier groups take at the same place."""
    length_penalty: float = option(1.0, number(lambda p: -100 <= p <= 100, "between -100 and 100"))
    """Beams rank by log-probability / length ** this: above 0 favours long texts, below 0 short ones."""
    early_stopping: bool | Literal["never"] = option(
        False, Rule(lambda v: isinstance(v, bool) or v == "never", 'True, False or "never"')
    )
    """True: stop at `num_beams` finished texts; False: when better ones are unlikely; "never": when impossible."""
    penalty_alpha: float | None = option(None, or_none(number(lambda a: 0 < a <= 1, "in (0, 1]")))
    """Contrastive search: how much a candidate's likeness to the text so far counts against it; needs `top_k`."""

    prompt_lookup_num_tokens: int | None = option(None, or_none(whole(1, MAX_DRAFTED_TOKENS)))
    """Draft up to this many tokens from what followed the same words before, and check them in one call: faster where
    a text repeats itself or its prompt."""

    logits_processor: tuple[LogitsProcessor, ...] = option((), callables())
    """Functions of the token ids so far, int64 (T,), and the logits, float32 (V,), that return new logits."""

    def __post_init__(self) -> None:
        for name, rule in RULES.items():
            object.__setattr__(self, name, rule.checked(name, getattr(self, name)))
        check_combination(self)

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> "GenerationConfig":
        """A bundle's defaults, checked against its vocabulary.

        Raises:
            BundleError: the file holds no valid generation options, or names an unknown token.
        """
        name = "generation_config.json"
        try:
            content = parse_json(bundle.file(name).read_bytes())
            if not isinstance(content, dict):
                raise StrictJsonError("must be an object")
            config = config_from_file(content)
        except (StrictJsonError, ConfigError) as error:
            raise BundleError(f"{name} of {os.fspath(bundle.path)!r}: {error}") from None
        wrong = [token for token in config.eos_token_id if token >= bundle.manifest.architecture.vocab_size]
        if wrong:
            raise BundleError(f"{name} of {os.fspath(bundle.path)!r}: eos_token_id {wrong[0]} is not in the vocabulary")
        return config

    def updated(self, options: Mapping[str, object]) -> "GenerationConfig":
        """This configuration with a caller's `options` over it.

        A length the caller gives replaces both lengths of this configuration. A sampling option switches sampling
        on, `num_beams` and `penalty_alpha` switch it off, unless `do_sample` is given too. What this configuration
        has of a method that the caller's excludes goes back to its default.

        Raises:
            ConfigError: an unknown name, a value out of range, or options that contradict each other.
        """
        for name in options:
            if name not in RULES:
                close = difflib.get_close_matches(name, RULES, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(RULES)}"
                raise ConfigError(f"unknown generation option {name!r}{hint}")
        values = {name: RULES[name].checked(name, value) for name, value in options.items()}
        return replace(self, **(replaced_defaults(self, values) | values))

    def new_token_limit(self, prompt_tokens: int) -> int:
        """How many tokens may be added to a prompt of `prompt_tokens`.

        Raises:
            ConfigError: `max_length` is not more than the prompt has already.
        """
        if self.max_length is None:
            return DEFAULT_MAX_NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens
        if self.max_length <= prompt_tokens:
            raise ConfigError(
                f"max_length is {self.max_length} but the prompt already has {prompt_tokens} tokens: "
                "raise it or use max_new_tokens"
            )
        return self.max_length - prompt_tokens


RULES: dict[str, Rule] = {field.name: field.metadata["rule"] for field in fields(GenerationConfig)}
"""Every option's rule, by name."""

# What other tools write into generation_config.json beside generation options.
_IGNORED_IN_FILES = {"_from_model_config", "transformers_version", "bos_token_id", "pad_token_id"}


def config_from_file(content: Mapping[str, object]) -> GenerationConfig:
    """A bundle's ``generation_config.json`` as a configuration.

    Raises:
        ConfigError: as `GenerationConfig.updated`.
    """
    return GenerationConfig().updated({k: v for k, v in content.items() if k not in _IGNORED_IN_FILES})
