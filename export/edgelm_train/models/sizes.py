"""The shapes of models: GPT-2 in four sizes, or the shape in a config.json.

This file loads without torch and transformers, because the command line shows and checks the sizes.
"""

import json
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


def named_config(size: str) -> "transformers.GPT2Config":
    """A configuration without dropout, in the shape called `size` or in that of a GPT-2 config.json at this path.

    Raises:
        TrainingError: `size` is neither, or the file is no configuration of a GPT-2.
    """
    import transformers
    from transformers.activations import ACT2FN

    check_size(size)
    if size in SIZES:
        shape = SIZES[size]
        return transformers.GPT2Config(
            **NO_DROPOUT,
            vocab_size=shape.vocab,
            n_positions=shape.context,
            n_embd=shape.width,
            n_layer=shape.layers,
            n_head=shape.heads,
            bos_token_id=END_OF_TEXT_ID,
            eos_token_id=END_OF_TEXT_ID,
        )
    try:
        fields: dict[str, Any] = json.loads(Path(size).read_text(encoding="utf-8"))
        if fields.get("model_type", "gpt2") != "gpt2":
            raise ValueError(f"it describes a {fields['model_type']!r} model, and edgelm trains GPT-2 only")
        missing = [name for name in _SHAPE_FIELDS if name not in fields]
        if missing:
            raise ValueError(f"{', '.join(missing)} is missing")
        for name in (*_SHAPE_FIELDS, *(["n_inner"] if fields.get("n_inner") is not None else [])):
            if type(fields[name]) is not int or fields[name] < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {fields[name]!r}")
        for name in ("layer_norm_epsilon", "initializer_range"):
            if not 0 < float(fields.get(name, 1e-5)) < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {fields[name]!r}")
        config = transformers.GPT2Config.from_dict(fields | NO_DROPOUT | {"bos_token_id": 0, "eos_token_id": 0})
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
        if config.n_positions % 2:
            raise ValueError(f"n_positions must be even to have half windows, got {config.n_positions}")
        if config.activation_function not in ACT2FN:
            raise ValueError(f"transformers has no activation_function {config.activation_function!r}")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise TrainingError(f"cannot take the shape from {size}: {error}") from None
    return config


def defaults_for(config: "transformers.GPT2Config") -> Size:
    """The named size that is nearest in width; its learning rate and batch suit `config`."""
    return min(SIZES.values(), key=lambda size: abs(size.width - int(config.n_embd)))


def shape_name(config: "transformers.GPT2Config") -> str:
    """The shape in words; two different shapes have different words."""
    return (
        f"{config.n_layer} layers, {config.n_embd} wide, {config.n_head} heads, context {config.n_positions}, "
        f"vocabulary {config.vocab_size}"
    )


def load_weights(folder: Path, config: "transformers.GPT2Config") -> Any:
    """The model in `folder`, in float32.

    Raises:
        TrainingError: the weights are missing, incomplete, or do not fit `config`.
    """
    from edgelm_export.source.checkpoint import load_model

    try:
        model, _ = load_model(folder, str(folder), config, "sdpa")
    except ExportError as error:
        raise TrainingError(str(error)) from None
    return model
