"""How to continue a prompt: every option, declared once, with Hugging Face's ``GenerationConfig`` names.

The command line's flags and the tables of docs/generation.md are made from the declarations. This module imports no
numpy, because ``edgelm run --help`` reads them.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict

from edgelm.bundle.small_files import SmallFileError, read_small_file
from edgelm.bundle.strict_json import StrictJsonError, parse_json
from edgelm.decoding.options import (
    COMMON,
    CONSTRAINT,
    LENGTH,
    OUTPUT,
    REPETITION,
    SAMPLING,
    SEARCH,
    SPEED,
    TOKENS,
    Option,
    check_combination,
    check_support,
    constraints,
    event,
    function,
    functions,
    number,
    one_of,
    sequence_biases,
    sequences,
    side_effects,
    start_and_factor,
    switch,
    texts,
    texts_or_ids,
    token_biases,
    token_ids,
    whole,
)
from edgelm.errors import BundleError, ConfigError, shown
from edgelm.text.constraints import Constraint

if TYPE_CHECKING:
    from edgelm.bundle.folder import Bundle
    from edgelm.ids import IdArray, Logits

DEFAULT_MAX_NEW_TOKENS = 128
_FILE = "generation_config.json"
MAX_SETTINGS_BYTES = 4 * 2**20


class Cancel(Protocol):
    """A signal that ends a generation; a ``threading.Event`` is one, and so is a ``multiprocessing.Event``."""

    def is_set(self) -> bool:
        """Whether to stop."""


class PromptProgress(Protocol):
    """A function that is told how far the computation of a prompt is."""

    def __call__(self, done: int, total: int, /) -> object:
        """`done` of the prompt's `total` tokens are computed. What is returned is not used."""


