"""A GGUF file as a source, against the checkpoint that it was made of."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from tokenizers import Tokenizer as Backend

from benchmarks.peers.convert_llama_cpp import LLAMA_NAMES
from edgelm_export.source.checkpoint import load_checkpoint
from tests.export.checkpoints import BYTE_TOKENS, Shape, refusal, save_checkpoint

pytestmark = pytest.mark.export

SHAPE = Shape(family="llama", width=64, heads=4, kv_heads=2, vocab=BYTE_TOKENS + 3, tied=False)
Edit = Callable[[gguf.GGUFWriter], Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The checkpoint that the files are made of."""
    folder = save_checkpoint(tmp_path_factory.mktemp("llama"), SHAPE)
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def write(
    path: Path, model: Any, edit: Edit = lambda writer: None, left_out: str = "", architecture: str = "llama"
) -> Path:
    """Write what llama.cpp's converter writes for a Llama: pairs of a head's numbers stand side by side there."""
    writer, config = gguf.GGUFWriter(path, architecture), model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_string("general.license", "apache-2.0")
    tokens = [*sorted(transformers.models.gpt2.tokenization_gpt2.bytes_to_unicode().values()), "<|end|>", "ab", "cd"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * BYTE_TOKENS + [3, 1, 1])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(BYTE_TOKENS)
    writer.add_eos_token_id(BYTE_TOKENS)
    writer.add_chat_template("{{ messages }}")
    edit(writer)
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    tensors = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for layer in range(config.num_hidden_layers):
        tensors |= {f"blk.{layer}.{short}": f"model.layers.{layer}.{name}" for name, short in LLAMA_NAMES.items()}
    for short, name in tensors.items():
        value: npt.NDArray[np.float32] = state[f"{name}.weight"]
        if short.endswith(("attn_q", "attn_k")):
            halves = value.reshape(-1, 2, config.head_dim // 2, value.shape[-1])  # (heads, 2, h / 2, D)
            value = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(value.shape)
        if short != left_out:
            writer.add_tensor(f"{short}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_the_checkpoint_that_it_was_made_of(model: Any, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(str(write(tmp_path / "tiny.gguf", model)))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        difference = (checkpoint.model(ids).logits - model(ids).logits).abs().max()
    assert difference <= 1e-4
    assert checkpoint.name == "tiny"
    assert checkpoint.source.license == "apache-2.0"
    assert checkpoint.generation_settings["eos_token_id"] == BYTE_TOKENS
    ids = checkpoint.tokenizer.encode("ab 12<|end|>")
    assert len(ids) == 5, "ab is a token, and a byte-level file adds no BOS"
    assert checkpoint.tokenizer.decode(ids, skip_special_tokens=False) == "ab 12<|end|>"
    assert checkpoint.chat_template is not None
    assert checkpoint.chat_template.templates == {"default": "{{ messages }}"}


def test_the_advice_of_transformers_stays_off_the_terminal(model: Any, tmp_path: Path) -> None:
    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    said: list[str] = []
    logger, heard = logging.getLogger("transformers"), Heard()
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]  # transformers says it once a process
    logger.addHandler(heard)
    try:
        load_checkpoint(str(write(tmp_path / "tiny.gguf", model)))
    finally:
        logger.removeHandler(heard)
    assert said == []


def test_a_bos_token_is_added_where_the_file_says_so(model: Any, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(
        str(write(tmp_path / "bos.gguf", model, lambda writer: writer.add_add_bos_token(True)))
    )
    assert checkpoint.tokenizer.encode("a")[0] == BYTE_TOKENS


def test_unknown_words_are_refused_unless_another_tokenizer_is_given(model: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "words.gguf", model, lambda writer: writer.add_tokenizer_pre("viking"))
    assert "'viking'" in refusal(file) and "--tokenizer" in refusal(file)
    other = save_checkpoint(tmp_path / "other", Shape())
    assert load_checkpoint(str(file), tokenizer=str(other)).name == "words"


@pytest.mark.parametrize("name", ["smollm", "llama-bpe", "qwen2", "gpt-2"])
def test_known_words(name: str, model: Any, tmp_path: Path) -> None:
    """Digits stand alone in SmolLM2 and Qwen2, in threes in Llama 3, and in any number in GPT-2."""
    checkpoint = load_checkpoint(
        str(write(tmp_path / "words.gguf", model, lambda writer: writer.add_tokenizer_pre(name)))
    )
    words = json.loads(checkpoint.tokenizer.to_json())["pre_tokenizer"]
    backend = Backend.from_str(checkpoint.tokenizer.to_json())
    assert words is not None and backend.pre_tokenizer is not None
    cut = [text for text, _ in backend.pre_tokenizer.pre_tokenize_str("a 12345")]
    assert (
        cut
        == {
            "smollm": ["a", "Ġ", "1", "2", "3", "4", "5"],
            "llama-bpe": ["a", "Ġ", "123", "45"],
            "qwen2": ["a", "Ġ", "1", "2", "3", "4", "5"],
            "gpt-2": ["a", "Ġ12345"],
        }[name]
    )


def test_what_transformers_would_leave_out_is_refused(model: Any, tmp_path: Path) -> None:
    def scaled(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_factor(8.0)

    def frequencies(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))

    assert "llama.rope.scaling.factor" in refusal(write(tmp_path / "scaled.gguf", model, scaled))
    assert "rope_freqs.weight" in refusal(write(tmp_path / "frequencies.gguf", model, frequencies))


def test_damaged_and_foreign_files_are_refused_in_one_sentence(model: Any, tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.gguf", model).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:2000])
    (tmp_path / "text.gguf").write_text("no GGUF at all")
    (tmp_path / "empty.gguf").write_bytes(b"")
    for name in ("cut", "text", "empty"):
        assert f"{name}.gguf" in refusal(tmp_path / f"{name}.gguf")
    assert "'mamba'" in refusal(write(tmp_path / "mamba.gguf", model, architecture="mamba"))
    missing = refusal(write(tmp_path / "missing.gguf", model, left_out="blk.1.ffn_up"))
    assert "model.layers.1.mlp.up_proj.weight" in missing
