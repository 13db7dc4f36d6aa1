"""Options: every limit, every contradiction, every name."""

import json
import math
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import click
import pytest

from edgelm import Bundle, BundleError, ConfigError, GenerationConfig
from edgelm.cli.run import command
from edgelm.decoding.generation_config import DEFAULTS, OPTIONS, GenerationOptions, bos_token_id, config_from_file
from edgelm.ids import IdArray, Logits
from tests.conftest import ROOT, replace_file

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
        (
            "stop_strings",
            ["x", ["a", "b"], (), None, ["x"] * 64, "y" * 1024],
            ["", ["a", ""], [3], 5, ["x"] * 65, "y" * 1025],
        ),
        ("eos_token_id", [0, [1, 2], None], [-1, [1.5], "a"]),
        ("logprobs", [None, 0, 5, 1024], [-1, 1025, True, 1.5, "2"]),
        ("seed", [0, 2**64 - 1], [-1, 2**64, 1.5]),
        ("min_new_tokens", [0, 5], [-1, 1.5, None]),
        ("min_length", [0, 5], [-1, "3"]),
        ("max_time", [None, 0.001, 60], [0, -1, math.inf]),
        ("typical_p", [1e-6, 1], [0, 1.01]),
        ("epsilon_cutoff", [0, 0.999], [1, -0.1]),
        ("eta_cutoff", [0, 0.999], [1, -0.1]),
        ("top_n_sigma", [None, 0.1, 100], [0, 101, "1"]),
        ("xtc_probability", [0, 1], [-0.1, 1.1]),
        ("mirostat_tau", [None, 0.1, 100], [0, 101]),
        ("presence_penalty", [-100, 0, 100], [-101, 101, math.nan]),
        ("frequency_penalty", [-100, 0, 100], [-101, 101]),
        ("no_repeat_ngram_size", [0, 1024], [-1, 1025]),
        ("dry_multiplier", [0, 100], [-1, 101]),
        (
            "logit_bias",
            [None, {}, {3: 1}, {"3": -1.5}, [(1, 2)]],
            [{-1: 1.0}, {1: math.inf}, 5, [1, 2], "ab", {"x": 1}],
        ),
        ("sequence_bias", [None, {(1, 2): 1.0}, [[[1, 2], 1.0]]], [{(): 1.0}, [[[1], "x"]], 3, {3: 1.0}]),
        ("bad_words_ids", [None, [[1], (2, 3)]], [[1, 2], [[]], [[-1]], "ab", 3]),
        ("suppress_tokens", [None, 3, [1, 2], range(3)], [-1, [0.5], "a"]),
        ("begin_suppress_tokens", [None, 3], [-1]),
        ("forced_bos_token_id", [None, 0], [-1, [1]]),
        ("forced_eos_token_id", [None, 0, [1, 2]], [-1]),
        ("exponential_decay_length_penalty", [None, (0, 1.5), [3, 2]], [(1,), (-1, 2.0), (1, 0), 3]),
        ("renormalize_logits", [True, False], [1]),
        ("num_beams", [1, 256], [0, 257, 1.0]),
        ("length_penalty", [1], [101, "1"]),
        ("early_stopping", [False], ["always", 1, None]),
        ("penalty_alpha", [None], [0, 1.1]),
        ("logits_processor", [(), None, [lambda ids, logits: logits], print], [3, ["x"], "abc"]),
    ],
)
def test_limits(name: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        BASE.updated({name: value})
    for value in bad:
        with pytest.raises(ConfigError, match=rf"^{name} must be "):
            BASE.updated({name: value})


def test_every_default_keeps_its_rule() -> None:
    for name, option in OPTIONS.items():
        assert option.rule.checked(name, DEFAULTS[name]) == DEFAULTS[name]


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
        ({"num_return_sequences": 3, "num_beams": 2}, "num_return_sequences is 3 but num_beams only 2"),
        ({"num_beams": 4, "num_beam_groups": 3, "diversity_penalty": 1.0}, "must be a multiple"),
        ({"num_beams": 4, "num_beam_groups": 2}, "needs a diversity_penalty"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0, "do_sample": True}, "draw nothing"),
        ({"num_beams": 4, "diversity_penalty": 1.0}, "diversity_penalty does nothing without num_beam_groups"),
        ({"length_penalty": 2.0}, "length_penalty does nothing without num_beams"),
        ({"early_stopping": "never"}, "early_stopping does nothing without num_beams"),
        ({"penalty_alpha": 0.5}, "needs a top_k of 2 or more"),
        ({"penalty_alpha": 0.5, "top_k": 4, "do_sample": True}, "draws nothing"),
        ({"penalty_alpha": 0.5, "top_k": 4, "num_beams": 2}, "contradict"),
        ({"penalty_alpha": 0.5, "top_k": 4, "num_return_sequences": 2}, "finds one text"),
        ({"mirostat_tau": 5.0, "top_p": 0.9}, "mirostat_tau and top_p contradict"),
        ({"mirostat_tau": 5.0, "num_beams": 2}, "mirostat_tau and num_beams contradict"),
        ({"xtc_probability": 0.5, "num_beams": 2}, "xtc_probability and num_beams contradict"),
        ({"mirostat_eta": 0.2}, "mirostat_eta does nothing without mirostat_tau"),
        ({"xtc_threshold": 0.2}, "xtc_threshold does nothing without xtc_probability"),
        ({"dry_base": 2.0}, "dry_base does nothing without dry_multiplier"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "min_new_tokens is 5 but max_new_tokens is 4"),
        ({"min_length": 5, "max_length": 4}, "min_length is 5 but max_length is 4"),
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