class LogitsProcessor(Protocol):
    """A function that changes the logits of the next token."""

    def __call__(self, ids: "IdArray", logits: "Logits", /) -> "Logits":
        """New logits, float32 (V,), given the token ids so far, int64 (T,), and the logits, float32 (V,)."""


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """Options of one generation; they have the same names in Python, in JSON and as flags of the command line.

    What each option means is the text of its declaration; docs/generation.md shows all of them.
    """

    max_new_tokens: int | None = COMMON.option(
        None,
        whole(0, optional=True),
        "Maximum number of new tokens.",
        flags=("-n", "--max-new-tokens"),
        show_default=f"the bundle's, or {DEFAULT_MAX_NEW_TOKENS}",
    )
    do_sample: bool = COMMON.option(
        False,
        switch(),
        "Draw tokens at random, or always take the likeliest one.",
        flags=("--do-sample/--greedy",),
        show_default="the bundle's",
    )
    temperature: float = COMMON.option(
        1.0,
        number("[0.001, 1000]", "T", hint="for greedy decoding use do_sample=False, --greedy on the command line"),
        "Divide the logits by T: below 1 is more predictable, above 1 less.",
    )
    top_k: int | None = COMMON.option(
        None,
        whole(1, optional=True, metavar="K"),
        "Sample from the K likeliest tokens. With `penalty_alpha`, K candidates compete for each place.",
    )
    top_p: float = COMMON.option(
        1.0, number("(0, 1]", "P"), "Sample from the likeliest tokens whose probabilities sum to P."
    )
    min_p: float = COMMON.option(
        0.0, number("[0, 1]", "P"), "Sample from the tokens at least P times as likely as the likeliest."
    )
    repetition_penalty: float = COMMON.option(
        1.0, number("(0, 1000]", "F"), "Above 1: make tokens of the prompt and of the text so far less likely."
    )
    stop_strings: tuple[str, ...] = COMMON.option(
        (),
        texts(64),
        "End the text where it contains TEXT. TEXT may begin and end inside tokens. It is not in the result.",
        flags=("--stop-strings", "--stop"),
    )
    num_return_sequences: int = COMMON.option(1, whole(1, 1024), "Number of continuations to return.")
    seed: int | None = COMMON.option(
        None,
        whole(0, 2**64 - 1, optional=True),
        "Seed of the random numbers: equal seeds give equal texts. It does not matter what else runs. The "
        "completion has the seed.",
        show_default="drawn",
    )

    prompt_lookup_num_tokens: int | None = SPEED.option(
        None,
        whole(1, 64, optional=True),
        "Draft up to N tokens from the text so far, and check them in one call. A draft is what followed the last "
        "two or three tokens before. This is faster where a text repeats itself or its prompt: "
        "[batches.md](batches.md#what-it-gains) has the measurements. Not with beams or contrastive search.",
    )

    max_length: int | None = LENGTH.option(
        None, whole(1, optional=True), "Maximum number of tokens, prompt included. Give it instead of `max_new_tokens`."
    )
    min_new_tokens: int = LENGTH.option(0, whole(0), "No end-of-text token before N new tokens.")
    min_length: int = LENGTH.option(0, whole(0), "No end-of-text token before N tokens in all, prompt included.")
    max_time: float | None = LENGTH.option(
        None,
        number("(0, 1e9]", "SECONDS", unit="seconds", optional=True),
        'Stop after this time, and return the text so far. The first token always comes. The finish reason is "time".',
    )
    cancel: Cancel | None = LENGTH.option(  # noqa: RUF009
        None,
        event(),
        "End the text before its next token once the event is set, from any thread. The text so far is returned, "
        'with the finish reason "cancelled". Python only.',
    )
    prompt_progress: PromptProgress | None = LENGTH.option(  # noqa: RUF009
        None,
        function(),
        "Called with how many tokens of the prompt are computed, and how many it has, after every 64 of them. "
        "Not in a batch. Python only.",
    )
    context_overflow: Literal["stop", "truncate", "window"] = LENGTH.option(
        "stop",
        one_of("stop", "truncate", "window"),
        "When the context is full: stop; drop the oldest tokens of a long prompt; or forget the oldest and go on. "
        '"stop" refuses a prompt longer than the context, and "truncate" drops as many tokens as the continuation '
        "needs ([embedding.md](embedding.md#long-texts)).",
        show_default=True,
    )
    pinned_tokens: int = LENGTH.option(
        0, whole(0), "Never drop or forget the first N tokens of the prompt. At most half the context."
    )
    eos_token_id: tuple[int, ...] = LENGTH.option(
        (),
        token_ids(),
        "End the text at one of these tokens. The token is not in the result.",
        show_default="the bundle's",
    )
    forced_eos_token_id: tuple[int, ...] = LENGTH.option(
        (), token_ids(), "Take one of these tokens for the last place that the maximum length gives."
    )
    exponential_decay_length_penalty: tuple[int, float] | None = LENGTH.option(
        None, start_and_factor(), "After N new tokens, make the end likelier by FACTOR with each token."
    )

    typical_p: float = SAMPLING.option(
        1.0,
        number("(0, 1]", "P"),
        "Sample from the most typical tokens whose probabilities sum to P. A token is typical if its surprise is "
        "near the expected one (Meister et al., arXiv 2202.00666).",
    )
    epsilon_cutoff: float = SAMPLING.option(
        0.0,
        number("[0, 1)", "P"),
        "Sample from the tokens with a probability of at least P. Source: Hewitt et al., arXiv 2210.15191.",
    )
    eta_cutoff: float = SAMPLING.option(
        0.0,
        number("[0, 1)", "P"),
        "Like the epsilon cutoff, but with a lower limit where the model is unsure. Source: Hewitt et al., arXiv "
        "2210.15191.",
    )
    top_n_sigma: float | None = SAMPLING.option(
        None,
        number("(0, 100]", "N", optional=True),
        "Sample from the logits within N standard deviations of the largest. Source: Tang et al., arXiv 2411.07641.",
    )
    xtc_probability: float = SAMPLING.option(
        0.0,
        number("[0, 1]", "P"),
        "XTC: probability of excluding the likeliest choices at a step. Source: p-e-w. It adds variety.",
    )
    xtc_threshold: float = SAMPLING.option(
        0.1,
        number("(0, 0.5]", "P"),
        "XTC excludes every token at least this likely, except the least likely of them.",
        show_default=True,
    )
    mirostat_tau: float | None = SAMPLING.option(
        None,
        number("(0, 100]", "BITS", unit="bits", optional=True),
        "Mirostat 2: surprise of each token to aim at. It takes the place of the filters (Basu et al., arXiv "
        "2007.14966).",
    )
    mirostat_eta: float = SAMPLING.option(
        0.1, number("(0, 1]", "RATE"), "Mirostat 2: how fast it corrects itself.", show_default=True
    )

    presence_penalty: float = REPETITION.option(
        0.0,
        number("[-100, 100]", "F"),
        "Subtract F from the logit of every token that the new text contains. As in OpenAI's API.",
    )
    frequency_penalty: float = REPETITION.option(
        0.0,
        number("[-100, 100]", "F"),
        "Subtract F from a token's logit for each time the new text contains it. As in OpenAI's API.",
    )
    no_repeat_ngram_size: int = REPETITION.option(
        0, whole(0, 1024), "No run of N tokens appears twice, prompt included."
    )
    dry_multiplier: float = REPETITION.option(
        0.0,
        number("[0, 100]", "F"),
        "DRY: penalty of a token that would lengthen a repeated run of tokens. Subtracts multiplier · base ^ "
        "(length of the run - allowed length) from its logit (p-e-w).",
    )
    dry_base: float = REPETITION.option(
        1.75, number("[1, 10]", "F"), "DRY: growth of the penalty with each token of the run.", show_default=True
    )
    dry_allowed_length: int = REPETITION.option(
        2, whole(1, 1024), "DRY: shorter runs have no penalty.", show_default=True
    )
    dry_sequence_breakers: tuple[str | int, ...] = REPETITION.option(
        ("\n", ":", '"', "*"),
        texts_or_ids(),
        "DRY: runs end at tokens that contain TEXT. In Python also at token ids.",
        show_default='newline, : " *',
    )

    logit_bias: tuple[tuple[int, float], ...] = TOKENS.option(
        (), token_biases(), "Add X to the token's logit. `--logit-bias 11=-2`, in Python `{11: -2}`."
    )
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = TOKENS.option(
        (),
        sequence_biases(),
        "Add X to the logit of the last token where the text ends with the tokens before it. `--sequence-bias "
        "11,42=-2`, in Python `{(11, 42): -2}`.",
    )
    bad_words_ids: tuple[tuple[int, ...], ...] = TOKENS.option(
        (), sequences(), "This sequence of tokens never appears. `--bad-words-ids 11,42`, in Python `[[11, 42]]`."
    )
    suppress_tokens: tuple[int, ...] = TOKENS.option((), token_ids(), "These tokens never appear.")
    begin_suppress_tokens: tuple[int, ...] = TOKENS.option((), token_ids(), "These tokens are not the first new one.")
    forced_bos_token_id: int | None = TOKENS.option(
        None, whole(0, optional=True, metavar="ID"), "The token that follows a prompt of one token."
    )
    logits_processor: tuple[LogitsProcessor, ...] = TOKENS.option(
        (), functions(64), "Your own functions, called after all other processors. Python only."
    )

    num_beams: int = SEARCH.option(
        1,
        whole(1, 256),
        "Beam search: follow N continuations at once. They run in one batch. With `do_sample` the beams are drawn.",
    )
    num_beam_groups: int = SEARCH.option(
        1,
        whole(1, 256),
        "Divide the beams into N groups that avoid each other's tokens. Source: Vijayakumar et al., arXiv 1610.02424.",
    )
    diversity_penalty: float = SEARCH.option(
        0.0,
        number("[0, 100]", "F"),
        "Subtract F from a token's logit for each beam of an earlier group that has it at this place.",
    )
    length_penalty: float = SEARCH.option(
        1.0,
        number("[-100, 100]", "F"),
        "Above 0 favours long beams, below 0 short ones. Beams rank by log-probability / length ^ F.",
        show_default=True,
    )
    early_stopping: bool | Literal["never"] = SEARCH.option(
        False,
        one_of(True, False, "never"),
        "Stop at N finished beams: at once (true), when better ones are unlikely (false) or impossible (never). N "
        "is `num_beams`.",
    )
    renormalize_logits: bool = SEARCH.option(
        False,
        switch(),
        "Turn logits into log-probabilities again after all filters, so that beams compare like with like.",
    )
    penalty_alpha: float | None = SEARCH.option(
        None,
        number("(0, 1]", "A", optional=True),
        "Contrastive search: weight of a candidate's likeness to the text so far, against its probability. The "
        "candidates are the `top_k` likeliest tokens (Su et al., arXiv 2202.06417).",
    )

    constraint: Constraint | None = CONSTRAINT.option(  # noqa: RUF009
        None,
        constraints(),
        "What the text must be: one of several texts, a match of a regular expression, JSON of a schema, or a text of "
        "a grammar ([constraints.md](constraints.md)). On the command line `--choices`, `--regex`, `--json-schema` "
        "and `--grammar`. Not with stop strings, groups of beams or contrastive search.",
    )

    token_healing: bool = CONSTRAINT.option(
        False,
        switch(),
        "Take back the last tokens of a prompt that may end inside a word; the new tokens spell them again. No text is "
        "shown twice ([details](#token-healing)). The prompt must be a text. Not with a constraint, groups of beams or "
        "contrastive search.",
    )

    logprobs: int | None = OUTPUT.option(
        None,
        whole(0, 1024, optional=True),
        "Log-probability of each token and of the N likeliest tokens; the command line needs --json too. They are "
        "the model's, before penalties, temperature and filters ([scoring.md](scoring.md)). Not with beams or "
        "contrastive search.",
    )

    def __post_init__(self) -> None:
        values = {name: getattr(self, name) for name in OPTIONS}
        for name, value in values.items():
            if value is not DEFAULTS[name]:
                values[name] = OPTIONS[name].rule.checked(name, value)
                object.__setattr__(self, name, values[name])
        check_combination(values, DEFAULTS)

    @classmethod
    def of_bundle(cls, bundle: "Bundle") -> "GenerationConfig":
        """A bundle's defaults; raises BundleError if its file has an invalid option or names an unknown token."""
        try:
            config = config_from_file(_settings_of_bundle(bundle))
        except (StrictJsonError, SmallFileError, ConfigError) as error:
            raise BundleError(f"{_FILE} of {str(bundle.path)!r}: {error}") from None
        unknown = [token for token in config.eos_token_id if token >= bundle.manifest.architecture.vocab_size]
        if unknown:
            raise BundleError(f"{_FILE} of {str(bundle.path)!r}: eos_token_id {unknown[0]} is not in the vocabulary")
        return config

    def updated(self, options: Mapping[str, object]) -> "GenerationConfig":
        """This configuration with a caller's `options` over it.

        A length that the caller gives replaces both lengths of this configuration. A sampling option switches sampling
        on. `num_beams` and `penalty_alpha` switch it off, unless `do_sample` or a sampling option is given too.
        Options of this configuration that belong to a method which the caller's options exclude go back to their
        defaults.

        Raises:
            ConfigError: an unknown name, a value out of range, or options that contradict each other.
        """
        for name in options:
            if name not in OPTIONS:
                is_short = isinstance(name, str) and len(name) < 60  # difflib compares every two characters
                close = difflib.get_close_matches(name, OPTIONS, n=1) if is_short else []
                hint = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(OPTIONS)}"
                raise ConfigError(f"unknown generation option {shown(name)}{hint}")
        given: dict[str, Any] = {name: OPTIONS[name].rule.checked(name, value) for name, value in options.items()}
        return replace(self, **(side_effects(given, DEFAULTS, contrastive=self.penalty_alpha is not None) | given))

    def check_batch(self) -> None:
        """Raise ConfigError if an option is used that works on one prompt at a time."""
        check_support({name: getattr(self, name) for name in OPTIONS}, in_batch=True)

    def new_token_limit(self, prompt_tokens: int) -> int:
        """Maximum number of tokens to add to a prompt; raises ConfigError if `max_length` leaves no room for one."""
        if self.max_length is None:
            return DEFAULT_MAX_NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens
        if self.max_length <= prompt_tokens:
            raise ConfigError(
                f"max_length is {self.max_length} but the prompt already has {prompt_tokens} tokens: "
                "raise it or use max_new_tokens"
            )
        return self.max_length - prompt_tokens


