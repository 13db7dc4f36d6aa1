"""LoRA adapters of the families beside GPT-2: the merged model computes what peft computes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgelm.engine.graph import Graph
from edgelm_export.pipeline import export
from edgelm_export.source.checkpoint import load_checkpoint, quiet_torch
from tests.export.checkpoints import SMALL_FAMILIES, Logits, TorchModel, edit_json, save_checkpoint
from tests.export.source.test_adapter import (
    ADDED,
    BASE,
    IDS,
    change_weights,
    logits_of,
    merged,
    refusal,
    resized_logits,
    save_adapter,
    save_grown_adapter,
    unmerged_logits,
)

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'edgelm[export]'")

pytestmark = [pytest.mark.export, pytest.mark.usefixtures("few_tokens")]

MATRICES = ["q_proj", "v_proj", "gate_proj", "down_proj"]
SHAPES = {family: replace(shape, vocab=BASE.vocab) for family, shape in SMALL_FAMILIES.items()}
"""With the vocabulary of `BASE`, to which the helpers of `test_adapter` add tokens."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {family: save_checkpoint(folder / family, shape) for family, shape in SHAPES.items()}


def logits_merged_by_peft(base: Path, adapter: Path) -> Logits:
    with quiet_torch(), torch.no_grad():
        model = peft.PeftModel.from_pretrained(TorchModel(base).model, adapter).merge_and_unload().eval()
        found: Logits = model(input_ids=torch.from_numpy(IDS)[None]).logits[0].numpy()
    return found


