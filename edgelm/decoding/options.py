"""The rules of generation options: which values each one takes, and which options exclude or need each other.

`edgelm.decoding.generation_config` declares every option with them. This module imports no numpy, because
``edgelm run --help`` reads the declarations.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

from edgelm.errors import ConfigError

Default = TypeVar("Default")
Kind = Literal[
    "switch",
    "whole",
    "number",
    "choice",
    "decay",
    "texts",
    "ids",
    "sequences",
    "token_biases",
    "sequence_biases",
    "python",
]
"""How a value is written on the command line; "python" options have no flag."""

MAX_TOKEN_ID = 2**31 - 1
MAX_ENTRIES = 100_000
"""Maximum number of entries of one option: ids, sequences or texts."""
MAX_SEQUENCE_TOKENS = 1024
MAX_TEXT_CHARACTERS = 1024

COMMON = "Common options"
OUTPUT = "Output and machine"
SPEED = "Speed"
LENGTH = "Length and end"
SAMPLING = "More ways to sample"
REPETITION = "Against repetition"
TOKENS = "Single tokens"
SEARCH = "Beam search and contrastive search"


@dataclass(frozen=True, slots=True)
class Rule:
    """The values an option takes."""

    kind: Kind
    limit: str
    """Completes the sentence "NAME must be ..."."""
    check: Callable[[Any], bool]
    """Whether a value in its normal form is allowed."""
    normalize: Callable[[object], object] | None = None
    """Turns other spellings into the normal form, e.g. one id into a tuple; returns what it cannot read unchanged."""
    metavar: str = ""
    """Stands for the value in `Option.meaning`."""
    optional: bool = False
    """Whether None is allowed, which means "not used"."""
    choices: tuple[object, ...] = ()
    """All values, where they can be listed."""

    def checked(self, name: str, value: object) -> object:
        """The value in its normal form.

        Raises:
            ConfigError: the value breaks the rule.
        """
        if value is None and self.optional:
            return None
        normal = _plain(value)
        if self.normalize is not None:
            normal = self.normalize(normal)
        if not self.check(normal):
            text = repr(value)
            raise ConfigError(f"{name} must be {self.limit}, got {text if len(text) <= 60 else text[:57] + '...'}")
        return normal


@dataclass(frozen=True, slots=True)
class Option:
    """What is declared of an option beside its name, its type and its default, which are those of a dataclass field."""

    rule: Rule
    group: str
    """The heading of ``--help`` under which the flag stands."""
    meaning: str
    """The first sentence is the text of ``--help``; docs/generation.md has all of them."""
    flags: tuple[str, ...]
    """Spellings of the flag; empty for ``--`` and the name with hyphens."""
    show_default: bool | str
    """Whether ``--help`` shows the default; a text stands for it there and in docs/generation.md."""


def option(
    default: Default,
    rule: Rule,
    group: str,
    meaning: str,
    *,
    flags: tuple[str, ...] = (),
    show_default: bool | str = False,
) -> Default:
    """A dataclass field that carries its `Option`."""
    return field(default=default, metadata={"option": Option(rule, group, meaning, flags, show_default)})


def whole(low: int, high: int | None = None, *, metavar: str = "N", optional: bool = False) -> Rule:
    """A whole number from `low` to `high`; without `high`, `low` or more."""
    if high is None:
        limit, high = f"a whole number, {low} or more", 2**31 - 1
    else:
        limit = f"a whole number from {low} to {'2**64 - 1' if high == 2**64 - 1 else high}"
    return Rule("whole", limit, partial(_is_whole, low=low, high=high), metavar=metavar, optional=optional)


def number(interval: str, metavar: str, *, unit: str = "", hint: str = "", optional: bool = False) -> Rule:
    """A number in an interval such as "(0, 1]", which excludes 0 and includes 1; `hint` follows it in messages."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    # The next float inside an open end is the closed end of the same interval.
    low = math.nextafter(low, math.inf) if interval[0] == "(" else low
    high = math.nextafter(high, -math.inf) if interval[-1] == ")" else high
    limit = f"a number of {unit} in {interval}" if unit else f"in {interval}"
    limit += f" ({hint})" if hint else ""
    return Rule("number", limit, partial(_is_number, low=low, high=high), metavar=metavar, optional=optional)


def switch() -> Rule:
    """True or False."""
    return Rule("switch", "True or False", partial(_is_one_of, choices=(True, False)), choices=(True, False))