class GenerationOptions(TypedDict, total=False):
    """The keyword options of `Model.generate` and `Model.stream`, as a caller may write them, for type checkers.

    Type checkers need the listing; tests/decoding/test_generation_config.py compares it with `GenerationConfig`.
    """

    max_new_tokens: int | None
    do_sample: bool
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    repetition_penalty: float
    stop_strings: str | Sequence[str]
    num_return_sequences: int
    seed: int | None
    prompt_lookup_num_tokens: int | None
    max_length: int | None
    min_new_tokens: int
    min_length: int
    max_time: float | None
    cancel: Cancel | None
    prompt_progress: PromptProgress | None
    context_overflow: Literal["stop", "truncate", "window"]
    pinned_tokens: int
    eos_token_id: int | Sequence[int] | None
    forced_eos_token_id: int | Sequence[int] | None
    exponential_decay_length_penalty: tuple[int, float] | None
    typical_p: float
    epsilon_cutoff: float
    eta_cutoff: float
    top_n_sigma: float | None
    xtc_probability: float
    xtc_threshold: float
    mirostat_tau: float | None
    mirostat_eta: float
    presence_penalty: float
    frequency_penalty: float
    no_repeat_ngram_size: int
    dry_multiplier: float
    dry_base: float
    dry_allowed_length: int
    dry_sequence_breakers: Sequence[str | int]
    logit_bias: Mapping[int, float] | None
    sequence_bias: Mapping[tuple[int, ...], float] | Sequence[tuple[Sequence[int], float]] | None
    bad_words_ids: Sequence[Sequence[int]] | None
    suppress_tokens: Sequence[int] | None
    begin_suppress_tokens: Sequence[int] | None
    forced_bos_token_id: int | None
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor]
    num_beams: int
    num_beam_groups: int
    diversity_penalty: float
    length_penalty: float
    early_stopping: bool | Literal["never"]
    renormalize_logits: bool
    penalty_alpha: float | None
    constraint: Constraint | None
    token_healing: bool
    logprobs: int | None


