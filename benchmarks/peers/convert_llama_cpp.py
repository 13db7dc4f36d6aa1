"""Converts a GPT-2 or a Llama checkpoint to GGUF and quantizes it, by llama.cpp itself.

    python -m benchmarks.peers.convert_llama_cpp CHECKPOINT FOLDER Q8_0|Q4_0

Writes `model.gguf`, and `types.json` with the bytes stored in each format and the format of the tied head.
`benchmarks.peers` runs it in llama.cpp's environment.
"""

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Weights = Mapping[str, npt.NDArray[np.float32]]

# Names of a layer's parts, from transformers to GGUF.
GPT2_NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
LLAMA_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(checkpoint: Path, file: Path) -> None:
    """Write weights in float16, vectors in float32 and the tokenizer, as llama.cpp's converter does."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    weights = load_file(checkpoint / "model.safetensors")
    write = {"gpt2": _write_gpt2, "llama": _write_llama}.get(config["model_type"])
    if write is None:
        raise SystemExit(f"no converter to GGUF for model_type {config['model_type']!r}: give a gpt2 or a llama")
    writer = gguf.GGUFWriter(file, config["model_type"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    _add_tokenizer(writer, checkpoint, config)
    write(writer, config, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_gpt2(writer: Any, config: dict[str, Any], weights: Weights) -> None:
    weights = {name.removeprefix("transformer."): array for name, array in weights.items()}
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_tensor("token_embd.weight", weights["wte.weight"].astype(np.float16))  # also the head, which is tied
    writer.add_tensor("position_embd.weight", weights["wpe.weight"].astype(np.float32))
    writer.add_tensor("output_norm.weight", weights["ln_f.weight"].astype(np.float32))
    writer.add_tensor("output_norm.bias", weights["ln_f.bias"].astype(np.float32))
    for layer in range(config["n_layer"]):
        for part, name in GPT2_NAMES.items():
            weight = weights[f"h.{layer}.{part}.weight"]
            if weight.ndim == 2:
                weight = np.ascontiguousarray(weight.T).astype(np.float16)  # (K, N) to (N, K)
            writer.add_tensor(f"blk.{layer}.{name}.weight", weight)
            writer.add_tensor(f"blk.{layer}.{name}.bias", weights[f"h.{layer}.{part}.bias"].astype(np.float32))


def _write_llama(writer: Any, config: dict[str, Any], weights: Weights) -> None:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"].astype(np.float16))
    if not config["tie_word_embeddings"]:
        writer.add_tensor("output.weight", weights["lm_head.weight"].astype(np.float16))
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"].astype(np.float32))
    for layer in range(config["num_hidden_layers"]):
        for part, name in LLAMA_NAMES.items():
            weight = weights[f"model.layers.{layer}.{part}.weight"]
            if name in ("attn_q", "attn_k"):
                weight = _neighbouring_pairs(weight, heads if name == "attn_q" else kv_heads)
            writer.add_tensor(
                f"blk.{layer}.{name}.weight", weight.astype(np.float16 if weight.ndim == 2 else np.float32)
            )


def _neighbouring_pairs(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """The rows (H·D, K) of q or k in llama.cpp's order: it rotates neighbours, transformers the halves of a head."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])  # (H, 2, D/2, K)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def _add_tokenizer(writer: Any, checkpoint: Path, config: dict[str, Any]) -> None:
    import gguf

    vocabulary = config["vocab_size"]
    model = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    words = [word for word, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    words += [f"<unused {index}>" for index in range(len(words), vocabulary)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    for name, add in (("bos_token_id", writer.add_bos_token_id), ("eos_token_id", writer.add_eos_token_id)):
        if isinstance(config.get(name), int) and 0 <= config[name] < vocabulary:
            add(config[name])
    writer.add_token_list(words)
    writer.add_token_types([int(gguf.TokenType.NORMAL)] * len(words))
    # llama.cpp needs merges, and GGUF has no empty lists. The byte tokenizer gets one merge, of its first two bytes.
    writer.add_token_merges(merges or [f"{words[0]} {words[1]}"])


def quantize(source: Path, target: Path, file_type: str) -> None:
    """Quantize as `llama-quantize SOURCE TARGET FILE_TYPE` does."""
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{file_type}")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), options):
        raise SystemExit(f"llama.cpp could not quantize to {file_type}")


def stored_types(file: Path) -> dict[str, object]:
    """Bytes by format, and the format of the token table, which is also the head."""
    import gguf

    tensors = gguf.GGUFReader(file).tensors
    stored: Counter[str] = Counter()
    for tensor in tensors:
        stored[tensor.tensor_type.name] += int(tensor.n_bytes)
    head = next(tensor.tensor_type.name for tensor in tensors if tensor.name == "token_embd.weight")
    return {"bytes": dict(stored), "head": head}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.convert_llama_cpp", description="Convert a checkpoint to GGUF."
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("file_type", choices=("Q8_0", "Q4_0"))
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    half, file = folder / "half.gguf", folder / "model.gguf"
    write_gguf(options.checkpoint, half)
    quantize(half, file, options.file_type)
    half.unlink()
    (folder / "types.json").write_text(json.dumps(stored_types(file)), encoding="utf-8")


if __name__ == "__main__":
    main()
