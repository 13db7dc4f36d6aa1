"""A tiny checkpoint with a real tokenizer, and data for it to learn."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

WORDS = ["red", "green", "blue", "cat", "dog", "bird", "sun", "moon"]


@dataclass(frozen=True)
class Playground:
    """Files that tests must not change."""

    base: Path
    """A random GPT-2 in Hugging Face layout: 2 layers, 32 wide, context 64."""
    text: Path
    reversals: Path
    """JSON Lines: "prompt" has two words, "completion" has the two words in reverse order."""


@pytest.fixture(scope="session")
def playground(tmp_path_factory: pytest.TempPathFactory) -> Playground:
    import torch
    import transformers

    from edgelm_train.data.bpe import save_bpe, train_bpe
    from tests.export.checkpoints import randomize

    folder = tmp_path_factory.mktemp("playground")
    draw = random.Random(0)
    text = "\n".join(" ".join(draw.choices(WORDS, k=8)) for _ in range(120))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    rows = [{"prompt": f"{one} {two} ->", "completion": f" {two} {one}"} for one in WORDS for two in WORDS]
    (folder / "reversals.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tokenizer = train_bpe([text], 280)
    config = transformers.GPT2Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    randomize(model)
    model.save_pretrained(folder / "base")
    save_bpe(tokenizer, folder / "base")
    return Playground(folder / "base", folder / "text.txt", folder / "reversals.jsonl")