def one_of(*choices: str | bool) -> Rule:
    """One of these values."""
    words = [f'"{choice}"' if isinstance(choice, str) else str(choice) for choice in choices]
    limit = f"{', '.join(words[:-1])} or {words[-1]}"
    return Rule("choice", limit, partial(_is_one_of, choices=choices), choices=choices)


def texts(limit: int) -> Rule:
    """At most `limit` texts; one text stands for a list of one, None for an empty list."""
    words = f"at most {limit} texts of 1 to {MAX_TEXT_CHARACTERS} characters"
    return Rule("texts", words, partial(_is_tuple_of, check=_is_text, limit=limit), _as_tuple, "TEXT")


def texts_or_ids() -> Rule:
    """Texts and token ids, mixed."""
    return Rule("texts", "texts or token ids", partial(_is_tuple_of, check=_is_text_or_token_id), _as_tuple, "TEXT")


def token_ids() -> Rule:
    """Token ids; one id stands for a list of one, None for an empty list."""
    return Rule("ids", "token ids, 0 or more", partial(_is_tuple_of, check=_is_token_id), _as_tuple, "ID,...")


def sequences() -> Rule:
    """Lists of token ids."""
    limit = f"lists of 1 to {MAX_SEQUENCE_TOKENS} token ids"
    return Rule("sequences", limit, partial(_is_tuple_of, check=_is_sequence), _as_tuples, "ID,...")


def token_biases() -> Rule:
    """Pairs of a token id and a number, written as a dict or as pairs; JSON's text keys count as ids."""
    return Rule(
        "token_biases",
        "a dict of token ids (0 or more) and finite numbers",
        partial(_is_tuple_of, check=partial(_is_bias, is_key=_is_token_id)),
        partial(_as_pairs, key_of=lambda key: int(key) if isinstance(key, str) and key.isdecimal() else key),
        "ID=X",
    )


def sequence_biases() -> Rule:
    """Pairs of a list of token ids and a number, written as a dict with tuples as keys or as pairs."""
    return Rule(
        "sequence_biases",
        f"pairs of a list of 1 to {MAX_SEQUENCE_TOKENS} token ids and a finite number",
        partial(_is_tuple_of, check=partial(_is_bias, is_key=_is_sequence)),
        partial(_as_pairs, key_of=lambda key: tuple(key) if isinstance(key, list) else key),
        "ID,...=X",
    )


def start_and_factor() -> Rule:
    """A pair of a number of tokens and a factor."""
    limit = "a pair of a number of new tokens, 0 or more, and a factor in (0, 1000]"
    normalize = lambda value: tuple(value) if isinstance(value, list) else value  # noqa: E731
    return Rule("decay", limit, _is_start_and_factor, normalize, "N FACTOR", optional=True)


def functions(limit: int) -> Rule:
    """At most `limit` functions; one function stands for a list of one."""
    words = f"functions of (token ids, logits), at most {limit}"
    return Rule("python", words, partial(_is_tuple_of, check=callable, limit=limit), _as_tuple)


def event() -> Rule:
    """A ``threading.Event`` or an object like it."""
    limit = "a threading.Event, or an object with a method is_set()"
    return Rule("python", limit, lambda value: callable(getattr(value, "is_set", None)), optional=True)


def _is_whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return math.isfinite(value) and low <= value <= high


def _is_one_of(value: object, choices: tuple[object, ...]) -> bool:
    # A comparison alone would take 1 for True.
    return any(type(value) is type(choice) and value == choice for choice in choices)


def _is_token_id(value: object) -> bool:
    return _is_whole(value, 0, MAX_TOKEN_ID)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= MAX_TEXT_CHARACTERS


def _is_text_or_token_id(value: object) -> bool:
    return _is_text(value) or _is_token_id(value)


def _is_sequence(value: object) -> bool:
    return isinstance(value, tuple) and 1 <= len(value) <= MAX_SEQUENCE_TOKENS and all(map(_is_token_id, value))


def _is_bias(value: object, is_key: Callable[[object], bool]) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and is_key(value[0]) and _is_number(value[1])


def _is_start_and_factor(value: Any) -> bool:
    if not isinstance(value, tuple) or len(value) != 2:
        return False
    start, factor = value
    return _is_whole(start, 0, 2**31 - 1) and _is_number(factor, high=1000) and factor > 0


