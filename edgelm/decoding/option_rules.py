"""What a value of a generation option may be: a check, the words that say it, and a normal form.

`edgelm.decoding.generation_config` joins each option's default with its rule.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from edgelm.errors import ConfigError

Check = Callable[[object], bool]
Default = TypeVar("Default")

MAX_TOKEN_ID = 2**31 - 1
MAX_LISTED = 100_000
"""Most entries of one option: ids, sequences or texts."""
MAX_SEQUENCE_TOKENS = 1024
MAX_TEXT_CHARACTERS = 1024


@dataclass(frozen=True, slots=True)
class Rule:
    """What an option takes."""

    check: Check
    limit: str
    """Completes "NAME must be ..."."""
    normalize: Callable[[object], object] = lambda value: value
    """Other ways to write the same: one id for a list of one, a dict for pairs. Returns what it cannot read as is."""

    def checked(self, name: str, value: object) -> object:
        """The value in its normal form.

        Raises:
            ConfigError: it breaks the rule.
        """
        normal = self.normalize(_plain(value))
        if not self.check(normal):
            raise ConfigError(f"{name} must be {self.limit}, got {_show(value)}")
        return normal


def option(default: Default, rule: Rule) -> Default:
    """A dataclass field that carries its rule."""
    return field(default=default, metadata={"rule": rule})


def whole(low: int, high: int | None = None) -> Rule:
    """A whole number from `low` to `high`; without `high`, any that is not less."""
    most = 2**31 - 1 if high is None else high
    words = f"a whole number, {low} or more" if high is None else f"a whole number from {low} to {_power(most)}"
    return Rule(lambda value: _is_whole(value, low, most), words)


def number(accept: Callable[[float], bool], limit: str) -> Rule:
    """A finite number that `accept` takes."""
    return Rule(lambda value: _is_number(value) and accept(float(cast(float, value))), limit)


def true_or_false() -> Rule:
    return Rule(lambda value: isinstance(value, bool), "True or False")


def or_none(rule: Rule) -> Rule:
    """None stands for "not used"."""
    return Rule(
        lambda value: value is None or rule.check(value),
        rule.limit,
        lambda value: None if value is None else rule.normalize(value),
    )


def token_ids() -> Rule:
    """Token ids; one id stands for a list of one, None for an empty list."""
    return Rule(_tuple_of(_is_token_id, MAX_LISTED), "token ids, 0 or more", _as_tuple)


def texts(most: int) -> Rule:
    """Texts; one text stands for a list of one, None for an empty list."""
    limit = f"at most {most} texts of 1 to {MAX_TEXT_CHARACTERS} characters"
    return Rule(_tuple_of(_is_text, most), limit, _as_tuple)


def texts_or_ids() -> Rule:
    """Texts and token ids, mixed."""
    return Rule(
        _tuple_of(lambda value: _is_text(value) or _is_token_id(value), MAX_LISTED), "texts or token ids", _as_tuple
    )


def token_biases() -> Rule:
    """Pairs of a token id and a number, written as a dict or as pairs; JSON's text keys count as ids."""
    return Rule(
        _tuple_of(lambda pair: _is_pair(pair) and _is_token_id(pair[0]) and _is_number(pair[1]), MAX_LISTED),
        "a dict of token ids (0 or more) and finite numbers",
        lambda value: _pairs(value, lambda key: int(key) if isinstance(key, str) and key.isdecimal() else key),
    )


def sequences() -> Rule:
    """Lists of token ids."""
    return Rule(
        _tuple_of(_is_sequence, MAX_LISTED),
        f"lists of 1 to {MAX_SEQUENCE_TOKENS} token ids",
        lambda value: () if value is None else _tuples(value),
    )


def sequence_biases() -> Rule:
    """Pairs of a list of token ids and a number, as a dict with tuples as keys or as pairs."""
    return Rule(
        _tuple_of(lambda pair: _is_pair(pair) and _is_sequence(pair[0]) and _is_number(pair[1]), MAX_LISTED),
        f"pairs of a list of 1 to {MAX_SEQUENCE_TOKENS} token ids and a finite number",
        lambda value: _pairs(value, lambda key: tuple(key) if isinstance(key, list) else key),
    )


def callables() -> Rule:
    """Functions; one stands for a list of one."""
    return Rule(_tuple_of(callable, 64), "functions of (token ids, logits), 64 at most", _as_tuple)


def _power(value: int) -> str:
    return f"2**64 - {2**64 - value}" if value > 2**63 else str(value)


def _plain(value: object) -> object:
    """A numpy number as Python's."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        plain: object = value.item()
        return plain
    return value


def _is_whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_token_id(value: object) -> bool:
    return _is_whole(value, 0, MAX_TOKEN_ID)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= MAX_TEXT_CHARACTERS


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2


def _is_sequence(value: object) -> bool:
    return isinstance(value, tuple) and 1 <= len(value) <= MAX_SEQUENCE_TOKENS and all(map(_is_token_id, value))


def _tuple_of(check: Callable[[Any], bool], most: int) -> Check:
    return lambda value: isinstance(value, tuple) and len(value) <= most and all(map(check, value))


def _as_tuple(value: object) -> object:
    if value is None:
        return ()
    if isinstance(value, (str, int)) or callable(value):
        return (value,)
    return tuple(_plain(entry) for entry in value) if isinstance(value, Iterable) else value


def _tuples(value: object) -> object:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return value
    return tuple(_as_tuple(entry) if isinstance(entry, Sequence) else entry for entry in value)


def _pairs(value: object, key_of: Callable[[object], object]) -> object:
    if value is None:
        return ()
    entries = value.items() if isinstance(value, Mapping) else value
    if not isinstance(entries, Iterable) or isinstance(entries, str):
        return value
    listed = [tuple(entry) if isinstance(entry, (list, tuple)) else entry for entry in entries]
    return tuple((key_of(e[0]), _plain(e[1])) if isinstance(e, tuple) and len(e) == 2 else e for e in listed)


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
