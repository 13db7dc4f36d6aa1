"""The rules of generation options: which values each one takes, and which options exclude or need each other.

`edgelm.decoding.generation_config` declares every option with them. This module imports no numpy, because
``edgelm run --help`` reads the declarations.
"""

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Literal, NamedTuple, TypeVar

from edgelm.errors import ConfigError, shown
from edgelm.text.constraints import Constraint

Default = TypeVar("Default")
ListKind = Literal["texts", "ids", "sequences", "token_biases", "sequence_biases"]
Kind = Literal["switch", "whole", "number", "choice", "decay", "python", ListKind]
"""How a value is written on the command line; "python" options have no flag."""

MAX_TOKEN_ID = 2**31 - 1
MAX_ENTRIES = 100_000
"""Maximum number of entries of one option: ids, sequences or texts."""
MAX_SEQUENCE_TOKENS = 1024
MAX_TEXT_CHARACTERS = 1024


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
        """The value in its normal form. Raises ConfigError if the value breaks the rule."""
        if value is None and self.optional:
            return None
        normal = _plain(value)
        if self.normalize is not None:
            normal = self.normalize(normal)
        if not self.check(normal):
            raise ConfigError(f"{name} must be {self.limit}, got {shown(value)}")
        return normal


@dataclass(frozen=True, slots=True)
class Option:
    """The declaration of an option, beside its name, type and default, which a dataclass field has."""

    rule: Rule
    group: str
    """The heading of ``--help`` under which the flag stands."""
    meaning: str
    """The first sentence is the text of ``--help``; docs/generation.md has all of them."""
    flags: tuple[str, ...]
    """Spellings of the flag; empty for ``--`` and the name with hyphens."""
    show_default: bool | str
    """Whether ``--help`` shows the default; a text stands for it there and in docs/generation.md."""


@dataclass(frozen=True, slots=True)
class Group:
    """Options that stand under one heading of ``--help``."""

    heading: str

    def option(
        self,
        default: Default,
        rule: Rule,
        meaning: str,
        *,
        flags: tuple[str, ...] = (),
        show_default: bool | str = False,
    ) -> Default:
        """A dataclass field that carries its `Option`."""
        return field(default=default, metadata={"option": Option(rule, self.heading, meaning, flags, show_default)})


COMMON = Group("Common options")
SPEED = Group("Speed")
LENGTH = Group("Length and end")
SAMPLING = Group("More ways to sample")
REPETITION = Group("Against repetition")
TOKENS = Group("Single tokens")
SEARCH = Group("Beam search and contrastive search")
CONSTRAINT = Group("Output that obeys")
OUTPUT = Group("Output and machine")


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
    return _list_rule("texts", words, _is_text, "TEXT", limit=limit)


def texts_or_ids() -> Rule:
    """Texts and token ids, mixed."""
    return _list_rule("texts", "texts or token ids", lambda value: _is_text(value) or _is_token_id(value), "TEXT")


def token_ids() -> Rule:
    """Token ids; one id stands for a list of one, None for an empty list."""
    return _list_rule("ids", "token ids, 0 or more", _is_token_id, "ID,...")


def sequences() -> Rule:
    """Lists of token ids."""
    words = f"lists of 1 to {MAX_SEQUENCE_TOKENS} token ids"
    return _list_rule("sequences", words, _is_sequence, "ID,...", _as_tuples)


def token_biases() -> Rule:
    """Pairs of a token id and a number, written as a dict or as pairs; JSON's text keys count as ids."""
    words = "a dict of token ids (0 or more) and finite numbers"
    as_pairs = partial(_as_pairs, key_of=_as_id)
    return _list_rule("token_biases", words, partial(_is_bias, is_key=_is_token_id), "ID=X", as_pairs)


def sequence_biases() -> Rule:
    """Pairs of a list of token ids and a number, written as a dict with tuples as keys or as pairs."""
    words = f"pairs of a list of 1 to {MAX_SEQUENCE_TOKENS} token ids and a finite number"
    as_pairs = partial(_as_pairs, key_of=lambda key: tuple(key) if isinstance(key, list) else key)
    return _list_rule("sequence_biases", words, partial(_is_bias, is_key=_is_sequence), "ID,...=X", as_pairs)


def start_and_factor() -> Rule:
    """A pair of a number of tokens and a factor."""
    limit = "a pair of a number of new tokens, 0 or more, and a factor in (0, 1000]"
    normalize = lambda value: tuple(value) if isinstance(value, list) else value  # noqa: E731
    return Rule("decay", limit, _is_start_and_factor, normalize, "N FACTOR", optional=True)


def functions(limit: int) -> Rule:
    """At most `limit` functions; one function stands for a list of one."""
    words = f"functions of (token ids, logits), at most {limit}"
    return _list_rule("python", words, callable, limit=limit)


def _list_rule(
    kind: Kind,
    words: str,
    check: Callable[[object], bool],
    metavar: str = "",
    normalize: Callable[[object], object] | None = None,
    limit: int = MAX_ENTRIES,
) -> Rule:
    """A list of at most `limit` entries that pass `check`; its normal form is a tuple."""
    return Rule(kind, words, partial(_is_tuple_of, check=check, limit=limit), normalize or _as_tuple, metavar)


def constraints() -> Rule:
    """A constraint."""
    limit = "edgelm.Choices, Regex, JsonSchema or Grammar"
    return Rule("python", limit, lambda value: isinstance(value, Constraint), optional=True)


def event() -> Rule:
    """A ``threading.Event`` or an object like it."""
    limit = "a threading.Event, or an object with a method is_set()"
    return Rule("python", limit, lambda value: callable(getattr(value, "is_set", None)), optional=True)


def function() -> Rule:
    """A function of the caller's."""
    return Rule("python", "a function", callable, optional=True)


