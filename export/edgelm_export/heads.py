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
        dim = attention.head_dim
        attention.c_attn.weight.data = _spread(attention.c_attn.weight.data, kept, heads, dim)  # (D, 3·H·h)
        attention.c_attn.bias.data = _spread(attention.c_attn.bias.data[None], kept, heads, dim)[0]  # (3·H·h,)
        attention.c_proj.weight.data = _spread(attention.c_proj.weight.data.T, kept, heads, dim).T.contiguous()
        attention.c_attn.nf = 3 * attention.embed_dim
        attention.split_size, attention.num_heads, attention.pruned_heads = attention.embed_dim, heads, set()
    model.config.pruned_heads = {}


def _spread(columns: torch.Tensor, kept: list[int], heads: int, head_dim: int) -> torch.Tensor:
    """Columns (N, G·K·h) of G groups, with zeros where heads are missing: (N, G·H·h)."""
    cut = columns.reshape(len(columns), -1, len(kept), head_dim)  # (N, G, K, h)
    full = cut.new_zeros(*cut.shape[:2], heads, head_dim)
    full[:, :, kept] = cut
    return full.reshape(len(columns), -1)