OPTIONS: dict[str, Option] = {field.name: field.metadata["option"] for field in fields(GenerationConfig)}
"""Every option's declaration by its name, in the order of ``--help``."""
DEFAULTS: dict[str, object] = {field.name: field.default for field in fields(GenerationConfig)}


def default_text(name: str) -> str:
    """An option's default, as ``--help`` and docs/generation.md show it."""
    shown, default = OPTIONS[name].show_default, DEFAULTS[name]
    if isinstance(shown, str):
        return shown
    if isinstance(default, float):
        return f"{default:g}"
    return "none" if default in (None, ()) else str(default)


# Entries of generation_config.json that other tools write, and that edgelm does not have as options.
_IGNORED_IN_FILES = {"_from_model_config", "transformers_version", "bos_token_id", "pad_token_id"}


def config_from_file(content: Mapping[str, object]) -> GenerationConfig:
    """A bundle's ``generation_config.json`` as a configuration; raises ConfigError as `GenerationConfig.updated`."""
    return GenerationConfig().updated({k: v for k, v in content.items() if k not in _IGNORED_IN_FILES})


def bos_token_id(bundle: "Bundle") -> int | None:
    """The token with which a bundle's model begins an empty text; None where its settings name no such token.

    Raises:
        BundleError: the file is damaged.
    """
    try:
        token = _settings_of_bundle(bundle).get("bos_token_id")
    except (StrictJsonError, SmallFileError) as error:
        raise BundleError(f"{_FILE} of {str(bundle.path)!r}: {error}") from None
    known = type(token) is int and 0 <= token < bundle.manifest.architecture.vocab_size
    return token if known else None  # type: ignore[return-value]  # an int


def _settings_of_bundle(bundle: "Bundle") -> dict[str, object]:
    content = parse_json(read_small_file(bundle.file(_FILE), MAX_SETTINGS_BYTES))
    if not isinstance(content, dict):
        raise StrictJsonError("must be an object")
    return content
