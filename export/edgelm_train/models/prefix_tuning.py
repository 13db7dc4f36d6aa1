"""Prefix-tuning: the keys and values of a few virtual tokens are all that is learned.

Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv 2101.00190, through peft. What it
gives is a file of kilobytes that every bundle of the base takes (`edgelm.load(..., prefix=...)`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgelm.ids import KeysValues
from edgelm.reuse.prefix import write_learned_prefix
from edgelm_export.source.checkpoint import Checkpoint, quiet_torch
from edgelm_export.source.fingerprint import body_sha256


def with_prefix(model: Any, start_ids: Sequence[int]) -> Any:
    """The frozen model behind a prefix to learn, which begins as the keys and values of real tokens.

    Section 7.4 of the paper: activations of real words are a better start than random numbers, most of all with
    little data. The paper's reparametrization by an MLP, which random starts need, is left out.

    Args:
        model: a ``transformers.GPT2LMHeadModel``.
        start_ids: the real tokens, as many as there will be virtual ones.
    """
    import peft

    with quiet_torch(), torch.no_grad():
        past = model(input_ids=torch.tensor([list(start_ids)], device=model.device), use_cache=True).past_key_values
    # past[layer] is the layer's keys and values, each (1, H, T, h).
    content = torch.stack([past[layer][kind][0] for layer in range(model.config.n_layer) for kind in (0, 1)])
    with quiet_torch():
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(start_ids))
        adapted = peft.get_peft_model(model, config)
    embedding = adapted.prompt_encoder["default"].embedding
    with torch.no_grad():
        embedding.weight.copy_(content.permute(2, 0, 1, 3).reshape(embedding.weight.shape))
    return adapted


def keys_values(adapted: Any) -> KeysValues:
    """What peft learned, as a prefix file has it: float32 (2·layers, H, T, h), each layer's keys, then its values."""
    facts = adapted.get_base_model().config
    rows = adapted.prompt_encoder["default"].embedding.weight.detach().float().cpu()  # (T, 2·layers·H·h)
    shape = rows.shape[0], 2 * facts.n_layer, facts.n_head, facts.n_embd // facts.n_head
    content: KeysValues = np.ascontiguousarray(rows.reshape(shape).permute(1, 2, 0, 3).numpy())
    return content


def save_prefix(adapted: Any, checkpoint: Checkpoint, path: Path) -> None:
    """Write the prefix file, in float32: a bundle in fp32 then computes what peft does.

    Raises:
        PrefixError: a number is no number.
        OSError: the file cannot be written.
    """
    write_learned_prefix(
        path,
        keys_values(adapted),
        source=checkpoint.name,
        body_sha256=body_sha256(adapted.get_base_model()),
        dtype="float32",
    )
