"""LoRA adapters (Hu et al., arXiv 2106.09685) in peft's layout, merged into their base model before anything else.

peft does the arithmetic. It drops unexpected weights, and starts missing weights at random, with a warning at most.
Here every weight of the adapter must have its place, and the merged model must compute what the unmerged model did.
"""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers

from edgelm.errors import ExportError, TokenizerError, install_hint
from edgelm_export.model.stored_names import name_weights
from edgelm_export.source.checkpoint import Checkpoint, check_finite, quiet_torch
from edgelm_export.source.hub import GGUF_SUFFIX, first_line, locate, read_json
from edgelm_export.source.tokenizer import (
    TOKENIZER_FILES,
    VOCABULARY_FILES,
    conversion_notes,
    load_tokenizer_and_eos,
)
from edgelm_export.source.weights import read_weights_file

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""Names of the weights' file. The first file that exists is read."""

MERGE_TOLERANCE = 1e-3
"""By how much merging may change a logit, relative to the largest logit."""

_PASSED_ON = (
    *("task_type", "target_modules", "exclude_modules", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "bias"),
    *("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices"),
    *("layers_to_transform", "layers_pattern", "ensure_weight_tying"),
)
_WITHOUT_EFFECT = {  # on a trained adapter
    *("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("lora_dropout", "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("megatron_core", "qalora_group_size", "runtime_config"),
}
_STARTS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

_Weights: TypeAlias = dict[str, torch.Tensor]
"""Weights by their names."""


def merge_adapter(checkpoint: Checkpoint, adapter: str) -> Checkpoint:
    """The checkpoint with a LoRA adapter merged into its model.

    Args:
        checkpoint: the base of the adapter.
        adapter: a folder that peft wrote, or a hub id.

    Raises:
        ExportError: peft is missing; the adapter is no LoRA, uses a feature that cannot be merged or is damaged; or it
            was trained on a different base.
    """
    if importlib.util.find_spec("peft") is None:
        raise ExportError(f"--adapter needs peft; {install_hint('cpu,export')}")
    if checkpoint.latent is not None:
        raise ExportError(
            f"{checkpoint.name!r} has a latent part, which fits its own weights only: export it without an adapter"
        )
    folder, name, commit = locate(adapter, None, lambda names: {CONFIG, *WEIGHTS, *TOKENIZER_FILES}, "LoRA adapter")
    config = read_json(folder / CONFIG, "no adapter that peft wrote")
    options = _options(config, name)
    weights = _read_weights(folder, name)
    base_rows = checkpoint.model.config.vocab_size
    with quiet_torch():
        checkpoint, token_notes = _with_its_tokens(checkpoint, folder, name, options, weights)
        model = _merged(checkpoint, name, options, weights)
    config_json, changes = checkpoint.config_json, {}
    if not model.config.tie_word_embeddings:
        changes["tie_word_embeddings"] = False
    if model.config.vocab_size != base_rows:
        changes["vocab_size"] = model.config.vocab_size
    if changes:
        config_json = json.dumps(json.loads(config_json) | changes, indent=2) + "\n"
    notes = checkpoint.notes + token_notes
    base = str(config.get("base_model_name_or_path") or checkpoint.name)
    if Path(base).name.removesuffix(GGUF_SUFFIX) != Path(checkpoint.name).name:
        notes += (f"the adapter {name!r} says it was trained on {base!r}, and was merged into {checkpoint.name!r}",)
    source = replace(
        checkpoint.source, adapter=f"{name}@{commit}" if commit else name, vocab_size=model.config.vocab_size
    )
    return replace(checkpoint, source=source, model=model, config_json=config_json, notes=notes)


def trainable_adapter(checkpoint: Checkpoint, folder: Path) -> Any:
    """The model of `checkpoint` with a LoRA adapter beside it, unmerged, so that training can go on with the adapter.

    Args:
        checkpoint: the base of the adapter. Its model becomes the frozen part of the result.
        folder: of the adapter.

    Raises:
        ExportError: as for `merge_adapter`; or the adapter has added tokens or whole weights, and not LoRA's alone.
    """
    config, name = read_json(folder / CONFIG, "no adapter that peft wrote"), folder.resolve().name
    options, weights = _options(config, name), _read_weights(folder, name)
    if whole := [key for key in weights if ".lora_" not in key]:
        raise ExportError(
            f"the adapter {name!r} has more than LoRA's matrices ({whole[0]}); merge it, with --method full"
        )
    options["lora_dropout"] = config.get("lora_dropout") or 0.0
    with quiet_torch():
        return _adapted(checkpoint, name, options, weights, trainable=True)


def _options(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The options that peft gets. An option that would have no effect is refused."""
    if config.get("peft_type") != "LORA":
        raise ExportError(f"{name!r} is a {config.get('peft_type')!r} adapter; edgelm merges LoRA adapters only")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise ExportError(f"{name!r} is an adapter for the task {config['task_type']!r}, which generates no text")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_STARTS_THAT_CHANGE_THE_BASE):
        raise ExportError(
            f"{name!r} changed its base as it began (init_lora_weights {start!r}); save it as a plain LoRA with peft's "
            "path_initial_model_for_weight_conversion"
        )
    for key, value in config.items():
        if value and key not in _WITHOUT_EFFECT and key not in _PASSED_ON:
            raise ExportError(f"{name!r} uses {key} ({json.dumps(value)[:60]}), which edgelm cannot merge")
    return {key: config[key] for key in _PASSED_ON if config.get(key) is not None}


def _read_weights(folder: Path, name: str) -> _Weights:
    path = next((folder / file for file in WEIGHTS if (folder / file).is_file()), None)
    if path is None:
        raise ExportError(f"{name!r} has no weights; looked for {' and '.join(WEIGHTS)}")
    weights = read_weights_file(path, name)
    for key in [key for key in weights if ".modules_to_save." in key]:
        twin = weights.get(key.replace(".modules_to_save.", "."))  # peft saves a grown token table twice
        if twin is not None and torch.equal(twin, weights[key]):
            del weights[key]
    check_finite(weights, name)
    return weights


def _with_its_tokens(
    checkpoint: Checkpoint, folder: Path, name: str, options: dict[str, Any], weights: _Weights
) -> tuple[Checkpoint, tuple[str, ...]]:
    """The base with the adapter's tokenizer, and with as many rows of its token table as the adapter was trained with.

    New rows are zeros, because the adapter brings their content: its token table is a whole one. Rows at the end go
    where somebody cut a padded table to the length of the tokenizer before training.

    Args:
        checkpoint: the base of the adapter.
        folder: of the adapter.
        name: of the adapter, for messages.
        options: of the adapter.
        weights: of the adapter.
    """
    model = checkpoint.model
    base_rows = model.config.vocab_size
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    paths = _path(model, table), _path(model, head)
    stored = {path: _stored_rows(weights, path) for path in paths}
    stated = [value.shape[1] for key, value in weights.items() if key.endswith(f".{paths[0]}.lora_embedding_A")]
    single = _single_rows(options, base_rows)
    if single:
        stated.append(single[-1] + 1)
        if len(single) == single[-1] + 1 - base_rows:
            stored[paths[0]].append(single[-1] + 1)
    rows = max([*stored[paths[0]], *stored[paths[1]], *stated], default=base_rows)
    tokenizer, eos_token_id = checkpoint.tokenizer, checkpoint.tokenizer_eos_token_id
    if any((folder / file).is_file() for file in VOCABULARY_FILES):
        try:
            tokenizer, eos_token_id = load_tokenizer_and_eos(folder)
        except TokenizerError as error:
            raise ExportError(f"the tokenizer of the adapter {name!r} cannot be used: {error}") from None
    if rows > base_rows and tokenizer is checkpoint.tokenizer:
        raise ExportError(
            f"the adapter {name!r} does not fit {checkpoint.name!r}: it was trained with {rows - base_rows} added "
            f"tokens ({rows} instead of {base_rows}), and does not bring their tokenizer; put its tokenizer files into "
            "its folder"
        )
    # A table that training saved whole is no longer the head.
    saved = options.get("modules_to_save")
    saved_names = {str(part).rpartition(".")[2] for part in saved} if isinstance(saved, list) else set()
    is_one = head.weight is table.weight and paths[0].rpartition(".")[2] not in saved_names
    brought = [path for path in paths if rows in stored[path]]
    if rows > base_rows and len(brought) < (1 if is_one or options.get("ensure_weight_tying") else 2):
        lacking = "head" if brought == [paths[0]] else "token table"
        raise ExportError(
            f"the adapter {name!r} does not fit {checkpoint.name!r}: it was trained with {rows - base_rows} added "
            f"tokens ({rows} instead of {base_rows}), and does not bring their rows of the {lacking}; save it with "
            "save_embedding_layers=True"
        )
    notes: tuple[str, ...] = ()
    if tokenizer.vocab_size > rows and tokenizer is not checkpoint.tokenizer:
        notes += (
            f"left out the tokenizer of the adapter {name!r}: {tokenizer.vocab_size - rows} of its added tokens have "
            f"no row in the token table of {rows}",
        )
        tokenizer, eos_token_id = checkpoint.tokenizer, checkpoint.tokenizer_eos_token_id
    elif tokenizer is not checkpoint.tokenizer:
        notes += conversion_notes(folder, tokenizer)
    if rows < base_rows:
        if lost := tokenizer.limit_vocabulary(rows):
            raise ExportError(
                f"the adapter {name!r} does not fit {checkpoint.name!r}: it was trained with {rows} tokens instead of "
                f"{base_rows}, and brings no tokenizer without the token {lost[0]!r}; check its base"
            )
        notes += (
            f"left out the last {base_rows - rows} rows of the token table: the adapter {name!r} was trained without "
            "them, and no token needs them",
        )
    if rows != base_rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
        with torch.no_grad():
            for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
                weight[base_rows:] = 0
        model.requires_grad_(False)
    source = replace(checkpoint.source, parameters=sum(parameter.numel() for parameter in model.parameters()))
    return replace(checkpoint, source=source, tokenizer=tokenizer, tokenizer_eos_token_id=eos_token_id), notes


def _stored_rows(weights: _Weights, path: str) -> list[int]:
    """How many rows the whole tables have that an adapter brings for the module at `path`."""
    kinds = "", ".modules_to_save", ".token_adapter.base_layer"
    ends = tuple(f".{path}{kind}.weight" for kind in kinds)
    return [value.shape[0] for key, value in weights.items() if key.endswith(ends)]


def _single_rows(options: dict[str, Any], base_rows: int) -> list[int]:
    """The ids from `base_rows` on, ascending, whose rows an adapter brings one by one."""
    given = options.get("trainable_token_indices") or []
    lists = list(given.values()) if isinstance(given, dict) else [given]
    ids = {i for part in lists if isinstance(part, list) for i in part if type(i) is int}
    return sorted(i for i in ids if i >= base_rows)


def _path(model: torch.nn.Module, part: torch.nn.Module) -> str:
    """The path of the module `part` inside `model`."""
    path: str = next(path for path, module in model.named_modules() if module is part)
    return path


def _adapted(
    checkpoint: Checkpoint, name: str, options: dict[str, Any], weights: _Weights, *, trainable: bool = False
) -> Any:
    """peft's model of the base with the adapter's `weights`, each in its place."""
    import peft

    misfit = f"the adapter {name!r} does not fit {checkpoint.name!r}"
    try:
        config = peft.LoraConfig(**options, inference_mode=not trainable)
        config.base_model_name_or_path = checkpoint.model.name_or_path
        adapted = peft.PeftModel(checkpoint.model, config).eval()
        expected = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    except Exception as error:  # peft raises whatever its layers do
        raise ExportError(f"{misfit}: {first_line(error)}") from None
    _check_weights(weights, expected, adapted.state_dict(), misfit)
    try:
        peft.set_peft_model_state_dict(adapted, weights)
    except Exception as error:
        raise ExportError(f"the adapter {name!r} cannot be loaded: {first_line(error)}") from None
    return adapted


def _merged(
    checkpoint: Checkpoint, name: str, options: dict[str, Any], weights: _Weights
) -> transformers.PreTrainedModel:
    model, sizes = checkpoint.model, checkpoint.architecture
    head, table = model.get_output_embeddings(), model.get_input_embeddings().weight
    was_tied = head.weight is table
    head_name = _path(model, head)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    ids = torch.arange(min(sizes.context_length, 64))[None] * 7 % sizes.vocab_size  # (1, T)
    adapted = _adapted(checkpoint, name, options, weights)
    try:
        with torch.no_grad():
            unmerged_logits = adapted(input_ids=ids).logits
            _untie(adapted, head_name, table)
            merged = adapted.merge_and_unload(safe_merge=True).eval()
            merged_logits = merged(input_ids=ids).logits
    except Exception as error:
        raise ExportError(f"the adapter {name!r} cannot be merged: {first_line(error)}") from None
    if {key: value.shape for key, value in merged.state_dict().items()} != shapes or not torch.allclose(
        merged_logits, unmerged_logits, rtol=0, atol=MERGE_TOLERANCE * max(1.0, float(unmerged_logits.abs().max()))
    ):
        raise ExportError(f"the adapter {name!r} cannot be merged: the merged model computes something else")
    head, table = merged.get_output_embeddings(), merged.get_input_embeddings().weight
    merged.config.tie_word_embeddings = was_tied and torch.equal(head.weight, table)
    if merged.config.tie_word_embeddings:
        head.weight = table
    return merged


def _check_weights(weights: _Weights, expected: _Weights, known: _Weights, misfit: str) -> None:
    """Refuse `weights` of an adapter that are not the `expected` weights, which peft would save, with their shapes.

    An adapter may also have a token table, by its name among the `known` weights of the model with the adapter.
    """
    places = known | expected
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - places.keys())
    if extra:
        raise ExportError(f"{misfit}: the model has no place for {name_weights(extra)}")
    if missing:
        raise ExportError(f"{misfit}: it lacks {name_weights(missing)}")
    for key, value in weights.items():
        if value.shape != places[key].shape:
            raise ExportError(f"{misfit}: {key!r} has the shape {tuple(value.shape)}, not {tuple(places[key].shape)}")


def _untie(adapted: torch.nn.Module, head_name: str, table: torch.Tensor) -> None:
    """Give the head a copy of the tied table, because a change merged into one of them must not reach the other."""
    for path, module in adapted.named_modules():
        if head_name in path.split(".") and module._parameters.get("weight") is table:
            module.weight = torch.nn.Parameter(table.detach().clone(), requires_grad=False)
