"""The shapes of models: GPT-2 in four sizes, or the shape in a config.json.

This file loads without torch and transformers, because the command line shows and checks the sizes.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelm.errors import ExportError, TrainingError
from edgelm_train.data.corpus import END_OF_TEXT_ID

if TYPE_CHECKING:
    import transformers


@dataclass(frozen=True)
class Size:
    """A shape, and the learning rate and batch that have trained it well."""

    layers: int
    width: int
    heads: int
    context: int
    vocab: int
    learning_rate: float
    """Peak learning rate of Muon; AdamW does best with half of it."""
    batch_tokens: int


SIZES = {
    "1M": Size(layers=4, width=128, heads=4, context=256, vocab=2048, learning_rate=4e-3, batch_tokens=4096),
    "6M": Size(layers=6, width=256, heads=4, context=512, vocab=4096, learning_rate=3e-3, batch_tokens=4096),
    "30M": Size(layers=8, width=512, heads=8, context=512, vocab=8192, learning_rate=2e-3, batch_tokens=16384),
    "124M": Size(layers=12, width=768, heads=12, context=1024, vocab=50257, learning_rate=1.2e-3, batch_tokens=131072),
}
"""Shapes by their number of parameters, the token table included. Heads are 32 or 64 wide, which suits the runtime's
attention without padding."""

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_SHAPE_FIELDS = ("n_layer", "n_embd", "n_head", "n_positions", "vocab_size")


def check_size(size: str) -> None:
    """Raises a TrainingError where `size` is neither a name in `SIZES` nor the path of a JSON file."""
    if size not in SIZES and not size.endswith(".json"):
        raise TrainingError(f"{size!r} is no size: give {', '.join(SIZES)} or the path of a GPT-2 config.json")


def read_shape(size: str) -> dict[str, Any]:
    """The fields of a GPT-2's config.json that the size `size` names, or that lie in the file at this path.

    Raises:
        TrainingError: `size` is neither, or the file is no configuration of a GPT-2.
    """
    check_size(size)
    if size in SIZES:
        shape = SIZES[size]
        values = (shape.layers, shape.width, shape.heads, shape.context, shape.vocab)
        return dict(zip(_SHAPE_FIELDS, values, strict=True))
    path = Path(size)
    if not path.exists() and (path.parent / "adapter_config.json").exists():
        raise TrainingError(
            f"{path.parent} is an adapter; train on with it by edgelm finetune, or merge it there with --method full"
        )
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if fields.get("model_type", "gpt2") != "gpt2":
            raise ValueError(f"pretraining takes GPT-2 only, and it is of the type {fields['model_type']!r}")
        missing = [name for name in _SHAPE_FIELDS if name not in fields]
        if missing:
            raise ValueError(f"{', '.join(missing)} is missing")
        for name in (*_SHAPE_FIELDS, *(["n_inner"] if fields.get("n_inner") is not None else [])):
            if type(fields[name]) is not int or fields[name] < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {fields[name]!r}")
        for name in ("layer_norm_epsilon", "initializer_range"):
            if not 0 < float(fields.get(name, 1e-5)) < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {fields[name]!r}")
        if fields["n_embd"] % fields["n_head"]:
            raise ValueError(f"n_embd {fields['n_embd']} is not a multiple of n_head {fields['n_head']}")
        if fields["n_positions"] % 2:
            raise ValueError(f"n_positions must be even to have half windows, got {fields['n_positions']}")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise _no_shape(size, error) from None
    return fields


def named_config(size: str) -> "transformers.GPT2Config":
    """A configuration without dropout, in the shape called `size` or in that of a GPT-2 config.json at this path.

    Raises:
        TrainingError: as for `read_shape`.
    """
    import transformers
    from transformers.activations import ACT2FN

    fields = read_shape(size)
    try:
        ends = {"bos_token_id": END_OF_TEXT_ID, "eos_token_id": END_OF_TEXT_ID}
        config = transformers.GPT2Config.from_dict(fields | NO_DROPOUT | ends)
        if config.activation_function not in ACT2FN:
            raise ValueError(f"transformers has no activation_function {config.activation_function!r}")
        for name in config._get_non_default_generation_parameters():
            setattr(config, name, None)  # transformers saves no config with such settings, which old files have
    except (ValueError, AttributeError, TypeError) as error:
        raise _no_shape(size, error) from None
    return config


def _no_shape(size: str, error: Exception) -> TrainingError:
    return TrainingError(f"cannot take the shape from {size}: {error}")


def defaults_for(config: "transformers.GPT2Config") -> Size:
    """The named size that is nearest in width; its learning rate and batch suit `config`."""
    return min(SIZES.values(), key=lambda size: abs(size.width - int(config.n_embd)))


def shape_name(config: "transformers.GPT2Config") -> str:
    """The shape in words; two different shapes have different words."""
    return (
        f"{config.n_layer} layers, {config.n_embd} wide, {config.n_head} heads, context {config.n_positions}, "
        f"vocabulary {config.vocab_size}"
    )


def load_weights(
    folder: Path, config: "transformers.GPT2Config", say: Callable[[str], None] = lambda note: None
) -> Any:
    """The model in `folder`, in float32; `say` gets a note on weights that were left out.

    Raises:
        TrainingError: the weights are missing, incomplete, or do not fit `config`.
    """
    from edgelm_export.source.checkpoint import load_model

    try:
        model, notes = load_model(folder, str(folder), config, "sdpa")
    except ExportError as error:
        raise TrainingError(str(error)) from None
    for note in notes:
        say(note)
    return model
