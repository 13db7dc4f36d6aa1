"""LoRA (Hu et al., arXiv 2106.09685) through peft: what it writes, ``edgelm export --adapter`` merges."""

from typing import Any

from edgelm_export.source.checkpoint import quiet_torch

_MATRICES = ["c_attn", "c_proj", "c_fc"]
"""All of a layer: that matters more than the rank (Dettmers et al., QLoRA, arXiv 2305.14314, section 4)."""


def with_low_rank(model: Any, rank: int) -> Any:
    """The frozen model with a product of two narrow matrices of `rank` to learn beside every matrix of its layers.

    Args:
        model: a ``transformers.GPT2LMHeadModel``.
    """
    import peft

    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.05,
        target_modules=_MATRICES,
        fan_in_fan_out=True,  # GPT-2 stores its matrices the other way round
    )
    with quiet_torch():
        return peft.get_peft_model(model, config)