@pytest.mark.parametrize("family", SHAPES)
def test_merged_equals_what_peft_merges(family: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases[family]
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=MATRICES)
    checkpoint = merged(base, adapter)
    found = logits_of(checkpoint)
    assert np.abs(found - logits_merged_by_peft(base, adapter)).max() <= 1e-3
    assert np.abs(found - TorchModel(base).logits(IDS)).max() > 1, "an adapter without effect would test nothing"
    assert checkpoint.config_json == load_checkpoint(str(base)).config_json
    assert checkpoint.notes == ()


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "biases": ("qwen2", {"target_modules": MATRICES, "bias": "all"}),
    "norms of heads": ("qwen3", {"target_modules": MATRICES, "modules_to_save": ["q_norm", "norm"]}),
    "tied table": ("gemma3_text", {"target_modules": [*MATRICES, "embed_tokens"]}),
    "untied table and head": ("llama", {"target_modules": [*MATRICES, "embed_tokens", "lm_head"]}),
    "saved tables": ("granite", {"target_modules": MATRICES, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "rows": ("gemma3_text", {"target_modules": MATRICES, "trainable_token_indices": [3, 5]}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_parts_are_merged_as_peft_computes_them_unmerged(
    kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    """peft 0.21 merges a changed table into the tied head too, and computes something else then."""
    family, options = KINDS[kind]
    adapter = save_adapter(bases[family], tmp_path / "adapter", **options)
    assert np.abs(logits_of(merged(bases[family], adapter)) - unmerged_logits(bases[family], adapter)).max() <= 1e-3


@pytest.mark.parametrize(
    ("family", "saved"),
    [("llama", ["embed_tokens", "lm_head"]), ("gemma3_text", ["embed_tokens"]), ("qwen2", None)],
)
def test_added_tokens_come_with_their_rows(
    family: str, saved: list[str] | None, bases: dict[str, Path], tmp_path: Path
) -> None:
    options = {"target_modules": MATRICES, "modules_to_save": saved}
    adapter = save_grown_adapter(bases[family], tmp_path / "adapter", **options)
    checkpoint, rows = merged(bases[family], adapter), BASE.vocab + ADDED
    ids = [*IDS[:10].tolist(), BASE.vocab, rows - 1]
    with torch.no_grad():
        logits = checkpoint.model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(logits - resized_logits(bases[family], adapter, rows, ids)).max() <= 1e-3
    assert checkpoint.tokenizer.vocab_size == checkpoint.architecture.vocab_size == rows
    assert json.loads(checkpoint.config_json)["vocab_size"] == rows


@pytest.mark.parametrize(
    ("family", "saved", "left"),
    [
        ("qwen2", None, "embed_tokens.weight"),
        ("gemma3_text", ["embed_tokens"], "embed_tokens.weight"),
        ("llama", None, "embed_tokens.weight"),
        ("llama", None, "lm_head.weight"),
    ],
)
def test_the_rows_of_added_tokens_come_for_table_and_head(
    family: str, saved: list[str] | None, left: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    """A table that is the head brings the head's rows; an untied one, or one that training unties, does not."""
    options = {"target_modules": MATRICES, "modules_to_save": saved}
    adapter, rows = save_grown_adapter(bases[family], tmp_path / "adapter", **options), BASE.vocab + ADDED
    ids = [*IDS[:10].tolist(), rows - 1]
    wanted = resized_logits(bases[family], adapter, rows, ids)
    change_weights(
        adapter, lambda weights: [weights.pop(k) for k in list(weights) if ".lora_" not in k and not k.endswith(left)]
    )
    if family == "qwen2":
        with torch.no_grad():
            logits = merged(bases[family], adapter).model(torch.tensor([ids])).logits[0].numpy()
        assert np.abs(logits - wanted).max() <= 1e-3
    else:
        lacking = "token table" if left == "lm_head.weight" else "head"
        assert f"does not bring their rows of the {lacking}; save it with" in refusal(bases[family], adapter)


def save_single_rows(base: Path, folder: Path, trained: list[int], *, with_tables: bool) -> Path:
    """An adapter that learned the rows of added tokens one by one, with its tokenizer."""
    torch.manual_seed(1)
    save_grown_adapter(base, folder, target_modules=MATRICES)
    with quiet_torch():
        model = TorchModel(base).model
        model.resize_token_embeddings(BASE.vocab + ADDED)
        config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=MATRICES, trainable_token_indices=trained)
        model = peft.get_peft_model(model, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * 0.2
        model.save_pretrained(folder, save_embedding_layers=with_tables)
    return folder


@pytest.mark.parametrize(("family", "with_tables"), [("gemma3_text", False), ("llama", True)])
def test_rows_of_added_tokens_that_were_learned_one_by_one(
    family: str, with_tables: bool, bases: dict[str, Path], tmp_path: Path
) -> None:
    """A tied table needs nothing else; an untied head comes whole."""
    rows = BASE.vocab + ADDED
    adapter = save_single_rows(
        bases[family], tmp_path / "adapter", [3, *range(BASE.vocab, rows)], with_tables=with_tables
    )
    ids = [*IDS[:10].tolist(), BASE.vocab, rows - 1]
    with torch.no_grad():
        logits = merged(bases[family], adapter).model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(logits - resized_logits(bases[family], adapter, rows, ids)).max() <= 1e-3


def test_added_rows_that_nobody_learned_are_missed(bases: dict[str, Path], tmp_path: Path) -> None:
    base, rows = bases["gemma3_text"], BASE.vocab + ADDED
    adapter = save_single_rows(base, tmp_path / "adapter", [rows - 1], with_tables=False)
    assert "does not bring their rows of the token table" in refusal(base, adapter)
    adapter = save_single_rows(bases["llama"], tmp_path / "other", [*range(BASE.vocab, rows)], with_tables=False)
    assert "does not bring their rows of the head" in refusal(bases["llama"], adapter)
    edit_json(adapter / "adapter_config.json", trainable_token_indices=[10**15])
    assert "does not bring their rows of the token table" in refusal(bases["llama"], adapter)
    edit_json(adapter / "adapter_config.json", trainable_token_indices={"embed_tokens": "all"})
    assert "does not fit" in refusal(bases["llama"], adapter)


def test_an_exported_bundle_computes_what_peft_computes(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_adapter(bases["qwen2"], tmp_path / "adapter", target_modules=MATRICES)
    exported = export(str(bases["qwen2"]), tmp_path / "out", "fp32", adapter=str(adapter))
    session = Graph.open(exported.bundle, device="cpu", threads=1).session()
    assert np.abs(session.score(IDS) - logits_merged_by_peft(bases["qwen2"], adapter)).max() <= 1e-3
    assert exported.bundle.manifest.source.adapter == "adapter"
