"""Loads a checkpoint from the hub or a folder, and refuses by name whatever edgelm cannot export."""

import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from edgelm.bundle.chat_template import ChatTemplate
from edgelm.bundle.manifest import Architecture, Source
from edgelm.errors import ExportError, TokenizerError
from edgelm.text.tokenizer import Tokenizer
from edgelm_export.model.families import FAMILIES, describe
from edgelm_export.model.latent import LATENT_FILE, LatentMaps, read_latent
from edgelm_export.source.chat_template import chat_files, read_source_template
from edgelm_export.source.generation_settings import loaded_settings, read_generation_config
from edgelm_export.source.gguf import unpacked
from edgelm_export.source.hub import first_line, is_gguf, locate, read_json
from edgelm_export.source.tokenizer import TOKENIZER_FILES, conversion_notes, load_tokenizer_and_eos
from edgelm_export.source.weights import read_weights

_MAX_CARD_CHARACTERS = 100_000


@dataclass(frozen=True)
class Checkpoint:
    """A loaded source: a torch model in float32 with eager attention, its tokenizer and its settings."""

    source: Source
    """The source's facts for the manifest, with the sizes before pruning and without the hash."""
    card: str
    """The source's own model card without its front matter; empty where the source has no card."""
    model: transformers.PreTrainedModel
    """A model with a language head, in eval mode."""
    tokenizer: Tokenizer
    config_json: str
    generation_settings: dict[str, Any]
    """Every setting with which transformers generates by default, under its name in ``GenerationConfig``."""
    chat_template: ChatTemplate | None
    """How the model's chats become text; None where the source does not say."""
    notes: tuple[str, ...] = ()
    """Remarks for the person who exports."""
    tokenizer_eos_token_id: int | None = None
    """The tokenizer's own end-of-text token, which may lie beyond the vocabulary. `generation_settings` says where
    generated text ends; training needs this one too."""
    latent: LatentMaps | None = None
    """The latent part beside the weights, as ``edgelm finetune --latent`` writes it."""

    @property
    def name(self) -> str:
        """Hub id, or the folder's name."""
        return self.source.name

    @property
    def architecture(self) -> Architecture:
        """The sizes of `model`."""
        return describe(self.model)


def load_checkpoint(
    source: str, revision: str | None = None, *, tokenizer: str | None = None, generation_config: Path | None = None
) -> Checkpoint:
    """Load a checkpoint of a family that edgelm exports.

    Args:
        source: a folder in Hugging Face layout, a hub id such as "gpt2", or a GGUF file.
        revision: a branch, tag or commit of a hub id.
        tokenizer: a folder or a hub id whose tokenizer takes the place of the source's.
        generation_config: file of generation settings that override the source's.

    Raises:
        ExportError: the source is missing or damaged, belongs to no such family, or uses a feature that edgelm does not
            export.
    """
    if is_gguf(source, revision):
        with quiet_torch(), unpacked(Path(source), with_tokenizer=tokenizer is None) as folder:
            checkpoint = _load_folder(folder, Path(source).stem, None, tokenizer, generation_config)
        # An adapter names its base by this.
        checkpoint.model.name_or_path = checkpoint.model.config.name_or_path = source
        return checkpoint
    folder, name, commit = locate(source, revision, _files_to_fetch, "checkpoint")
    return _load_folder(folder, name, commit, tokenizer, generation_config)