def _is_tuple_of(value: object, check: Callable[[object], bool], limit: int = MAX_ENTRIES) -> bool:
    return isinstance(value, tuple) and len(value) <= limit and all(map(check, value))


def _plain(value: object) -> object:
    """A numpy scalar as a Python number; other values as they are."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        plain: object = value.item()
        return plain
    return value


def _as_tuple(value: object) -> object:
    if value is None:
        return ()
    if isinstance(value, (str, int)) or callable(value):
        return (value,)
    return tuple(map(_plain, value)) if isinstance(value, Iterable) else value


def _as_tuples(value: object) -> object:
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str):
        return value
    return tuple(_as_tuple(entry) if isinstance(entry, Sequence) else entry for entry in value)


def _as_pairs(value: object, key_of: Callable[[object], object]) -> object:
    if value is None:
        return ()
    entries = value.items() if isinstance(value, Mapping) else value
    if not isinstance(entries, Iterable) or isinstance(entries, str):
        return value
    listed = [tuple(entry) if isinstance(entry, (list, tuple)) else entry for entry in entries]
    return tuple((key_of(e[0]), _plain(e[1])) if isinstance(e, tuple) and len(e) == 2 else e for e in listed)


FILTERS = (
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "top_n_sigma",
    "xtc_probability",
    "xtc_threshold",
)
"""Options that narrow the choice before a token is drawn."""
MIROSTAT = ("mirostat_tau", "mirostat_eta")
SAMPLING_OPTIONS = ("temperature", *FILTERS, *MIROSTAT)
"""Options that switch sampling on."""
BEAMS = ("num_beams", "num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping")
NEEDS = {
    "xtc_threshold": "xtc_probability",
    "mirostat_eta": "mirostat_tau",
    "pinned_tokens": "context_overflow",
    "dry_base": "dry_multiplier",
    "dry_allowed_length": "dry_multiplier",
    "dry_sequence_breakers": "dry_multiplier",
    "num_beam_groups": "num_beams",
    "length_penalty": "num_beams",
    "early_stopping": "num_beams",
    "diversity_penalty": "num_beam_groups",
}
"""Options that do nothing while another option is at its default."""


class Support(NamedTuple):
    """Where a feature works."""

    in_search: bool
    """With beam search and contrastive search, not only with greedy decoding and sampling."""
    in_batch: bool
    """With many prompts at a time."""


SUPPORT = {
    "num_beams": Support(in_search=True, in_batch=False),
    "penalty_alpha": Support(in_search=True, in_batch=False),
    "logprobs": Support(in_search=False, in_batch=True),
    "prompt_lookup_num_tokens": Support(in_search=False, in_batch=False),
    "context_overflow='window'": Support(in_search=False, in_batch=False),
}
"""The features that do not work everywhere."""


def check_support(values: Mapping[str, Any], *, in_batch: bool = False) -> None:
    """Refuse features that the chosen decoding method, or a batch, does not have.

    Args:
        values: every option by name.
        in_batch: whether the options are those of one prompt of many.

    Raises:
        ConfigError: such a feature is used.
    """
    searches = values["num_beams"] > 1 or values["penalty_alpha"] is not None
    unused = {"num_beams": 1, "context_overflow='window'": False}
    values = {**values, "context_overflow='window'": values["context_overflow"] == "window"}
    for name, support in SUPPORT.items():
        if values[name] == unused.get(name):
            continue
        if in_batch and not support.in_batch:
            raise ConfigError(f"{name} works on one prompt at a time: drop it, or call generate for each prompt")
        if searches and not support.in_search:
            raise ConfigError(
                f"{name} works with greedy decoding and sampling only: drop it, or num_beams and penalty_alpha"
            )


def check_combination(values: Mapping[str, Any], defaults: Mapping[str, object]) -> None:
    """Refuse options that contradict each other.

    Args:
        values: every option by name, in its normal form.
        defaults: every option's default by name.

    Raises:
        ConfigError: two options exclude each other, or one needs another that is not used.
    """
    for name, needed in NEEDS.items():
        if values[name] != defaults[name] and values[needed] == defaults[needed]:
            raise ConfigError(f"{name} does nothing without {needed}: give {needed} too, or drop it")
    if values["max_new_tokens"] is not None and values["max_length"] is not None:
        raise ConfigError("max_new_tokens and max_length contradict each other: give one of them")
    for minimum, maximum in (("min_new_tokens", "max_new_tokens"), ("min_length", "max_length")):
        low, high = values[minimum], values[maximum]
        if high is not None and low > high:
            raise ConfigError(f"{minimum} is {low} but {maximum} is {high}: lower one or raise the other")
    if values["penalty_alpha"] is not None:
        _check_contrastive(values)
    if values["do_sample"] and values["mirostat_tau"] is not None:
        for name in FILTERS:
            if values[name] != defaults[name]:
                raise ConfigError(f"mirostat_tau and {name} contradict each other: mirostat finds its own cut-off")
        if values["num_beams"] > 1:
            raise ConfigError("mirostat_tau and num_beams contradict each other: give one of them")
    if values["num_beams"] > 1:
        _check_beams(values)
    elif values["num_return_sequences"] > 1 and not values["do_sample"] and values["penalty_alpha"] is None:
        raise ConfigError(
            f"num_return_sequences={values['num_return_sequences']} needs do_sample=True or as many num_beams: "
            "greedy decoding would give the same text every time"
        )
    check_support(values)


def _check_contrastive(values: Mapping[str, Any]) -> None:
    if values["do_sample"]:
        raise ConfigError("penalty_alpha is contrastive search, which draws nothing: drop do_sample")
    if values["num_beams"] > 1:
        raise ConfigError("penalty_alpha and num_beams contradict each other: give one of them")
    if values["top_k"] is None or values["top_k"] < 2:
        raise ConfigError("penalty_alpha needs a top_k of 2 or more: that many candidates compete for each place")
    if values["num_return_sequences"] > 1:
        raise ConfigError("contrastive search finds one text: drop num_return_sequences")


def _check_beams(values: Mapping[str, Any]) -> None:
    beams, groups, requested = values["num_beams"], values["num_beam_groups"], values["num_return_sequences"]
    if values["do_sample"] and values["xtc_probability"] > 0:
        raise ConfigError("xtc_probability and num_beams contradict each other: XTC works on one text at a time")
    if requested > beams:
        raise ConfigError(f"num_return_sequences is {requested} but num_beams only {beams}: raise num_beams")
    if groups == 1:
        return
    if beams % groups:
        raise ConfigError(f"num_beams must be a multiple of num_beam_groups, got {beams} and {groups}")
    if values["do_sample"]:
        raise ConfigError("num_beam_groups and do_sample contradict each other: groups draw nothing")
    if values["diversity_penalty"] == 0:
        raise ConfigError("num_beam_groups needs a diversity_penalty above 0: without it all groups are the same")


def side_effects(given: Mapping[str, Any], defaults: Mapping[str, Any], *, contrastive: bool) -> dict[str, Any]:
    """The options that change because a caller gives others: a method that the caller's options exclude is left.

    Args:
        given: the caller's options by name, in their normal form.
        defaults: every option's default by name.
        contrastive: whether the configuration that the caller changes asks for contrastive search.

    Raises:
        ConfigError: the caller gives a sampling option and `do_sample=False`.
    """
    chosen = {name for name, value in given.items() if value is not None}
    searches_beams = given.get("num_beams", 1) > 1
    contrastive = "penalty_alpha" in chosen or (contrastive and not given.get("do_sample"))
    sampling = [name for name in SAMPLING_OPTIONS if name in chosen and not (contrastive and name == "top_k")]
    if sampling and given.get("do_sample") is False:
        raise ConfigError(f"{sampling[0]} needs sampling, but do_sample is False (greedy): drop one of them")
    reset: list[str] = []
    if "max_new_tokens" in given or "max_length" in given:
        reset += ["max_new_tokens", "max_length"]
    if sampling or given.get("do_sample") or searches_beams:
        reset.append("penalty_alpha")
    if "penalty_alpha" in chosen or searches_beams:
        reset.append("prompt_lookup_num_tokens")
    if "penalty_alpha" in chosen or given.get("num_beams") == 1:
        reset += BEAMS
    if "mirostat_tau" in chosen:
        reset += FILTERS
    elif any(name in chosen for name in FILTERS):
        reset += MIROSTAT
    reset += [name for name, needed in NEEDS.items() if needed in given and given[needed] == defaults[needed]]
    changed = {name: defaults[name] for name in reset}
    if sampling:
        changed["do_sample"] = True
    elif "penalty_alpha" in chosen or searches_beams:
        changed["do_sample"] = False
    return changed
