"""LoRA adapters are merged as peft itself computes them, and refused by name where that is impossible."""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgelm.engine.graph import Graph
from edgelm.errors import ExportError
from edgelm_export.pipeline import export
from edgelm_export.source.adapter import merge_adapter
from edgelm_export.source.checkpoint import Checkpoint, load_checkpoint, quiet_torch
from tests.conftest import RunCommand
from tests.export.checkpoints import Logits, Shape, TorchModel, edit_json, greedy, save_checkpoint

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'edgelm[export]'")

pytestmark = [pytest.mark.export, pytest.mark.usefixtures("few_tokens")]

BASE = Shape(width=20, heads=4, context=16, vocab=54)
IDS = np.random.default_rng(0).integers(0, 54, 16)

KINDS: dict[str, dict[str, Any]] = {
    "usual": {},
    "all-linear": {"target_modules": ["c_attn", "c_proj", "c_fc"], "lora_alpha": 3, "use_rslora": True},
    "rank-pattern": {
        "target_modules": ["c_attn", "c_fc"],
        "rank_pattern": {"h.0.attn.c_attn": 7, "c_fc": 2},
        "alpha_pattern": {"h.1.mlp.c_fc": 5},
    },
    "some-layers": {"layers_to_transform": [1], "layers_pattern": "h"},
    "dora": {"target_modules": ["c_attn"], "use_dora": True},
    "biases": {"bias": "all"},
    "saved-norm": {"modules_to_save": ["ln_f"]},
    "saved-head": {"modules_to_save": ["lm_head"]},
    "saved-table": {"modules_to_save": ["wte"]},
    "table": {"target_modules": ["wte", "c_attn"]},
    "head": {"target_modules": ["lm_head"]},
    "tokens": {"trainable_token_indices": [3, 5]},
    "fan-out": {"fan_in_fan_out": True},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("base") / "tiny", BASE)


def save_adapter(base: Path, folder: Path, **options: Any) -> Path:
    """An adapter with random weights, as peft writes it."""
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | options
    with quiet_torch():
        model = peft.get_peft_model(TorchModel(base).model, peft.LoraConfig(**settings))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * 0.2
        model.save_pretrained(folder)
    return folder


def unmerged_logits(base: Path, adapter: Path) -> Logits:
    """What peft computes for `IDS`, without merging."""
    with quiet_torch(), torch.no_grad():
        model = peft.PeftModel.from_pretrained(TorchModel(base).model, adapter).eval()
        found: Logits = model(input_ids=torch.from_numpy(IDS)[None]).logits[0].numpy()
    return found


def merged(base: Path, adapter: Path) -> Checkpoint:
    return merge_adapter(load_checkpoint(str(base)), str(adapter))


def logits_of(checkpoint: Checkpoint) -> Logits:
    with torch.no_grad():
        found: Logits = checkpoint.model(torch.from_numpy(IDS)[None]).logits[0].numpy()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_unmerged(kind: str, base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", **KINDS[kind])
    wanted = unmerged_logits(base, adapter)
    checkpoint = merged(base, adapter)
    assert np.abs(logits_of(checkpoint) - wanted).max() <= 1e-4
    assert np.abs(TorchModel(base).logits(IDS) - wanted).max() > 0.01, "an adapter without effect would test nothing"
    assert checkpoint.source.adapter == "adapter"
    tied = checkpoint.model.lm_head.weight is checkpoint.model.transformer.wte.weight
    assert tied == (kind not in ("saved-head", "saved-table", "table", "head"))
    assert json.loads(checkpoint.config_json).get("tie_word_embeddings", True) == tied
    assert checkpoint.notes == ()


def test_untied_base(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "untied", Shape(width=20, context=16, vocab=54, tied=False))
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["lm_head", "c_attn"])
    assert np.abs(logits_of(merged(base, adapter)) - unmerged_logits(base, adapter)).max() <= 1e-4