def _load_folder(
    folder: Path, name: str, commit: str | None, tokenizer: str | None, generation_config: Path | None
) -> Checkpoint:
    """Load the checkpoint called `name` in `folder`; the arguments mean what they mean in `load_checkpoint`."""
    if (folder / "bundle.json").exists():
        raise ExportError(f"{name!r} is a bundle already; export needs the original checkpoint")
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise ExportError(f"{name!r} is an adapter; give its base model, and this adapter with --adapter")
    license_name, card = _card(folder)
    config = read_json(folder / "config.json")
    with quiet_torch():
        own_settings = read_generation_config(folder)
    model, notes = _load(folder, name, config)
    with quiet_torch():
        settings, setting_notes = loaded_settings(model, own_settings, generation_config)
    loaded, eos_token_id, tokenizer_notes = _tokenizer(folder, name, tokenizer)
    notes += setting_notes + tokenizer_notes + _own_code(config, folder if tokenizer is None else None)
    parameters, vocab_size = sum(parameter.numel() for parameter in model.parameters()), model.config.vocab_size
    if beyond := loaded.limit_vocabulary(vocab_size):
        shown = ", ".join(map(repr, beyond[:3])) + (f" and {len(beyond) - 3} more" if len(beyond) > 3 else "")
        notes += (f"the tokenizer has {shown}, but the model has not: text with such a token is refused",)
    config_json = _config_json(folder, config, model)
    origin = Source(name, commit, license_name, type(model).__name__, parameters, vocab_size=vocab_size)
    template = read_source_template(folder)
    latent = read_latent(folder, model, name)
    return Checkpoint(origin, card, model, loaded, config_json, settings, template, notes, eos_token_id, latent)


