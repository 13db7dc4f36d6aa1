"""Vocabulary pruning: a checkpoint that keeps only the tokens of a domain, and computes the same logits for them.

The model itself is pruned first, so that the reference graph, the drawn text and the certificate are all about the
tokens that are left.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from edgelm.errors import ExportError
from edgelm_export.source.checkpoint import Checkpoint
from edgelm_export.source.hub import read_text
from edgelm_export.source.vocabulary import prune_tokenizer

FEATURE = "pruned_vocabulary"
"""Name of this feature in the `required_features` of a bundle."""

MAX_TEXT_BYTES = 2**28

_LISTS = {"suppress_tokens", "begin_suppress_tokens"}
_NESTED_LISTS = {"bad_words_ids"}
_OTHER_IDS = ("sequence_bias", "logit_bias", "forced_decoder_ids", "force_words_ids")


def prune_vocabulary(checkpoint: Checkpoint, file: Path) -> Checkpoint:
    """Keep the tokens that `file`, UTF-8 text of the domain, needs, and the tokens that spell every other text.

    Raises:
        ExportError: the file cannot be read or is empty, or the tokenizer or a setting cannot be pruned.
    """
    text = read_text(file, "vocabulary file", MAX_TEXT_BYTES, "utf-8-sig")
    config = json.loads(checkpoint.config_json)
    size = checkpoint.architecture.vocab_size
    loaded = checkpoint.model.config.to_dict()
    named = {i for settings in (config, loaded, checkpoint.generation_settings) for i in _single_ids(settings)}
    vocabulary = prune_tokenizer(checkpoint.tokenizer, text, {i for i in named if 0 <= i < size})
    new_ids, eos = vocabulary.new_ids, checkpoint.tokenizer_eos_token_id
    _keep_rows(checkpoint.model, list(new_ids))
    for name, value in _renumbered(loaded, new_ids).items():
        if name.endswith("_token_id"):
            setattr(checkpoint.model.config, name, value)
    config = _renumbered(config, new_ids) | {"vocab_size": len(new_ids)}
    return replace(
        checkpoint,
        tokenizer=vocabulary.tokenizer,
        config_json=json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        generation_settings=_renumbered(checkpoint.generation_settings, new_ids),
        notes=(*checkpoint.notes, f"{len(new_ids):,} of {size:,} tokens stayed"),
        tokenizer_eos_token_id=None if eos is None else new_ids.get(eos),
    )


def _single_ids(settings: dict[str, Any]) -> list[int]:
    """The ids that fields like ``eos_token_id`` name."""
    values = [value for name, value in settings.items() if name.endswith("_token_id")]
    return [i for value in values for i in (value if isinstance(value, list) else [value]) if type(i) is int]


def _renumbered(settings: dict[str, Any], new_ids: dict[int, int]) -> dict[str, Any]:
    """A config with its ids renumbered. An id that was out of range stays, and is still out of range."""
    result = dict(settings)
    for name, value in settings.items():
        if name in _OTHER_IDS and value:
            raise ExportError(f"--vocabulary cannot renumber the setting {name}; remove it from the source's files")
        if name.endswith("_token_id"):
            result[name] = [new_ids.get(i, i) for i in value] if isinstance(value, list) else new_ids.get(value, value)
        elif name in _LISTS and value:  # a token that is gone need not be forbidden
            result[name] = [new_ids[i] for i in value if i in new_ids]
        elif name in _NESTED_LISTS and value:
            result[name] = [[new_ids[i] for i in word] for word in value if new_ids.keys() >= set(word)]
    return result


def _keep_rows(model: transformers.PreTrainedModel, kept: list[int]) -> None:
    """Cut the token table (V, D) and the head down to the rows `kept`."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head.weight is table.weight
    table.weight = torch.nn.Parameter(table.weight.detach()[kept])
    head.weight = table.weight if is_tied else torch.nn.Parameter(head.weight.detach()[kept])
    table.num_embeddings = head.out_features = model.config.vocab_size = len(kept)
    table.padding_idx = None  # training alone asks for it, and torch refuses one beyond the table