@pytest.mark.parametrize("kind", ["usual", "head"])
def test_exported_bundle_computes_what_peft_computes(kind: str, base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", **KINDS[kind])
    exported = export(str(base), tmp_path / "out", "fp32", adapter=str(adapter))
    session = Graph.open(exported.bundle, device="cpu", threads=1).session()
    assert np.abs(session.score(IDS) - unmerged_logits(base, adapter)).max() <= 1e-3
    model = merged(base, adapter).model
    with torch.no_grad():
        ids = IDS[:3].tolist()
        for _ in range(14):
            ids.append(int(model(torch.tensor(ids)[None]).logits[0, -1].argmax()))
    assert greedy(session, ids[:3], 14) == ids[3:]
    assert exported.certificate.passed
    source = exported.bundle.manifest.source
    assert (source.name, source.adapter) == ("tiny", "adapter")
    assert "adapter **adapter**" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_half_precision_and_bin_weights(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter")
    weights = {key: value.half() for key, value in load_file(adapter / "adapter_model.safetensors").items()}
    torch.save(weights, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert np.abs(logits_of(merged(base, adapter)) - unmerged_logits(base, adapter)).max() <= 1e-4


def test_another_name_of_the_base_is_noted(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="somebody/tiny")
    assert merged(base, adapter).notes == ()
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="gpt2")
    (note,) = merged(base, adapter).notes
    assert "'gpt2'" in note
    assert "'tiny'" in note


def change_weights(adapter: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    change(weights)
    save_file(weights, adapter / "adapter_model.safetensors")


FIRST = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"


def refusal(base: Path, adapter: Path) -> str:
    """The one sentence with which an adapter is refused."""
    with warnings.catch_warnings(), pytest.raises(ExportError) as caught:
        warnings.simplefilter("error")
        merged(base, adapter)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, ["'IA3'", "LoRA adapters only"]),
        ({"peft_type": None}, ["None", "LoRA adapters only"]),
        ({"task_type": "SEQ_CLS"}, ["'SEQ_CLS'", "generates no text"]),
        ({"layer_replication": [[0, 2], [1, 2]]}, ["layer_replication"]),
        ({"alora_invocation_tokens": [1, 2]}, ["alora_invocation_tokens"]),
        ({"megatron_config": {"a": 1}}, ["megatron_config"]),
        ({"a_field_of_the_future": "x"}, ["a_field_of_the_future"]),
        ({"init_lora_weights": "pissa_niter_4"}, ["pissa_niter_4", "plain LoRA"]),
        ({"target_modules": ["q_proj"]}, ["'adapter'", "does not fit 'tiny'"]),
        ({"target_modules": ["c_attn", "c_fc"]}, ["lacks 4 weights", "lora_A"]),
        ({"r": 2}, ["shape", "(4, 20)", "(2, 20)"]),
        ({"r": "many"}, ["does not fit"]),
        ({"modules_to_save": 5}, ["does not fit"]),
        ({"rank_pattern": {"c_attn": 3}}, ["shape"]),
    ],
    ids=str,
)
def test_configs_that_are_refused(changes: dict[str, Any], words: list[str], base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", **changes)
    message = refusal(base, adapter)
    for word in words:
        assert word in message


def test_weights_that_are_refused(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter")
    change_weights(adapter, lambda weights: weights[FIRST].__setitem__((0, 0), float("nan")))
    assert "NaN or infinity" in refusal(base, adapter)
    change_weights(adapter, lambda weights: weights.pop(FIRST))
    message = refusal(base, adapter)
    assert "lacks the weight" in message
    assert FIRST in message
    (adapter / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    assert "cannot load the weights of 'adapter'" in refusal(base, adapter)
    (adapter / "adapter_model.safetensors").unlink()
    assert "has no weights" in refusal(base, adapter)


@pytest.mark.parametrize("changes", [{"width": 24}, {"layers": 3}, {"layers": 1}, {"vocab": 60}], ids=str)
def test_adapter_of_another_base(changes: dict[str, Any], base: Path, tmp_path: Path) -> None:
    other = save_checkpoint(
        tmp_path / "other", Shape(**{"width": 20, "heads": 4, "context": 16, "vocab": 54} | changes)
    )
    adapter = save_adapter(other, tmp_path / "adapter", modules_to_save=["wte"])
    assert "does not fit 'tiny'" in refusal(base, adapter)


def test_pickled_code_is_not_run(base: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    adapter = save_adapter(base, tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({FIRST: Evil()}, adapter / "adapter_model.bin")
    assert "cannot load the weights" in refusal(base, adapter)
    assert not (tmp_path / "ran").exists()


def test_what_is_no_adapter(base: Path, tmp_path: Path) -> None:
    assert "holds no adapter_config.json: it is no adapter" in refusal(base, base)
    assert "there is no folder" in refusal(base, tmp_path / "nowhere")
    adapter = save_adapter(base, tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text("[]", encoding="utf-8")
    assert "must hold a JSON object" in refusal(base, adapter)


def test_a_refused_adapter_leaves_nothing(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter")
    shutil.rmtree(tmp_path / "adapter")
    adapter.mkdir()
    with pytest.raises(ExportError, match=r"adapter_config\.json"):
        export(str(base), tmp_path / "out", "fp32", adapter=str(adapter))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_the_command_line_passes_them_on(base: Path, tmp_path: Path, edgelm_command: RunCommand) -> None:
    for option, value, words in [("--adapter", "no such", "'no such'"), ("--vocabulary", "none.txt", "'none.txt'")]:
        done = edgelm_command("export", str(base), "-o", str(tmp_path / "out"), option, value)
        assert done.status == 1
        assert words in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


ADDED = 3


def save_resized_adapter(base: Path, folder: Path, rows: int, **options: Any) -> Path:
    """An adapter of a base whose token table was resized before training, without a tokenizer."""
    torch.manual_seed(1)
    with quiet_torch():
        model = TorchModel(base).model
        model.resize_token_embeddings(rows)
        model = peft.get_peft_model(
            model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | options)
        )
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * 0.2
        model.save_pretrained(folder, save_embedding_layers=True)
    return folder


def save_grown_adapter(base: Path, folder: Path, **options: Any) -> Path:
    """An adapter of a base whose token table grew by `ADDED` rows, with its tokenizer."""
    save_resized_adapter(base, folder, BASE.vocab + ADDED, **options)
    shutil.copy(base / "tokenizer_config.json", folder)
    content = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    content["added_tokens"] = [{"id": BASE.vocab + i, "content": f"<added-{i}>"} | flags for i in range(ADDED)]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def resized_logits(base: Path, adapter: Path, rows: int, ids: list[int]) -> Logits:
    """What peft computes with the table resized first, as its documentation says."""
    with quiet_torch(), torch.no_grad():
        model = TorchModel(base).model
        model.resize_token_embeddings(rows)
        logits: Logits = peft.PeftModel.from_pretrained(model, adapter).eval()(torch.tensor([ids])).logits[0].numpy()
    return logits


@pytest.mark.parametrize(
    "options", [{}, {"modules_to_save": ["wte"]}, {"modules_to_save": ["wte", "lm_head"]}], ids=str
)
def test_added_tokens_come_with_their_tokenizer_and_rows(options: dict[str, Any], base: Path, tmp_path: Path) -> None:
    adapter = save_grown_adapter(base, tmp_path / "adapter", **options)
    checkpoint = merged(base, adapter)
    ids = [*IDS[:10].tolist(), BASE.vocab, BASE.vocab + ADDED - 1]
    with torch.no_grad():
        logits = checkpoint.model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(logits - resized_logits(base, adapter, BASE.vocab + ADDED, ids)).max() <= 1e-4
    assert checkpoint.tokenizer.vocab_size == BASE.vocab + ADDED
    assert checkpoint.source.vocab_size == checkpoint.architecture.vocab_size == BASE.vocab + ADDED
    assert json.loads(checkpoint.config_json)["vocab_size"] == BASE.vocab + ADDED
    assert checkpoint.notes == ()


def test_added_tokens_without_a_tokenizer_or_without_rows(base: Path, tmp_path: Path) -> None:
    adapter = save_grown_adapter(base, tmp_path / "adapter")
    (adapter / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    message = refusal(base, adapter)
    assert "3 added tokens (57 instead of 54)" in message
    assert "tokenizer" in message
    (tmp_path / "tokenizer.json").rename(adapter / "tokenizer.json")
    change_weights(adapter, lambda weights: [weights.pop(key) for key in list(weights) if "lora_" not in key])
    checkpoint = merged(base, adapter)
    assert checkpoint.tokenizer.vocab_size == BASE.vocab
    (note,) = checkpoint.notes
    assert "3 of its added tokens have no row" in note


def test_low_rank_rows_of_added_tokens_without_their_table(base: Path, tmp_path: Path) -> None:
    adapter = save_grown_adapter(base, tmp_path / "adapter", target_modules=["wte", "c_attn"])
    change_weights(adapter, lambda weights: [weights.pop(key) for key in list(weights) if "lora_" not in key])
    message = refusal(base, adapter)
    assert "added tokens" in message
    assert "save_embedding_layers" in message


@pytest.mark.parametrize(
    "options", [{}, {"modules_to_save": ["wte", "lm_head"]}, {"target_modules": ["wte", "c_attn"]}], ids=str
)
def test_padding_that_was_cut_off_before_training(options: dict[str, Any], tmp_path: Path) -> None:
    """`resize_token_embeddings(len(tokenizer))` shrinks a table that is padded to a round number of rows."""
    padded = save_checkpoint(tmp_path / "padded", Shape(width=20, heads=4, context=16, vocab=64))
    adapter = save_resized_adapter(padded, tmp_path / "adapter", 54, **options)
    checkpoint = merged(padded, adapter)
    assert np.abs(logits_of(checkpoint) - resized_logits(padded, adapter, 54, IDS.tolist())).max() <= 1e-4
    assert checkpoint.architecture.vocab_size == checkpoint.tokenizer.vocab_size == 54
    assert json.loads(checkpoint.config_json)["vocab_size"] == 54
    (note,) = checkpoint.notes
    assert "left out the last 10 rows of the token table" in note
    adapter = save_resized_adapter(padded, tmp_path / "shorter", 52, **options)
    message = refusal(padded, adapter)
    assert "52 tokens instead of 64" in message and "without the token 'Z'" in message


def test_the_adapters_own_tokenizer_is_used(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter")
    shutil.copy(base / "tokenizer_config.json", adapter)
    content = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["unk_token"] = "b"
    (adapter / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    checkpoint = merged(base, adapter)
    assert checkpoint.tokenizer.encode("1") == checkpoint.tokenizer.encode("b")
    (adapter / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert "tokenizer of the adapter 'adapter'" in refusal(base, adapter)
