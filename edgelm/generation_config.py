"""How to continue a prompt: Hugging Face's ``GenerationConfig`` names, each default and each limit once."""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict

from edgelm.errors import ConfigError

DEFAULT_MAX_NEW_TOKENS = 128
MAX_RETURN_SEQUENCES = 1024
MAX_STOP_STRINGS = 64
MAX_LOGPROBS = 1024
MAX_STOP_STRING_CHARACTERS = 1024


class GenerationOptions(TypedDict, total=False):
    """The keyword options of `Model.generate` and `Model.stream`; meanings: `GenerationConfig`."""

    max_new_tokens: int | None
    max_length: int | None
    do_sample: bool
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    repetition_penalty: float
    num_return_sequences: int
    stop_strings: str | Sequence[str]
    eos_token_id: int | Sequence[int] | None
    seed: int | None
    logprobs: int | None


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """Options of one generation; the same words in Python, in JSON and as CLI flags."""

    max_new_tokens: int | None = None
    """Most tokens to add; 128 when `max_length` is not given either."""
    max_length: int | None = None
    """Most tokens in all, prompt included."""
    do_sample: bool = False
    """Draw tokens at random instead of taking the likeliest; a sampling option switches it on."""
    temperature: float = 1.0
    """Divides the logits before sampling: below 1 is more predictable."""
    top_k: int | None = None
    """Sample among the k likeliest tokens."""
    top_p: float = 1.0
    """Sample among the fewest tokens that hold this share of the probability."""
    min_p: float = 0.0
    """Sample among tokens at least this share as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1: makes tokens of the prompt and the text so far less likely."""
    num_return_sequences: int = 1
    """How many continuations of the prompt to draw."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end the generation; they are not in the result."""
    eos_token_id: tuple[int, ...] = ()
    """Tokens that end the generation; they are not in the result."""
    seed: int | None = None
    """Makes sampling repeatable; a fresh one is drawn when not given."""
    logprobs: int | None = None
    """Return each token's log-probability under the model, before penalties, temperature and filters, and those of
    this many of the likeliest tokens."""

    def __post_init__(self) -> None:
        for name, (check, limit) in _LIMITS.items():
            value = getattr(self, name)
            if not check(value):
                raise ConfigError(f"{name} must be {limit}, got {_show(value)}")

    def updated(self, options: Mapping[str, object]) -> "GenerationConfig":
        """This configuration with a caller's `options` over it.

        A length the caller gives replaces both lengths of this configuration, and a sampling option switches
        sampling on unless `do_sample` is given too.

        Raises:
            ConfigError: an unknown name, a value out of range, or options that contradict each other.
        """
        values: dict[str, Any] = {}
        for name, value in options.items():
            if name not in _LIMITS:
                close = difflib.get_close_matches(name, _LIMITS, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(_LIMITS)}"
                raise ConfigError(f"unknown generation option {name!r}{hint}")
            values[name] = _normalized(name, value)
        if values.get("max_new_tokens") is not None and values.get("max_length") is not None:
            raise ConfigError("max_new_tokens and max_length contradict each other: give one of them")
        if "max_new_tokens" in values or "max_length" in values:
            values = {"max_new_tokens": None, "max_length": None, **values}
        sampling = [name for name in SAMPLING_OPTIONS if name in values]
        if sampling and values.get("do_sample") is False:
            raise ConfigError(f"{sampling[0]} needs sampling, but do_sample is False (greedy): drop one of them")
        if sampling:
            values["do_sample"] = True
        config = replace(self, **values)
        if config.num_return_sequences > 1 and not config.do_sample:
            raise ConfigError(
                f"num_return_sequences={config.num_return_sequences} needs do_sample=True: "
                "greedy decoding would give the same text every time"
            )
        return config

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


SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p")


def _whole(low: int, high: int) -> Callable[[object], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(accept: Callable[[float], bool]) -> Callable[[object], bool]:
    return lambda value: (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and accept(float(value))
    )


def _or_none(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or check(value)


def _all(check: Callable[[object], bool], most: int) -> Callable[[object], bool]:
    return lambda value: isinstance(value, tuple) and len(value) <= most and all(map(check, value))


def _is_stop_string(value: object) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= MAX_STOP_STRING_CHARACTERS


_LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (_or_none(_whole(0, 2**31 - 1)), "a whole number, 0 or more"),
    "max_length": (_or_none(_whole(1, 2**31 - 1)), "a whole number, 1 or more"),
    "do_sample": (lambda value: isinstance(value, bool), "True or False"),
    "temperature": (
        _number(lambda t: 1e-3 <= t <= 1e3),
        "between 0.001 and 1000 (for greedy decoding use do_sample=False, --greedy on the command line)",
    ),
    "top_k": (_or_none(_whole(1, 2**31 - 1)), "a whole number, 1 or more"),
    "top_p": (_number(lambda p: 0 < p <= 1), "in (0, 1]"),
    "min_p": (_number(lambda p: 0 <= p <= 1), "in [0, 1]"),
    "repetition_penalty": (_number(lambda p: 0 < p <= 1e3), "more than 0 and at most 1000"),
    "num_return_sequences": (
        _whole(1, MAX_RETURN_SEQUENCES),
        f"a whole number from 1 to {MAX_RETURN_SEQUENCES}",
    ),
    "stop_strings": (
        _all(_is_stop_string, MAX_STOP_STRINGS),
        f"at most {MAX_STOP_STRINGS} texts of 1 to {MAX_STOP_STRING_CHARACTERS} characters",
    ),
    "eos_token_id": (_all(_whole(0, 2**31 - 1), 1024), "token ids, 0 or more"),
    "seed": (_or_none(_whole(0, 2**64 - 1)), "a whole number from 0 to 2**64 - 1"),
    "logprobs": (_or_none(_whole(0, MAX_LOGPROBS)), f"a whole number from 0 to {MAX_LOGPROBS}"),
}
assert set(_LIMITS) == {field.name for field in fields(GenerationConfig)}

# What other tools write into generation_config.json beside generation options.
_IGNORED_IN_FILES = {"_from_model_config", "transformers_version", "bos_token_id", "pad_token_id"}


def config_from_file(content: Mapping[str, object]) -> GenerationConfig:
    """A bundle's ``generation_config.json`` as a configuration.

    Raises:
        ConfigError: as `GenerationConfig.updated`.
    """
    return GenerationConfig().updated({k: v for k, v in content.items() if k not in _IGNORED_IN_FILES})


def _normalized(name: str, value: object) -> object:
    """One text or id stands for a list of one; a numpy number for its value."""
    if hasattr(value, "item") and not isinstance(value, (str, list, tuple)):
        value = value.item()
    if name == "stop_strings":
        if value is None or isinstance(value, str):
            return () if value is None else (value,)
        return tuple(value) if isinstance(value, Sequence) else value
    if name == "eos_token_id":
        if value is None or isinstance(value, int):
            return () if value is None else (value,)
        return tuple(value) if isinstance(value, Sequence) else value
    return value


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