def _tokenizer(folder: Path, name: str, given: str | None) -> tuple[Tokenizer, int | None, tuple[str, ...]]:
    """The tokenizer of the checkpoint `name` in `folder`, or of the folder or hub id `given`, its eos, and notes."""
    if given is not None:
        folder, name, _ = locate(given, None, lambda names: set(TOKENIZER_FILES) & names, "tokenizer")
    try:
        with quiet_torch():
            loaded, eos_token_id = load_tokenizer_and_eos(folder)
            return loaded, eos_token_id, conversion_notes(folder, loaded)
    except TokenizerError as error:
        hint = "" if given else "; or give another one with --tokenizer FOLDER_OR_ID"
        raise ExportError(f"{name!r} has no usable tokenizer: {error}{hint}") from None


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Keeps the warnings and progress bars of torch, transformers and optimum off the terminal."""
    transformers.utils.logging.disable_progress_bar()
    levels = {name: logging.getLogger(name).level for name in ("transformers", "optimum", "torch.onnx")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def check_finite(weights: Mapping[str, torch.Tensor], name: str) -> None:
    """Refuse NaN and infinity in the weights of the checkpoint or adapter `name`.

    Raises:
        ExportError: a weight contains NaN or infinity.
    """
    if bad := [key for key, value in weights.items() if not torch.isfinite(value).all()]:
        raise ExportError(f"the weight {bad[0]!r} of {name!r} contains NaN or infinity: it is damaged")


def _files_to_fetch(names: set[str]) -> set[str]:
    def matching(pattern: str) -> set[str]:
        return {name for name in names if re.fullmatch(rf"{pattern}(\.index\.json)?", name)}

    weights = matching(r"model(-\d+-of-\d+)?\.safetensors") or matching(r"pytorch_model(-\d+-of-\d+)?\.bin")
    return (
        {"README.md", "config.json", "generation_config.json", LATENT_FILE}
        | TOKENIZER_FILES
        | chat_files(names)
        | weights
    )


def _config_json(folder: Path, fields: dict[str, Any], model: transformers.PreTrainedModel) -> str:
    """The text of ``config.json``, with the model_type of the weights."""
    if fields.get("model_type") == model.config.model_type:
        return (folder / "config.json").read_text(encoding="utf-8")
    return json.dumps(fields | {"model_type": model.config.model_type}, indent=2, ensure_ascii=False) + "\n"


def _own_code(fields: Mapping[str, Any], tokenizer: Path | None) -> tuple[str, ...]:
    """A note where a checkpoint has code of its own, in the place of which transformers' own classes are used.

    transformers does the same without ``trust_remote_code``, because it has classes for the model type.

    Args:
        fields: content of config.json.
        tokenizer: folder of the tokenizer's files, where they are the checkpoint's own.
    """
    maps = [fields.get("auto_map")]
    if tokenizer is not None and (path := tokenizer / "tokenizer_config.json").is_file():
        maps.append(read_json(path).get("auto_map"))
    named = sorted({str(kind) for kinds in maps if isinstance(kinds, (dict, list)) for kind in kinds})
    if not named:
        return ()
    return (f"left out the checkpoint's own code (auto_map: {', '.join(named)}): transformers' classes take its place",)


def _card(folder: Path) -> tuple[str | None, str]:
    """The license the source's model card names in its front matter, and the card's text after it."""
    path = folder / "README.md"
    if not path.is_file():
        return None, ""
    with path.open("rb") as stream:
        text = stream.read(4 * _MAX_CARD_CHARACTERS).decode("utf-8", "replace")[:_MAX_CARD_CHARACTERS]
    text = text.replace("\r\n", "\n")
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    if match is None:
        return None, text.strip()
    license_line = re.search(r"^license:\s*['\"]?([\w.-]+)['\"]?\s*$", match[1], re.MULTILINE)
    return (license_line[1] if license_line else None), text[match.end() :].strip()


def load_model(
    folder: Path, name: str, config: transformers.PretrainedConfig, attention: str
) -> tuple[transformers.PreTrainedModel, tuple[str, ...]]:
    """Load the weights in a folder into the model that `config` describes, and refuse what lacks a weight.

    Args:
        folder: of the checkpoint.
        name: name of the checkpoint, for messages.
        config: of a family that edgelm exports.
        attention: the implementation of attention in transformers, "eager" or "sdpa".

    Returns:
        The model in float32 and eval mode, and notes on weights that were left out.

    Raises:
        ExportError: the weights are missing, incomplete, damaged, or do not fit `config`.
    """
    family = FAMILIES[config.model_type]
    weights, notes = family.fit(read_weights(folder, name), config, name)
    try:
        with quiet_torch():
            model = family.model_class.from_pretrained(
                None, config=config, state_dict=weights, attn_implementation=attention, dtype=torch.float32
            )
    except Exception as error:  # torch and transformers each raise their own kinds
        raise ExportError(f"cannot load the weights of {name!r}: {first_line(error)}") from None
    check_finite(model.state_dict(), name)
    # peft writes this name into an adapter, and asks the hub about a name that is no folder.
    model.name_or_path = model.config.name_or_path = str(folder)
    return model, notes


def _load(folder: Path, name: str, fields: Mapping[str, Any]) -> tuple[transformers.PreTrainedModel, tuple[str, ...]]:
    """The model of a checkpoint, ready for export, after everything that edgelm does not export was refused."""
    if fields.get("quantization_config"):
        raise ExportError(f"{name!r} is quantized already (quantization_config); export needs the float checkpoint")
    stated = fields.get("model_type")
    known = FAMILIES.get(stated) if isinstance(stated, str) else None
    code = fields.get("auto_map")
    is_of_model = code and not (isinstance(code, dict) and code.keys() <= {"AutoTokenizer"})
    if is_of_model and known is None:  # nothing says that a class of transformers computes the same
        raise ExportError(
            f"{name!r} has code of its own (auto_map) for the model_type {stated!r:.40}, and edgelm never runs it; if "
            "the model is a GPT-2 without changes, set model_type to 'gpt2' in config.json"
        )
    # GPT-2 checkpoints state many types, or no type, so the weights have the last word.
    candidates = [family for family in (known, FAMILIES["gpt2"]) if family is not None]
    errors: list[ExportError] = []
    for family in candidates:
        try:
            # The default attention ignores scale_attn_by_inverse_layer_idx and scale_attn_weights=False.
            model, notes = load_model(folder, name, family.read_config(fields, name), "eager")
        except ExportError as error:
            errors.append(error)
            continue
        family.prepare(model)
        return model.eval().requires_grad_(False), notes
    known_types = (
        ""
        if known is not None or stated is None
        else (f"; config.json states the model_type {stated!r:.40}, edgelm exports {', '.join(FAMILIES)}")
    )
    raise ExportError(f"{errors[0]}{known_types}") from None
