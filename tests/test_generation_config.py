"""Options: every limit, every contradiction, every name."""

import math
from typing import Any

import pytest

from edgelm import ConfigError, GenerationConfig
from edgelm.generation_config import config_from_file

BASE = GenerationConfig()


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("max_new_tokens", [0, 1, 10**6], [-1, 1.5, True, "3", math.nan]),
        ("max_length", [1, 10**6], [0, -1, 2.0]),
        ("do_sample", [True, False], [1, "yes"]),
        ("temperature", [1e-3, 0.7, 1000], [0, -1, 1e-4, 1e6, math.nan, math.inf, "1", True]),
        ("top_k", [1, 10**6], [0, -1, 1.5]),
        ("top_p", [1e-9, 0.5, 1], [0, -1, 2, math.nan]),
        ("min_p", [0, 0.1, 1], [-0.1, 1.1, math.nan]),
        ("repetition_penalty", [0.1, 1, 1000], [0, -1, math.inf, 1e4]),
        ("num_return_sequences", [1], [0, -1, 10**6, 1.0]),
        ("stop_strings", ["x", ["a", "b"], (), None], ["", ["a", ""], [3], 5, ["x"] * 65, "y" * 1025]),
        ("eos_token_id", [0, [1, 2], None], [-1, [1.5], "a"]),
        ("logprobs", [None, 0, 5, 1024], [-1, 1025, True, 1.5, "2"]),
        ("seed", [0, 2**64 - 1], [-1, 2**64, 1.5]),
    ],
)
def test_limits(name: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        BASE.updated({name: value})
    for value in bad:
        with pytest.raises(ConfigError, match=rf"^{name} must be "):
            BASE.updated({name: value})


def test_unknown_names_are_refused_with_a_guess() -> None:
    with pytest.raises(ConfigError, match=r"unknown generation option 'max_tokens'; did you mean 'max_new_tokens'\?"):
        BASE.updated({"max_tokens": 3})
    with pytest.raises(ConfigError, match="known are max_new_tokens"):
        BASE.updated({"zzz": 3})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 3, "max_length": 5}, "contradict"),
        ({"do_sample": False, "top_p": 0.5}, "top_p needs sampling"),
        ({"num_return_sequences": 2}, "needs do_sample=True"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BASE.updated(options)


def test_a_sampling_option_switches_sampling_on() -> None:
    assert BASE.updated({"temperature": 0.7}).do_sample
    assert not BASE.updated({"seed": 1}).do_sample


def test_greedy_over_a_sampling_default_is_no_contradiction() -> None:
    default = BASE.updated({"do_sample": True, "temperature": 0.8, "top_p": 0.95})
    assert not default.updated({"do_sample": False}).do_sample


def test_the_callers_length_replaces_the_defaults() -> None:
    default = BASE.updated({"max_length": 50})
    assert default.updated({"max_new_tokens": 3}).new_token_limit(10) == 3
    assert BASE.updated({"max_new_tokens": 3}).updated({"max_length": 30}).new_token_limit(10) == 20
    assert default.updated({"seed": 1}).new_token_limit(10) == 40


def test_default_length_and_too_short_max_length() -> None:
    assert BASE.new_token_limit(10) == 128
    with pytest.raises(ConfigError, match="max_length is 5 but the prompt already has 7 tokens"):
        BASE.updated({"max_length": 5}).new_token_limit(7)


def test_one_text_or_id_stands_for_a_list() -> None:
    config = BASE.updated({"stop_strings": "end", "eos_token_id": 3})
    assert (config.stop_strings, config.eos_token_id) == (("end",), (3,))


def test_file_settings_skip_what_other_tools_write() -> None:
    config = config_from_file({"_from_model_config": True, "bos_token_id": 0, "eos_token_id": [1, 2], "top_k": 50})
    assert config.eos_token_id == (1, 2)
    assert config.do_sample
