"""A checkpoint's generation settings become options of a bundle that mean what transformers makes of the settings.

transformers drops much without a word: sampling options without `do_sample`, beam options without beams, values that
switch an option off. A bundle's file has to contain effective and valid options only, because the runtime is strict.
"""

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import transformers

from edgelm.decoding.generation_config import OPTIONS, config_from_file
from edgelm.decoding.options import BEAMS, SAMPLING_OPTIONS
from edgelm.errors import ConfigError, ExportError
from edgelm_export.source.hub import first_line, read_json

FILE = "generation_config.json"

_MAX_LENGTH = 2**31 - 1
_MAX_DRAFT_TOKENS = 64
_LEAST_TEMPERATURE = 0.001
"""The runtime takes none below. At this one, a token whose logit is 0.02 less is drawn once in 500 million times."""
# Settings that change what transformers generates, and that edgelm does not have.
_MISSING = (
    *("guidance_scale", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "watermarking_config"),
    *("constraints", "force_words_ids", "dola_layers", "token_healing"),
)
_SINGLE_IDS = ("bos_token_id", "forced_bos_token_id")
_IDS = ("eos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
_COMPARED = ("eos_token_id", "suppress_tokens", "begin_suppress_tokens")
"""Settings that transformers compares with ids as numbers, so that 2.0 means 2."""
_DECAY = "exponential_decay_length_penalty"
_BIASES = ("sequence_bias", "logit_bias")
# Values that switch a setting off in transformers; some of them are out of range in edgelm.
_OFF: dict[str, Callable[[Any], bool]] = {
    "top_k": lambda value: value == 0,
    "top_p": lambda value: value >= 1,
    "min_p": lambda value: value == 0,
    "typical_p": lambda value: value >= 1,
    "epsilon_cutoff": lambda value: not 0 < value < 1,
    "eta_cutoff": lambda value: not 0 < value < 1,
    "no_repeat_ngram_size": lambda value: value <= 0,
    "min_length": lambda value: value <= 0,
    "min_new_tokens": lambda value: value <= 0,
    "penalty_alpha": lambda value: value <= 0,
    "guidance_scale": lambda value: value == 1,
}


def read_generation_config(folder: Path) -> transformers.GenerationConfig | None:
    """The generation_config.json in `folder` as transformers reads it; None where there is no such file.

    Raises:
        ExportError: the file is damaged, or transformers refuses it.
    """
    path = folder / FILE
    return _as_transformers_reads(read_json(path), path) if path.is_file() else None


def loaded_settings(
    model: transformers.PreTrainedModel, own: transformers.GenerationConfig | None, given: Path | None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """All settings with which transformers generates by default, and notes for the person who exports.

    Args:
        model: was made of its config, whose class defaults and old keys (`repetition_penalty` in a config.json) count
            where there is no generation_config.json, or where that file was made of the config.
        own: the source's generation_config.json.
        given: a file whose settings replace the source's; null takes a setting back to its default. Here edgelm's own
            options count too.

    Raises:
        ExportError: `given` cannot be read, or names an unknown option.
    """
    if own is not None:
        model.generation_config = own
    settings: dict[str, Any] = model._prepare_generation_config(None)[0].to_dict()
    defaults = transformers.GenerationConfig().to_dict()
    ours = {name for name, option in OPTIONS.items() if option.rule.kind != "python"} - defaults.keys()
    notes = tuple(
        f"left out {name}={settings[name]!r}: transformers has no such option; give it with --generation-config"
        for name in sorted(settings.keys() & ours)
        if settings[name] is not None
    )
    settings = {name: value for name, value in settings.items() if name in defaults}
    if given is None:
        return settings, notes
    if not given.is_file():
        raise ExportError(f"there is no file {str(given)!r}; --generation-config takes a generation_config.json")
    content = read_json(given)
    known = defaults.keys() | ours
    for name in content:
        if name not in known and not name.startswith("_"):
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "docs/generation.md lists the options"
            raise ExportError(f"{str(given)!r} has the unknown generation option {name!r}; {hint}")
    _as_transformers_reads(content, given)
    return settings | {name: defaults.get(name) if value is None else value for name, value in content.items()}, notes


def bundle_settings(settings: Mapping[str, Any], vocab_size: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The content of a bundle's generation_config.json, and a note on each change to what transformers does.

    Args:
        settings: as from `loaded_settings`.
        vocab_size: of the model. An id beyond it, or the entry that contains such an id, is left out.

    Raises:
        ExportError: a setting is out of range, where transformers could not generate either.
    """
    defaults = transformers.GenerationConfig().to_dict()
    notes = [
        f"left out the generation setting {name}={settings[name]!r}: this version has no such option"
        for name in _MISSING
        if settings.get(name) not in (None, defaults[name]) and not _is_off(name, settings[name])
    ]
    kept = {n: v for n, v in settings.items() if v is not None and (n in OPTIONS or n in _SINGLE_IDS)}
    for name in _COMPARED:
        if name in kept:
            kept[name] = _as_ids(kept[name])
    if "renormalize_logits" in kept:  # transformers asks only whether it is true, as with do_sample
        kept["renormalize_logits"] = bool(kept["renormalize_logits"])
    for name in (*_SINGLE_IDS, *_IDS, *_BIASES):
        if name in kept:
            notes += _drop_unknown_ids(kept, name, vocab_size)
    kept = {name: value for name, value in kept.items() if not _is_off(name, value)}
    if _DECAY in kept and not kept.get("eos_token_id"):
        notes.append(f"left out {_DECAY}={kept.pop(_DECAY)!r}: it hastens the end, and there is no end token")
    _choose_method(kept, defaults, notes)
    _settle_certainty(kept)
    _settle_lengths(kept, notes)
    try:
        config_from_file(kept)
    except ConfigError as error:
        raise ExportError(
            f"the source's generation settings cannot be used: {error}; correct its {FILE}, or override the setting "
            "with --generation-config"
        ) from None
    return kept, tuple(notes)


def stop_ids(settings: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    """The ids at which a bundle with these settings ends a text, as `bundle_settings` leaves them."""
    kept = {"eos_token_id": settings.get("eos_token_id")}
    _drop_unknown_ids(kept, "eos_token_id", vocab_size)
    ids = kept.get("eos_token_id")
    return tuple(i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int))


def _as_transformers_reads(content: dict[str, Any], path: Path) -> transformers.GenerationConfig:
    try:
        config = transformers.GenerationConfig.from_dict(content)
        config._original_object_hash = hash(config)  # transformers looks whether somebody changed the settings
    except Exception as error:  # whatever the wrong type of a value leads to
        culprit = next((name for name, value in content.items() if _is_refused_alone(name, value)), None)
        if culprit is None:
            raise ExportError(
                f"transformers refuses {str(path)!r} ({first_line(error)}); correct or remove it"
            ) from None
        reason = "" if isinstance(error, TypeError) else f" ({first_line(error)})"
        raise ExportError(
            f"{str(path)!r} has {culprit}={content[culprit]!r:.80}, which transformers refuses{reason}; correct or "
            "remove it"
        ) from None
    return config


def _is_refused_alone(name: str, value: object) -> bool:
    """Whether transformers refuses a file with this setting only. Its own message may not name the setting."""
    try:
        transformers.GenerationConfig.from_dict({name: value})
    except Exception:
        return True
    return False


def _is_off(name: str, value: object) -> bool:
    return name in _OFF and _is_number(value) and _OFF[name](value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _as_ids(value: Any) -> Any:
    """The value with whole numbers in the place of floats that are whole."""
    if isinstance(value, list):
        return [_as_ids(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _drop_unknown_ids(kept: dict[str, Any], name: str, vocab_size: int) -> list[str]:
    """Take the entries with ids beyond the vocabulary out of the setting `name`; the note on them, if there are any."""
    value = kept[name]
    entries = list(value.items()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
    unknown = [entry for entry in entries if not _is_known(entry[0] if name in _BIASES else entry, vocab_size)]
    if not unknown:
        return []
    rest = [entry for entry in entries if entry not in unknown]
    if rest:
        kept[name] = dict(rest) if isinstance(value, dict) else rest
    else:
        del kept[name]
    shown = ", ".join(str(entry) for entry in unknown[:3])
    shown += f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
    return [f"left out {shown} of {name}: the vocabulary ends at {vocab_size - 1}"]


def _is_known(ids: object, vocab_size: int) -> bool:
    """Whether an id, or each of several ids, is in the vocabulary; what is no id is left to the runtime's rules."""
    if isinstance(ids, (list, tuple)):
        return all(_is_known(token_id, vocab_size) for token_id in ids)
    token_id = int(ids) if isinstance(ids, str) and ids.isdecimal() else ids
    return not isinstance(token_id, int) or isinstance(token_id, bool) or 0 <= token_id < vocab_size


def _choose_method(kept: dict[str, Any], defaults: dict[str, Any], notes: list[str]) -> None:
    """Keep the options of the decoding method that transformers would choose, which is never sampling by itself."""

    def drop(names: tuple[str, ...], reason: str) -> None:
        lost = [f"{n}={kept[n]!r}" for n in names if n in kept and kept[n] != defaults.get(n)]
        for name in names:
            kept.pop(name, None)
        if lost:
            notes.append(f"left out {', '.join(lost)}: no effect {reason}")

    sampling = bool(kept.pop("do_sample", False))
    searches_beams = kept.get("num_beams", 1) != 1
    candidates = kept.get("top_k", 0)
    contrastive = "penalty_alpha" in kept and not sampling and not searches_beams
    contrastive = contrastive and not (_is_number(candidates) and candidates <= 1)
    if not contrastive:
        drop(("penalty_alpha",), "without top_k above 1, with sampling, or with beams")
    if sampling:
        kept["do_sample"] = True
    else:
        drop(tuple(n for n in SAMPLING_OPTIONS if not (contrastive and n == "top_k")), "without do_sample=true")
    if not searches_beams:
        drop(BEAMS[1:], "without num_beams")
    elif kept.get("num_beam_groups", 1) == 1:
        drop(("diversity_penalty",), "without num_beam_groups")
    if searches_beams or contrastive:
        kept.pop("prompt_lookup_num_tokens", None)  # changes the speed only
    for name in [name for name in kept if name in defaults and name != "top_k" and kept[name] == defaults[name]]:
        del kept[name]
    if _is_number(kept.get("prompt_lookup_num_tokens")):
        kept["prompt_lookup_num_tokens"] = min(kept["prompt_lookup_num_tokens"], _MAX_DRAFT_TOKENS)


def _settle_certainty(kept: dict[str, Any]) -> None:
    """Say with `top_k` that only the likeliest token is left, where the runtime refuses the value that says so."""
    if _is_number(kept.get("top_p")) and kept["top_p"] == 0:
        kept["top_k"] = 1
        del kept["top_p"]
    temperature = kept.get("temperature", 1.0)
    if _is_number(temperature) and 0 < temperature < _LEAST_TEMPERATURE and "num_beams" not in kept:
        kept["top_k"] = 1
        del kept["temperature"]


def _settle_lengths(kept: dict[str, Any], notes: list[str]) -> None:
    """Where two lengths contradict each other, keep the one that transformers keeps."""
    for name in ("max_new_tokens", "max_length", "min_new_tokens", "min_length"):
        if isinstance(kept.get(name), float) and kept[name].is_integer():
            kept[name] = int(kept[name])
    for new, total in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
        if new in kept and total in kept:
            notes.append(f"left out {total}={kept.pop(total)!r}: {new} takes precedence")
    for low, high in (("min_new_tokens", "max_new_tokens"), ("min_length", "max_length")):
        if _is_number(kept.get(high)):
            kept[high] = min(kept[high], _MAX_LENGTH)
            if _is_number(kept.get(low)) and kept[low] > kept[high]:
                notes.append(f"{low}={kept[low]!r} became {kept[high]!r}, because {high} allows no more")
                kept[low] = kept[high]
