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
import transformers

from edgelm.ids import KeysValues
from edgelm.reuse.prefix import write_learned_prefix
from edgelm_export.model.families import describe
from edgelm_export.source.checkpoint import Checkpoint, quiet_torch
from edgelm_export.source.fingerprint import body_sha256


def with_low_rank(model: Any, rank: int) -> Any:
    """A frozen model of any family with a learnable matrix of `rank` beside every matrix of a layer."""
    import peft

    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank,
        target_modules=_matrices(model),
        fan_in_fan_out=model.config.model_type == "gpt2",  # which stores its matrices transposed
    )
    with quiet_torch():
        return peft.get_peft_model(model, config)


def _matrices(model: Any) -> list[str]:
    """The names of all matrices of the layers of a model.

    That all are adapted matters more than the rank (Dettmers et al., QLoRA, arXiv 2305.14314, section 4).
    """
    head, kinds = model.get_output_embeddings(), (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    modules = ((path, part) for path, part in model.named_modules() if isinstance(part, kinds) and part is not head)
    return sorted({path.rpartition(".")[2] for path, _ in modules})


def with_prefix(model: Any, start_ids: Sequence[int]) -> Any:
    """A frozen model of any family with a learnable prefix of as many virtual tokens as `start_ids`.

    The prefix begins as the keys and values of `start_ids`: activations of real words are a better start than random
    numbers, above all with little data (section 7.4 of the paper). The paper's reparametrization by an MLP is left out,
    because only random starts need it.
    """
    import peft

    with quiet_torch(), torch.no_grad():
        past = (
            transformers.DynamicCache()
        )  # a cache of the model's own choice forgets what layers with windows cannot see
        model(input_ids=torch.tensor([list(start_ids)], device=model.device), past_key_values=past, use_cache=True)
    # Keys and values of a layer are (1, G, T, h) each.
    start = torch.stack([part[0] for layer in past.layers for part in (layer.keys, layer.values)])
    with quiet_torch():
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(start_ids))
        adapted = peft.get_peft_model(model, config)
    embedding = adapted.prompt_encoder["default"].embedding
    with torch.no_grad():
        embedding.weight.copy_(start.permute(2, 0, 1, 3).reshape(embedding.weight.shape))
    return adapted


def keys_values(adapted: Any) -> KeysValues:
    """The learned prefix of a model that `with_prefix` made, as a prefix file stores it.

    The array is float32 (2·layers, G, T, h) of G key-value heads, with the keys of a layer before its values.
    """
    sizes = describe(adapted.get_base_model())
    rows = adapted.prompt_encoder["default"].embedding.weight.detach().float().cpu()  # (T, 2·layers·G·h)
    shape = rows.shape[0], 2 * sizes.num_layers, sizes.num_key_value_heads, sizes.source_head_dim
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
