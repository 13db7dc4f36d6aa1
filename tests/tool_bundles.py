"""Copies of bundles whose chat template has tools."""

import json
import shutil
from pathlib import Path

from edgelm.bundle.chat_template import CHAT_TEMPLATE_FILE
from tests.conftest import replace_file
from tests.text.tool_templates import TAGS, TOOL_TEMPLATES

TOKENS = ["<|im_end|>", "[TOOL_CALLS]", "[INST]", "[/INST]"]
"""Special tokens that the copies have beside the tags of calls."""


def make_tool_bundle(source: Path, folder: Path, template: str, *, tags: str = "added") -> Path:
    """A copy of the bundle `source` with one of `TOOL_TEMPLATES`, or another one, and with tokens of that template.

    The tokens take the ids of the last merges. The model never saw any of it, so it writes nonsense that obeys.

    Args:
        source: the bundle to copy; its tokenizer is byte-level BPE.
        folder: the copy is made in it.
        template: a name of `TOOL_TEMPLATES`, or a template.
        tags: what ``<tool_call>`` and the like are: "added" or "special" tokens, or plain "text".
    """
    bundle = Path(shutil.copytree(source, folder / f"tools-{tags}"))
    tokenizer = json.loads((bundle / "tokenizer.json").read_text(encoding="utf-8"))
    kinds = [(token, True) for token in TOKENS] + [(tag, tags == "special") for tag in TAGS if tags != "text"]
    vocab, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    size = len(vocab)
    for token in sorted(vocab, key=lambda token: -int(vocab[token]))[: len(kinds)]:
        del vocab[token]
    del merges[len(merges) - len(kinds) :]
    for token_id, (token, special) in enumerate(kinds, size - len(kinds)):
        flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
        tokenizer["added_tokens"].append({"id": token_id, "content": token, **flags, "special": special})
    replace_file(bundle, "tokenizer.json", json.dumps(tokenizer).encode())
    content = {
        "templates": {"default": TOOL_TEMPLATES.get(template, template)},
        "special_tokens": {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"},
    }
    replace_file(bundle, CHAT_TEMPLATE_FILE, json.dumps(content).encode())
    return bundle
