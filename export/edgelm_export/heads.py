"""Attention heads that were pruned (``pruned_heads``): put back as zeros, so that all layers have the same shape.

D hidden size, H heads, K heads that were kept, h head dim.
"""

from typing import Any

import torch


def restore_pruned_heads(model: Any) -> None:
    """Give every layer of a ``GPT2LMHeadModel`` all its heads again; a head of zeros adds nothing, exactly."""
    heads = model.config.n_head
    for block in model.transformer.h:
        attention = block.attn
        kept = [head for head in range(heads) if head not in attention.pruned_heads]
        if len(kept) == heads:
            continue
        attention.c_attn.weight.data = _spread(attention.c_attn.weight.data, (-1, 3), kept, heads)  # (D, 3·H·h)
        attention.c_attn.bias.data = _spread(attention.c_attn.bias.data[None], (1, 3), kept, heads)[0]  # (3·H·h,)
        out = attention.c_proj.weight.data.T  # (D, K·h)
        attention.c_proj.weight.data = _spread(out, (-1,), kept, heads).T.contiguous()  # (H·h, D)
        attention.c_attn.nf = 3 * attention.embed_dim
        attention.split_size, attention.num_heads, attention.pruned_heads = attention.embed_dim, heads, set()
    model.config.pruned_heads = {}


def _spread(columns: torch.Tensor, groups: tuple[int, ...], kept: list[int], heads: int) -> torch.Tensor:
    """Columns that lie as (..., K, h) in each group, with zeros between them: as (..., H, h)."""
    cut = columns.reshape(*groups, len(kept), -1)
    full = cut.new_zeros(*cut.shape[:-2], heads, cut.shape[-1])
    full[..., kept, :] = cut
    return full.reshape(len(columns), -1)
