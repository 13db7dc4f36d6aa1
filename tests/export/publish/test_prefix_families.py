"""Prefixes of the families beside GPT-2: keys are turned by their positions, and a window may forget the prefix."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgelm import Model
from edgelm.engine.graph import Graph
from edgelm.loading import load
from edgelm.reuse.prefix import write_learned_prefix
from edgelm.text.tokenizer import Tokenizer
from edgelm_export.pipeline import export
from edgelm_export.source.fingerprint import body_sha256
from tests.export.checkpoints import SMALL_FAMILIES, Tiny, TinyExport, save_checkpoint
from tests.export.publish.test_prefix import LEARNED_TOKENS, TEXT, wanted_logits

pytestmark = pytest.mark.export

PROMPT = "Q: tea?"
FAMILIES = ["llama", "mistral", "qwen3", "gemma3_text"]
"""Padded heads without and with norms, a window in all layers, and a window in some."""


@pytest.fixture(params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tiny_export: TinyExport) -> Tiny:
    """An fp32 bundle."""
    return tiny_export(SMALL_FAMILIES[request.param], "fp32")


def test_a_text_gives_what_torch_gives_after_the_same_text(tiny: Tiny, tmp_path: Path) -> None:
    plain = load(tiny.exported.bundle.path, device="cpu", threads=1)
    plain.save_prefix(tmp_path / "text.prefix", TEXT)
    model = load(tiny.exported.bundle.path, device="cpu", threads=1, prefix=tmp_path / "text.prefix")
    ids = plain.tokenizer.encode(TEXT + PROMPT)
    assert len(ids) > 3 * (tiny.shape.config.get("sliding_window") or 1), "a window must forget the prefix's beginning"
    found = model.generate(PROMPT, max_new_tokens=16, do_sample=False, eos_token_id=(), logprobs=1)
    assert list(found.choices[0].token_ids) == tiny.torch.greedy(ids, 16)
    assert found.choices == plain.generate(TEXT + PROMPT, max_new_tokens=16, eos_token_id=(), logprobs=1).choices
    assert model.score(PROMPT, " yes") == plain.score(TEXT + PROMPT, " yes")


def learned(folder: Path, tiny: Tiny) -> tuple[Path, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A file of random keys and values for a checkpoint, and the same for transformers, (1, G, N, h) each."""
    facts = tiny.exported.bundle.manifest.architecture
    size = (2 * facts.num_layers, facts.num_key_value_heads, LEARNED_TOKENS, facts.source_head_dim)
    content = np.random.default_rng(0).normal(size=size).astype(np.float32)
    path = folder / "task.prefix"
    write_learned_prefix(path, content, source=tiny.source.name, body_sha256=body_sha256(tiny.torch.model))
    tensors = torch.from_numpy(content)[:, None]
    return path, [(tensors[2 * layer], tensors[2 * layer + 1]) for layer in range(facts.num_layers)]


def test_learned_keys_and_values_give_what_torch_gives(tiny: Tiny, tmp_path: Path) -> None:
    path, past = learned(tmp_path, tiny)
    ids = tiny.text()[:40].tolist()
    model = load(tiny.exported.bundle.path, device="cpu", threads=1, prefix=path)
    found, wanted = model.session.score(ids), wanted_logits(tiny, past, ids)
    assert np.abs(found - wanted).max() <= 1e-3
    assert np.abs(tiny.torch.logits(ids) - wanted).max() > 1, "a prefix without effect would test nothing"


@pytest.mark.usefixtures("few_tokens")
def test_a_text_in_a_quantized_bundle_is_the_text_before_the_prompt(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", SMALL_FAMILIES["gemma3_text"])
    (tmp_path / "task.txt").write_bytes(TEXT.encode())
    baked = export(str(source), tmp_path / "baked", "int8", accept_quality_loss=True, prefix=tmp_path / "task.txt")
    with_text = Model(Graph.open(baked.bundle, device="cpu", threads=1), Tokenizer.of_bundle(baked.bundle))
    model = load(baked.bundle.path, device="cpu", threads=1)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": True, "seed": 1, "logprobs": 1}
    found = model.generate(PROMPT, **options)
    assert found.choices == with_text.generate(TEXT + PROMPT, **options).choices