def test_a_search_the_caller_wants_replaces_the_default_of_sampling() -> None:
    default = BASE.updated({"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 5})
    assert not default.updated({"num_beams": 4}).do_sample
    assert default.updated({"num_beams": 4, "do_sample": True}).do_sample
    assert default.updated({"num_beams": 4, "temperature": 0.5}).do_sample
    assert not default.updated({"penalty_alpha": 0.6, "top_k": 4}).do_sample
    assert default.updated({"mirostat_tau": 5.0}).top_p == 1.0


def test_one_beam_is_no_search() -> None:
    default = BASE.updated({"do_sample": True, "temperature": 0.8, "prompt_lookup_num_tokens": 4})
    assert default.updated({"num_beams": 1}) == default


def test_a_bundle_s_settings(tiny_copy: Path) -> None:
    def write(**settings: object) -> Bundle:
        replace_file(tiny_copy, "generation_config.json", json.dumps(settings).encode())
        return Bundle.read(tiny_copy)

    bundle = write(bos_token_id=299, eos_token_id=[7, 299], top_k=5)
    assert GenerationConfig.of_bundle(bundle) == BASE.updated({"eos_token_id": [7, 299], "top_k": 5})
    assert bos_token_id(bundle) == 299
    for unknown in (300, -1, True, None, "7"):
        assert bos_token_id(write(bos_token_id=unknown)) is None
    with pytest.raises(BundleError, match="eos_token_id 300 is not in the vocabulary"):
        GenerationConfig.of_bundle(write(eos_token_id=[7, 300]))


def test_sampling_the_caller_wants_replaces_the_default_of_a_search() -> None:
    beams = BASE.updated({"num_beams": 4, "early_stopping": True, "length_penalty": 2.0})
    assert beams.updated({"num_beams": 1}) == BASE
    assert beams.updated({"num_beams": 2}) == BASE.updated(
        {"num_beams": 2, "early_stopping": True, "length_penalty": 2.0}
    )
    contrastive = BASE.updated({"penalty_alpha": 0.6, "top_k": 4})
    assert contrastive.updated({"do_sample": True}).penalty_alpha is None
    assert contrastive.updated({"top_k": 6}).penalty_alpha == 0.6
    assert contrastive.updated({"num_beams": 3}).penalty_alpha is None
    mirostat = BASE.updated({"mirostat_tau": 5.0, "mirostat_eta": 0.2})
    assert mirostat.updated({"top_k": 4}).mirostat_tau is None


def test_every_option_is_in_the_typed_dict_the_flags_and_the_page() -> None:
    names = set(OPTIONS)
    assert list(GenerationOptions.__annotations__) == list(OPTIONS)
    flags = {p.name for p in command.params if isinstance(p, click.Option)}
    assert names - {"logits_processor", "cancel", "prompt_progress", "constraint"} <= flags
    assert {"choices", "regex", "json_schema", "grammar"} <= flags  # the kinds of constraint
    page = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in names)


def test_the_typed_dict_and_the_configuration_have_the_same_types() -> None:
    """Types are equal, except where the configuration has tuples, for which a caller may give other sequences."""
    arrays = {"IdArray": IdArray, "Logits": Logits}
    keywords = get_type_hints(GenerationOptions, localns=arrays)
    for name, annotation in get_type_hints(GenerationConfig, localns=arrays).items():
        if get_origin(annotation) is not tuple:
            assert keywords[name] == annotation, name


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
