"""Which generation options exclude or need each other, and what a caller's choice does to inherited ones."""

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from edgelm.errors import ConfigError

if TYPE_CHECKING:
    from edgelm.decoding.generation_config import GenerationConfig

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
"""What narrows the choice before a token is drawn."""
MIROSTAT = ("mirostat_tau", "mirostat_eta")
SAMPLING_OPTIONS = ("temperature", *FILTERS, *MIROSTAT)
"""Giving one of them means sampling."""
BEAMS = ("num_beams", "num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping")
_NEEDS = {
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
"""Options that do nothing while another is at its default."""


def check_combination(config: "GenerationConfig") -> None:
    """Refuse options that contradict each other.

    Raises:
        ConfigError: two options exclude each other, or one needs another that is not used.
    """
    defaults = _defaults(config)
    for name, other in _NEEDS.items():
        if getattr(config, name) != defaults[name] and getattr(config, other) == defaults[other]:
            raise ConfigError(f"{name} does nothing without {other}: give {other} too, or drop it")
    if config.max_new_tokens is not None and config.max_length is not None:
        raise ConfigError("max_new_tokens and max_length contradict each other: give one of them")
    for least, most in (("min_new_tokens", "max_new_tokens"), ("min_length", "max_length")):
        low, high = getattr(config, least), getattr(config, most)
        if high is not None and low > high:
            raise ConfigError(f"{least} is {low} but {most} is {high}: lower one or raise the other")
    if config.penalty_alpha is not None:
        _check_contrastive(config)
    if config.do_sample and config.mirostat_tau is not None:
        _check_mirostat(config, defaults)
    _check_beams(config)
    if config.context_overflow == "window" and (config.num_beams > 1 or config.penalty_alpha is not None):
        raise ConfigError(
            "context_overflow='window' works with greedy decoding and sampling only: drop it, or num_beams and "
            "penalty_alpha"
        )
    if config.logprobs is not None and (config.num_beams > 1 or config.penalty_alpha is not None):
        raise ConfigError(
            "logprobs come with greedy decoding and sampling only: drop it, or num_beams and penalty_alpha"
        )
    if config.prompt_lookup_num_tokens is not None and (config.num_beams > 1 or config.penalty_alpha is not None):
        raise ConfigError(
            "prompt_lookup_num_tokens works with greedy decoding and sampling only: drop it, or num_beams and "
            "penalty_alpha"
        )


def _check_contrastive(config: "GenerationConfig") -> None:
    if config.do_sample:
        raise ConfigError("penalty_alpha is contrastive search, which draws nothing: drop do_sample")
    if config.num_beams > 1:
        raise ConfigError("penalty_alpha and num_beams contradict each other: give one of them")
    if config.top_k is None or config.top_k < 2:
        raise ConfigError("penalty_alpha needs a top_k of 2 or more: that many candidates compete for each place")
    if config.num_return_sequences > 1:
        raise ConfigError("contrastive search finds one text: drop num_return_sequences")


def _check_mirostat(config: "GenerationConfig", defaults: Mapping[str, object]) -> None:
    for name in FILTERS:
        if getattr(config, name) != defaults[name]:
            raise ConfigError(f"mirostat_tau and {name} contradict each other: mirostat finds its own cut-off")
    if config.num_beams > 1:
        raise ConfigError("mirostat_tau and num_beams contradict each other: give one of them")


def _check_beams(config: "GenerationConfig") -> None:
    beams, groups, wanted = config.num_beams, config.num_beam_groups, config.num_return_sequences
    if beams == 1:
        if wanted > 1 and not config.do_sample and config.penalty_alpha is None:
            raise ConfigError(
                f"num_return_sequences={wanted} needs do_sample=True or as many num_beams: "
                "greedy decoding would give the same text every time"
            )
        return
    if config.do_sample and config.xtc_probability > 0:
        raise ConfigError("xtc_probability and num_beams contradict each other: XTC works on one text at a time")
    if wanted > beams:
        raise ConfigError(f"num_return_sequences is {wanted} but num_beams only {beams}: raise num_beams")
    if groups == 1:
        return
    if beams % groups:
        raise ConfigError(f"num_beams must be a multiple of num_beam_groups, got {beams} and {groups}")
    if config.do_sample:
        raise ConfigError("num_beam_groups and do_sample contradict each other: groups draw nothing")
    if config.diversity_penalty == 0:
        raise ConfigError("num_beam_groups needs a diversity_penalty above 0: without it all groups are the same")


def replaced_defaults(config: "GenerationConfig", given: Mapping[str, Any]) -> dict[str, Any]:
    """What a caller's options change in a configuration beside themselves.

    Raises:
        ConfigError: sampling options beside `do_sample=False`.
    """
    defaults = _defaults(config)
    chosen = {name for name, value in given.items() if value is not None}
    reset: list[str] = []
    changed: dict[str, Any] = {}
    contrastive = "penalty_alpha" in chosen or (config.penalty_alpha is not None and not given.get("do_sample"))
    sampling = [name for name in SAMPLING_OPTIONS if name in chosen and not (contrastive and name == "top_k")]
    if "max_new_tokens" in given or "max_length" in given:
        reset += ["max_new_tokens", "max_length"]
    if sampling and given.get("do_sample") is False:
        raise ConfigError(f"{sampling[0]} needs sampling, but do_sample is False (greedy): drop one of them")
    if sampling:
        changed["do_sample"] = True
    elif "penalty_alpha" in chosen or given.get("num_beams", 1) > 1:
        changed["do_sample"] = False
    if sampling or given.get("do_sample") or given.get("num_beams", 1) > 1:
        reset.append("penalty_alpha")
    if "penalty_alpha" in chosen or given.get("num_beams", 1) > 1:
        reset.append("prompt_lookup_num_tokens")
    if "penalty_alpha" in chosen or given.get("num_beams") == 1:
        reset += BEAMS
    if "mirostat_tau" in chosen:
        reset += FILTERS
    elif any(name in chosen for name in FILTERS):
        reset += MIROSTAT
    reset += [name for name, other in _NEEDS.items() if other in given and given[other] == defaults[other]]
    return {name: defaults[name] for name in reset} | changed


def _defaults(config: "GenerationConfig") -> dict[str, Any]:
    return {field.name: field.default for field in fields(config)}