def _is_whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    # NaN and infinity fail the first comparison, and so do integers that no float can hold.
    return abs(value) <= sys.float_info.max and low <= value <= high


def _is_one_of(value: object, choices: tuple[object, ...]) -> bool:
    # A comparison alone would take 1 for True.
    return any(type(value) is type(choice) and value == choice for choice in choices)


def _is_token_id(value: object) -> bool:
    return _is_whole(value, 0, MAX_TOKEN_ID)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= MAX_TEXT_CHARACTERS


def _is_sequence(value: object) -> bool:
    return isinstance(value, tuple) and 1 <= len(value) <= MAX_SEQUENCE_TOKENS and all(map(_is_token_id, value))


def _is_bias(value: object, is_key: Callable[[object], bool]) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and is_key(value[0]) and _is_number(value[1])


def _is_start_and_factor(value: Any) -> bool:
    pair = isinstance(value, tuple) and len(value) == 2 and _is_whole(value[0], 0, 2**31 - 1)
    return pair and _is_number(value[1], high=1000) and value[1] > 0


def _is_tuple_of(value: object, check: Callable[[object], bool], limit: int) -> bool:
    return isinstance(value, tuple) and len(value) <= limit and all(map(check, value))


def _plain(value: object) -> object:
    """A numpy scalar as a Python number; any other value unchanged."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value


def _as_id(key: object) -> object:
    """A key of a JSON object as a token id, if it may be one."""
    return int(key) if isinstance(key, str) and key.isdecimal() and len(key) <= 10 else key


def _entries(values: Iterable[object]) -> list[object]:
    """The entries of a list; of too long a list, which may be endless, just enough of them to refuse it."""
    return list(islice(values, MAX_ENTRIES + 1))


def _as_tuple(value: object) -> object:
    if value is None:
        return ()
    if isinstance(value, (str, int)) or callable(value):
        return (value,)
    return tuple(map(_plain, _entries(value))) if isinstance(value, Iterable) else value


def _as_tuples(value: object) -> object:
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str):
        return value
    return tuple(_as_tuple(entry) if isinstance(entry, Sequence) else entry for entry in _entries(value))


def _as_pairs(value: object, key_of: Callable[[object], object]) -> object:
    if value is None:
        return ()
    entries = value.items() if isinstance(value, Mapping) else value
    if not isinstance(entries, Iterable) or isinstance(entries, str):
        return value
    listed = [tuple(entry) if isinstance(entry, (list, tuple)) else entry for entry in _entries(entries)]
    return tuple((key_of(e[0]), _plain(e[1])) if isinstance(e, tuple) and len(e) == 2 else e for e in listed)


XTC = ("xtc_probability", "xtc_threshold")
FILTERS = ("top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_n_sigma", *XTC)
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
    """Whether a feature works with beam search and contrastive search, and with many prompts at a time."""

    in_search: bool
    in_batch: bool


SUPPORT = {
    "num_beams": Support(in_search=True, in_batch=False),
    "penalty_alpha": Support(in_search=True, in_batch=False),
    "logprobs": Support(in_search=False, in_batch=True),
    "prompt_lookup_num_tokens": Support(in_search=False, in_batch=False),
    "prompt_progress": Support(in_search=True, in_batch=False),
    "context_overflow='window'": Support(in_search=False, in_batch=False),
}
"""Features that do not work with every decoding method and in every batch."""


def check_support(values: Mapping[str, Any], *, in_batch: bool = False) -> None:
    """Raise ConfigError if `values`, all options by name, use a feature that the method or a batch lacks."""
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
    """Raise ConfigError if two options exclude each other, or if an option needs another one that is not used.

    `values` are all options by name, in their normal form; `defaults` are their defaults by name.
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
    if values["constraint"] is not None:
        _check_constraint(values, defaults)
    if values["token_healing"]:
        _check_healing(values)
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


ENDS = ("stop_strings", "forced_eos_token_id", "forced_bos_token_id")
"""Options that say where a text begins or ends, which a constraint says too."""


def _check_constraint(values: Mapping[str, Any], defaults: Mapping[str, object]) -> None:
    for name in ENDS:
        if values[name] != defaults[name]:
            raise ConfigError(f"{name} and constraint contradict each other: the constraint says what the text may be")
    if values["penalty_alpha"] is not None:
        raise ConfigError("contrastive search (penalty_alpha) takes no constraint: drop one of them")
    if values["num_beam_groups"] > 1:
        raise ConfigError("groups of beams (num_beam_groups) take no constraint: drop one of them")


BEGINNINGS = ("constraint", "forced_bos_token_id")
"""Options that say how a text begins, which token healing says too."""


def _check_healing(values: Mapping[str, Any]) -> None:
    for name in BEGINNINGS:
        if values[name] is not None:
            raise ConfigError(f"token_healing and {name} contradict each other: both say how the new text begins")
    if values["penalty_alpha"] is not None:
        raise ConfigError("contrastive search (penalty_alpha) takes no token_healing: drop one of them")
    if values["num_beam_groups"] > 1:
        raise ConfigError("groups of beams (num_beam_groups) take no token_healing: drop one of them")


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
    """Options that change because a caller gives other options: a decoding method that these exclude is left.

    Args:
        given: the caller's options by name, in their normal form.
        defaults: every option's default by name.
        contrastive: whether the configuration that the caller changes asks for contrastive search.

    Raises ConfigError if the caller gives a sampling option and `do_sample=False`.
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
    if "constraint" in chosen:
        reset += [name for name in (*ENDS, "penalty_alpha", "token_healing") if name not in chosen]
    if given.get("token_healing"):
        reset += [name for name in (*BEGINNINGS, "penalty_alpha") if name not in chosen]
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
