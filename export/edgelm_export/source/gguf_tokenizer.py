"""The tokenizer in a GGUF file. transformers converts its vocabulary, and leaves out how a text is cut into words."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors

from edgelm.errors import ExportError

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_GPT_2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_WORDS: Mapping[str, pre_tokenizers.PreTokenizer] = {
    "gpt-2": _GPT_2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT_2]),
    "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_LLAMA_3), "isolated"), _BYTES]),
    "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_QWEN_2), "isolated"), _BYTES]),
}
"""What ``tokenizer.ggml.pre`` means: the pre-tokenizer in the tokenizer.json of the model of that name."""
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def write_tokenizer(converted: transformers.PreTrainedTokenizerFast, facts: Mapping[str, Any], folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`.

    Args:
        converted: what transformers made of the file.
        facts: the file's facts about its tokenizer, without ``tokenizer.ggml.`` before their names.
        folder: of the checkpoint.

    Raises:
        ExportError: the file cuts texts into words in a way that is not known here.
    """
    backend: Tokenizer = Tokenizer.from_str(converted.backend_tokenizer.to_str())
    is_byte_level = facts.get("model") == "gpt2"
    if is_byte_level:
        _cut_into_words(backend, str(facts.get("pre", "gpt-2")))
    tokens = {name: _token(facts, f"{key}_token_id") for name, key in _SPECIAL.items()}
    bos = tokens["bos_token"]
    backend.post_processor = None
    # Where the file does not say, llama.cpp adds BOS for sentencepiece models and for Llama 3.
    usual = not is_byte_level or facts.get("pre") == "llama-bpe"
    if bos is not None and facts.get("add_bos_token", usual):
        pair = (bos, facts["bos_token_id"])
        backend.post_processor = processors.TemplateProcessing(single=f"{bos}:0 $A:0", special_tokens=[pair])
    backend.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {name: token for name, token in tokens.items() if token is not None}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if converted.chat_template is not None:
        settings["chat_template"] = converted.chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")


def _cut_into_words(backend: Tokenizer, name: str) -> None:
    """Give a byte-level tokenizer the words of the model called `name`."""
    if name not in _WORDS:
        raise ExportError(
            f"its texts are cut into words as in {name!r} (tokenizer.ggml.pre), and edgelm knows {', '.join(_WORDS)}; "
            "give the tokenizer of the original checkpoint with --tokenizer FOLDER_OR_ID"
        )
    backend.normalizer = normalizers.NFC() if name == "qwen2" else None
    backend.pre_tokenizer = _WORDS[name]
    backend.decoder = decoders.ByteLevel()
    if name == "llama-bpe":  # a word that is a token stays whole, whatever the merges say
        backend.model.ignore_merges = True


def _token(facts: Mapping[str, Any], name: str) -> str | None:
    """The text of the token whose id the file states."""
    token_id, tokens = facts.get(name), facts.get("tokens", [])
    return tokens[token_id] if isinstance(token_id, int) and 0 <= token_id < len(tokens) else None
