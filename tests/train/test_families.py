"""Every family that is exported is tuned by every method, and the runtime computes of the result what torch does."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import edgelm
from edgelm_export.pipeline import export
from edgelm_export.source.adapter import merge_adapter
from edgelm_export.source.checkpoint import load_checkpoint, quiet_torch
from edgelm_train.finetune import PREFIX_FILE, finetune
from edgelm_train.models.adapters import save_prefix, with_prefix
from edgelm_train.models.base import find_base
from edgelm_train.options import FinetuneOptions, Method
from tests.export.checkpoints import SMALL_FAMILIES, Shape, save_checkpoint

pytest.importorskip("peft", reason="peft is not installed: pip install 'edgelm[train]'")

pytestmark = [pytest.mark.export, pytest.mark.usefixtures("few_tokens")]

QUICK = FinetuneOptions(epochs=4, batch_size=4, prefix_tokens=4, evaluations=1, learning_rate=0.02)
PROMPT = [70, 3, 41, 12, 200, 9, 33, 105, 18]
MATRICES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions of different lengths with one answer."""
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    rows = [{"prompt": "ab " * (i % 5 + 1), "completion": "yes"} for i in range(25)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.mark.parametrize("family", SMALL_FAMILIES)
def test_an_adapter_is_learned_and_merged(family: str, data: Path, tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", SMALL_FAMILIES[family])
    done = finetune(str(base), data, tmp_path / "out", QUICK)
    assert done.report is not None and done.report.losses["after"] < done.report.losses["before"] - 0.1
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert set(config["target_modules"]) == MATRICES
    merged = merge_adapter(load_checkpoint(str(base)), str(tmp_path / "out"))
    plain = load_checkpoint(str(base)).model
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        assert (merged.model(ids).logits - plain(ids).logits).abs().max() > 0.01


def noisy_prefix(base: Path, tokens: int) -> Any:
    """A model whose prefix equals the keys and values of no text, so that the runtime cannot be right by chance."""
    adapted = with_prefix(load_checkpoint(str(base)).model, list(range(5, 5 + tokens))).eval()
    torch.manual_seed(0)
    weight = adapted.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        weight += torch.randn(weight.shape)
    return adapted


@pytest.mark.parametrize("family", SMALL_FAMILIES)
def test_the_runtime_reads_a_prefix_as_torch_does(family: str, tmp_path: Path) -> None:
    """With heads in groups, rotary positions, norms of keys, and windows shorter than the prefix."""
    base = save_checkpoint(tmp_path / "base", SMALL_FAMILIES[family])
    adapted = noisy_prefix(base, 9)
    save_prefix(adapted, load_checkpoint(str(base)), tmp_path / PREFIX_FILE)
    export(str(base), tmp_path / "bundle", "fp32")
    with quiet_torch(), torch.no_grad():
        expected = adapted(input_ids=torch.tensor([PROMPT])).logits[0, -1].numpy()
        plain = adapted.get_base_model()(input_ids=torch.tensor([PROMPT])).logits[0, -1].numpy()
    with edgelm.load(tmp_path / "bundle", device="cpu", threads=1, prefix=tmp_path / PREFIX_FILE) as model:
        assert np.abs(model.session.step(PROMPT) - expected).max() <= 2e-3
    assert np.abs(plain - expected).max() > 0.1


@pytest.mark.parametrize("method", ["full", "prefix"])
def test_the_other_methods_learn(method: Method, data: Path, tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", SMALL_FAMILIES["llama"])
    options = FinetuneOptions(epochs=4, batch_size=4, prefix_tokens=4, evaluations=1, method=method)
    done = finetune(str(base), data, tmp_path / "out", options)
    assert done.report is not None and done.report.losses["after"] < done.report.losses["before"] - 0.1
    bundle = tmp_path / "bundle"
    if method == "full":
        assert load_checkpoint(str(tmp_path / "out")).model.config.model_type == "llama"
    else:
        export(str(base), bundle, "fp32")
        file = tmp_path / "out" / PREFIX_FILE
        with (
            edgelm.load(bundle, device="cpu", threads=1, prefix=file) as tuned,
            edgelm.load(bundle, device="cpu", threads=1) as plain,
        ):
            assert tuned.score("ab ", "yes").logprob > plain.score("ab ", "yes").logprob + 1


def test_a_name_of_a_gguf_file_is_a_base(tmp_path: Path) -> None:
    file = tmp_path / "tiny.Q4_1.gguf"
    file.write_bytes(b"GGUF")
    found = find_base(str(file), None)
    assert (found.source, found.short_name, found.context_length) == (str(file), "tiny.Q4_1", None)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    content = {"base_model_name_or_path": f"/gone/{file.name}"}
    (adapter / "adapter_config.json").write_text(json.dumps(content), encoding="utf-8")
    assert find_base(str(adapter), None).source == str(file)


def test_a_context_is_known_before_torch_is_loaded(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", Shape(family="llama", context=48))
    assert find_base(str(base), None).context_length == 48
