"""What is learned beside a frozen model, through peft: low-rank matrices (LoRA), or a prefix.

LoRA: Hu et al., arXiv 2106.09685; ``edgelm export --adapter`` merges its matrices. Prefix-tuning: Li and Liang,
"Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv 2101.00190; only the keys and values of a few
virtual tokens are learned. They become a file of some kilobytes, which every bundle of the base model takes
(`edgelm.load(..., prefix=...)`).
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

_MATRICES = ["c_attn", "c_proj", "c_fc"]
"""All matrices of a layer, which matters more than the rank (Dettmers et al., QLoRA, arXiv 2305.14314, section 4)."""


def with_low_rank(model: Any, rank: int) -> Any:
    """A frozen ``transformers.GPT2LMHeadModel`` with a learnable matrix of `rank` beside every matrix of a layer."""
    import peft

    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.05,
        target_modules=_MATRICES,
        fan_in_fan_out=True,  # GPT-2 stores its matrices transposed
    )
    with quiet_torch():
        return peft.get_peft_model(model, config)


def with_prefix(model: Any, start_ids: Sequence[int]) -> Any:
    """A frozen ``transformers.GPT2LMHeadModel`` with a learnable prefix of as many virtual tokens as `start_ids`.

    The prefix begins as the keys and values of `start_ids`: activations of real words are a better start than random
    numbers, above all with little data (section 7.4 of the paper). The paper's reparametrization by an MLP is left out,
    because only random starts need it.
    """
    import peft

    with quiet_torch(), torch.no_grad():
        past = model(input_ids=torch.tensor([list(start_ids)], device=model.device), use_cache=True).past_key_values
    # past[layer] is a pair: keys and values of the layer, each (1, H, T, h).
    start = torch.stack([past[layer][kind][0] for layer in range(model.config.n_layer) for kind in (0, 1)])
    with quiet_torch():
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(start_ids))
        adapted = peft.get_peft_model(model, config)
    embedding = adapted.prompt_encoder["default"].embedding
    with torch.no_grad():
        embedding.weight.copy_(start.permute(2, 0, 1, 3).reshape(embedding.weight.shape))
    return adapted


def keys_values(adapted: Any) -> KeysValues:
    """The learned prefix of a model that `with_prefix` made, as a prefix file stores it.

    The array is float32 (2·layers, H, T, h), with the keys of a layer before its values.
    """
    config = adapted.get_base_model().config
    rows = adapted.prompt_encoder["default"].embedding.weight.detach().float().cpu()  # (T, 2·layers·H·h)
    shape = rows.shape[0], 2 * config.n_layer, config.n_head, config.n_embd // config.n_head
    arrays: KeysValues = np.ascontiguousarray(rows.reshape(shape).permute(1, 2, 0, 3).numpy())
    return arrays


def save_prefix(adapted: Any, checkpoint: Checkpoint, path: Path) -> None:
    """Write the prefix file of a model that `with_prefix` made of the model of `checkpoint`.

    The file is in float32, so that a bundle in fp32 computes what peft computes.

    Raises:
        PrefixError: the prefix contains NaN or infinity.
        OSError: the file cannot be written.
    """
    sha256 = body_sha256(adapted.get_base_model())
    write_learned_prefix(path, keys_values(adapted), source=checkpoint.name, body_sha256=sha256, dtype="float32")
