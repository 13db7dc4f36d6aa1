"""Gemma 3 (text): Llama's modules with two more norms a layer, norms of queries and keys, and layers with a window."""

from dataclasses import replace

import torch
import transformers

from edgelm_export.model import llama
from edgelm_export.model.decoder import DecoderWeights, Layer, Norm


def collect(model: transformers.Gemma3ForCausalLM) -> DecoderWeights:
    """Copy the weights out of a model."""
    body, sizes = model.model, llama.describe(model.config)
    everywhere = llama.collect_rotary("rotary", body.rotary_emb, sizes)
    local = llama.collect_rotary("local_rotary", body.rotary_emb_local, sizes)

    def layer(prefix: str, block: torch.nn.Module) -> Layer:
        rotary = everywhere if block.self_attn.sliding_window is None else local
        return replace(
            llama.collect_layer(prefix, block, model.config, sizes, rotary, _collect_norm),
            mlp_norm=_collect_norm(block.pre_feedforward_layernorm),
            attention_out_norm=_collect_norm(block.post_attention_layernorm),
            mlp_out_norm=_collect_norm(block.post_feedforward_layernorm),
        )

    layers = tuple(layer(f"model.layers.{index}", block) for index, block in enumerate(body.layers))
    weights = llama.collect_around(model, layers, _collect_norm)
    return replace(weights, token_scale=float(body.embed_tokens.embed_scale))


def _collect_norm(module: torch.nn.Module) -> Norm:
    """An RMSNorm whose weight is stored as its difference from 1."""
    return Norm(1 + module.weight.detach().numpy().astype("float32"), None, module.eps)
