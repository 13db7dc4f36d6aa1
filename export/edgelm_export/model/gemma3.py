"""Gemma 3 (text): Llama's modules with two more norms a layer, norms of queries and keys, and layers with a window."""

import torch
import transformers

from edgelm_export.model import llama
from edgelm_export.model.activations import collect_activation
from edgelm_export.model.decoder import DecoderWeights, Layer, Norm, Table


def collect(model: transformers.Gemma3ForCausalLM) -> DecoderWeights:
    """Copy the weights out of a model."""
    body, sizes = model.model, llama.describe(model.config)
    everywhere = llama.collect_rotary("rotary", body.rotary_emb, sizes)
    local = llama.collect_rotary("local_rotary", body.rotary_emb_local, sizes)

    def layer(prefix: str, block: torch.nn.Module) -> Layer:
        attention, mlp = block.self_attn, block.mlp
        return Layer(
            attention_norm=_collect_norm(block.input_layernorm),
            qkv=llama.collect_qkv(f"{prefix}.self_attn.{{q,k,v}}_proj.weight", attention, sizes),
            attention_scale=attention.scaling,
            attention_out=llama.collect_attention_out(f"{prefix}.self_attn.o_proj.weight", attention, sizes),
            mlp_norm=_collect_norm(block.pre_feedforward_layernorm),
            mlp_in=llama.joined(f"{prefix}.mlp.{{gate,up}}_proj.weight", [mlp.gate_proj, mlp.up_proj]),
            activation=collect_activation(model.config.hidden_activation, mlp.act_fn),
            mlp_out=llama.joined(f"{prefix}.mlp.down_proj.weight", [mlp.down_proj]),
            is_gated=True,
            rotary=everywhere if attention.sliding_window is None else local,
            window=attention.sliding_window,
            query_norm=llama.norm_of_heads(_collect_norm(attention.q_norm), sizes),
            key_norm=llama.norm_of_heads(_collect_norm(attention.k_norm), sizes),
            attention_out_norm=_collect_norm(block.post_attention_layernorm),
            mlp_out_norm=_collect_norm(block.post_feedforward_layernorm),
        )

    is_tied = model.lm_head.weight is body.embed_tokens.weight
    return DecoderWeights(
        model_type=model.config.model_type,
        architecture=sizes,
        token_table=Table("model.embed_tokens.weight", llama.array_of(body.embed_tokens.weight)),
        position_table=None,
        layers=tuple(layer(f"model.layers.{index}", block) for index, block in enumerate(body.layers)),
        final_norm=_collect_norm(body.norm),
        head=None if is_tied else Table("lm_head.weight", llama.array_of(model.lm_head.weight)),
        token_scale=float(body.embed_tokens.embed_scale),
    )


def _collect_norm(module: torch.nn.Module) -> Norm:
    """An RMSNorm whose weight is stored as its difference from 1."""
    return Norm(1 + llama.array_of(module.weight), None, module.eps)
