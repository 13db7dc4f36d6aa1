"""Oddities of generation_config.json, and of the older settings in config.json."""

import random
from typing import Any

from tests.against_transformers.combinations.draft import GENERATION, Draft, some


def _values(rng: random.Random, vocab_size: int) -> dict[str, Any]:
    """A value for each setting."""

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(rng.randint(low, high))]

    return {
        "repetition_penalty": rng.choice([0.5, 1, 1.0, 1.3, 5.0, None]),
        "no_repeat_ngram_size": rng.choice([0, 1, 2, 3, None]),
        "bad_words_ids": rng.choice([[ids(1, 1) for _ in range(20)], [ids(1, 3) for _ in range(9)], None]),
        "suppress_tokens": rng.choice([ids(0, 40), ids(1, 1), None]),
        "begin_suppress_tokens": rng.choice([ids(0, 60), None]),
        "forced_bos_token_id": rng.randrange(vocab_size),
        "forced_eos_token_id": rng.choice([ids(1, 1)[0], ids(1, 3)]),
        "eos_token_id": rng.choice([*ids(1, 2), ids(1, 40), ids(30, 30), None]),
        "pad_token_id": rng.choice([0, vocab_size + 7, None]),
        "bos_token_id": rng.choice([*ids(1, 1), None]),
        "min_new_tokens": rng.choice([0, 1, 5, None]),
        "min_length": rng.choice([0, 3, 9]),
        "max_new_tokens": rng.choice([1, 3, 10, None]),
        "max_length": rng.choice([12, 20, 30, 10**30]),
        "sequence_bias": [[ids(1, 2), rng.choice([-5.0, 2.5, 10.0])] for _ in range(rng.randint(1, 5))],
        "num_beams": rng.choice([1, 2, 3]),
        "early_stopping": rng.choice([True, False, "never"]),
        "length_penalty": rng.choice([0.5, 1.0, 2.0, -1.0]),
        "do_sample": rng.choice([True, False, None]),
        "temperature": rng.choice([0.7, 1.0, 1, 0.0, None]),
        "top_k": rng.choice([0, 1, 40, 50, None]),
        "top_p": rng.choice([0.9, 1, 1.0, 2.0, None]),
        "min_p": rng.choice([0.1, 0, None]),
        "typical_p": rng.choice([0.5, 1.0, None]),
        "epsilon_cutoff": rng.choice([0.0, 0.001, 1.0]),
        "renormalize_logits": rng.choice([True, False]),
        "exponential_decay_length_penalty": [rng.randint(0, 4), rng.choice([1.0, 1.1, 2])],
        "penalty_alpha": rng.choice([0, 0.0, None]),
        "remove_invalid_values": rng.choice([True, False]),
        "prompt_lookup_num_tokens": rng.choice([1, 4, 99]),
        "use_cache": rng.choice([True, False]),
        "output_scores": True,
        "return_dict_in_generate": rng.choice([True, False]),
        "transformers_version": rng.choice(["4.2.0", "5.0.0", None]),
        "decoder_start_token_id": 3,
        "num_return_sequences": rng.choice([1, 1, 2]),
        "diversity_penalty": 0.5,
        "encoder_no_repeat_ngram_size": 0,
        "guidance_scale": rng.choice([1, 1.0, None]),
        "presence_penalty": 0.5,
        "my_setting": rng.choice([1, [1], None]),
        "max_time": None,
        "stop_strings": None,
        "cache_implementation": rng.choice([None, "dynamic"]),
        "assistant_confidence_threshold": 0.4,
        "_from_model_config": False,
    }


# In a GPT2Config these keys belong to generation, as in configs that were saved before generation_config.json existed.
_OLD_KEYS: tuple[str, ...] = ("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens")
_OLD_KEYS += ("begin_suppress_tokens",)
_OLD_KEYS += ("forced_bos_token_id", "forced_eos_token_id", "min_length", "max_length", "num_beams", "early_stopping")
_OLD_KEYS += ("length_penalty", "do_sample", "temperature", "top_k", "top_p", "typical_p", "num_return_sequences")
_OLD_KEYS += ("exponential_decay_length_penalty", "remove_invalid_values", "output_scores", "diversity_penalty")

# Numbers and words of wrong types, as presets and YAML have them.
_ODD: list[dict[str, Any]] = [
    {"repetition_penalty": "1.2"},
    {"repetition_penalty": 0},
    {"repetition_penalty": -1.5},
    {"no_repeat_ngram_size": 2.0},
    {"no_repeat_ngram_size": -1},
    {"num_beams": "2"},
    {"num_beams": 0},
    {"num_beams": 2.0},
    {"max_new_tokens": "10"},
    {"max_new_tokens": 0},
    {"max_new_tokens": 7.0},
    {"max_length": -1},
    {"min_new_tokens": -5},
    {"eos_token_id": "2"},
    {"eos_token_id": []},
    {"eos_token_id": 2.0},
    {"eos_token_id": [[1], 2]},
    {"bad_words_ids": []},
    {"bad_words_ids": [[]]},
    {"bad_words_ids": [1, 2]},
    {"suppress_tokens": 5},
    {"suppress_tokens": "1,2"},
    {"begin_suppress_tokens": []},
    {"sequence_bias": {}},
    {"sequence_bias": {"(1,)": 2.0}},
    {"sequence_bias": [[[1], "x"]]},
    {"early_stopping": None},
    {"early_stopping": "yes"},
    {"temperature": "hot"},
    {"do_sample": "false"},
    {"do_sample": 0},
    {"top_k": "50"},
    {"forced_eos_token_id": "x"},
    {"exponential_decay_length_penalty": [1]},
    {"exponential_decay_length_penalty": 3},
    {"renormalize_logits": 1},
    {"num_return_sequences": 0},
    {"use_cache": "no"},
    {"pad_token_id": "x"},
    {"length_penalty": "2"},
    {"prompt_lookup_num_tokens": 0},
    {"prompt_lookup_num_tokens": -3},
    {"penalty_alpha": "0"},
]


def add_settings(draft: Draft, rng: random.Random) -> list[str]:
    """Put random settings into the draft's files; returns what they are."""
    values = _values(rng, draft.vocab_size)
    place = rng.choice(
        ["no settings", "file", "file", "file", "config.json", "made of config.json", "beside the config"]
    )
    if place == "no settings":
        return [place]
    file: dict[str, Any] = {}
    old: dict[str, Any] = {}
    if place in ("config.json", "made of config.json", "beside the config"):
        old = {name: values[name] for name in some(rng, _OLD_KEYS, 0, 3)}
    if place == "made of config.json":
        named = [name for name in ("bos_token_id", "eos_token_id") if name in draft.config]
        file = {
            "_from_model_config": True,
            **{name: draft.config[name] for name in named},
            "transformers_version": "4.30.0",
        }
    elif place in ("file", "beside the config"):
        file = {name: values[name] for name in some(rng, values, 0, 4)}
        if rng.random() < 0.15:
            file |= rng.choice(_ODD)
    draft.config |= old
    if place != "config.json":
        draft.json_files[GENERATION] = file
    return [place, *(f"{name}={str(value)[:40]}" for name, value in [*old.items(), *file.items()])]
