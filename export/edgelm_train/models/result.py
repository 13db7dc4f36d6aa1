"""A trained model is saved as a checkpoint that generates as its base did, and ends a text where training ended it."""

import json
from pathlib import Path
from typing import Any

import transformers

from edgelm_export.source.chat_template import write_source_template
from edgelm_export.source.checkpoint import Checkpoint, quiet_torch
from edgelm_export.source.generation_settings import FILE
from edgelm_train.data.end_of_text import EndOfText


def set_settings_aside(model: Any) -> None:
    """Take the generation settings out of a model and its config.

    transformers refuses to save a model whose settings contradict each other, though it loads such a model. Every
    checkpoint of a run would fail.
    """
    config = model.config
    with quiet_torch():
        for name in config._get_non_default_generation_parameters():
            setattr(config, name, None)
        model.generation_config = transformers.GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id
        )


def save_result(model: Any, base: Checkpoint, end: EndOfText, out: Path, *, settings: bool = True) -> None:
    """Write a trained `model` with the tokenizer of `base` into `out`.

    Args:
        settings: whether the result also generates with the settings of `base`.
    """
    if (model.config.bos_token_id or 0) >= model.config.vocab_size:  # GPT-2's 50256 in a smaller vocabulary
        model.config.bos_token_id = model.generation_config.bos_token_id = None
    model.config.eos_token_id = end.token_id
    model.generation_config.eos_token_id = end.stop_ids
    model.generation_config._from_model_config = False  # the config has room for one of the ids
    with quiet_torch():
        model.save_pretrained(out)
    base.tokenizer.save(out)
    if settings:
        defaults = transformers.GenerationConfig().to_dict()
        kept = {
            name: value
            for name, value in base.generation_settings.items()
            if value != defaults.get(name) and not name.startswith("_")
        }
        kept["eos_token_id"] = end.stop_ids
        if model.config.bos_token_id is None:
            kept.pop("bos_token_id", None)
        text = json.dumps({name: value for name, value in kept.items() if value is not None}, indent=1)
        (out / FILE).write_text(text + "\n", encoding="utf-8")
    if base.chat_template is not None:
        write_source_template(base.chat_template, out)
    if end.token_id is not None and end.token_id == base.tokenizer_eos_token_id:
        path = out / "tokenizer_config.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        token = base.tokenizer.decode([end.token_id])
        if base.tokenizer.token_id(token) == end.token_id:  # its text may differ from its name
            content["eos_token"] = token
            path.write_text(json.dumps(content), encoding="utf-8")
