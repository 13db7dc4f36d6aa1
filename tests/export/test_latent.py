"""The latent part of a checkpoint in its bundles: what torch computes, in every recipe, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import edgelm
from edgelm.bundle.manifest import FixedPrecision
from edgelm.errors import ExportError
from edgelm_export.model.latent import LATENT_FILE, LatentMaps, encode, token_logprobs
from edgelm_export.pipeline import export
from edgelm_export.source.checkpoint import load_checkpoint
from tests.export.checkpoints import Shape, refusal, save_checkpoint

pytestmark = pytest.mark.export

TEXT = "The cat sat."
Z = [0.5, -1.0, 1.5, 0.0, 0.25]


def latent_checkpoint(folder: Path, shape: Shape, tokens: int = 3) -> Path:
    source = save_checkpoint(folder, shape)
    model = load_checkpoint(str(source)).model
    torch.manual_seed(5)
    maps = LatentMaps(model.config, len(Z), tokens)
    with torch.no_grad():
        for parameter in maps.parameters():
            parameter.normal_(std=0.3)
    maps.save(source)
    return source


@pytest.mark.parametrize(
    ("precision", "shape"),
    [
        ("fp32", Shape(width=24, heads=4)),  # heads of 6 numbers, padded to 8
        ("fp32", Shape(tied=False, config={"scale_attn_by_inverse_layer_idx": True})),
        ("fp16", Shape(width=24, heads=4)),
        ("int8", Shape(width=24, heads=4)),
        ("w8a8", Shape(width=32)),
        ("int4", Shape(width=32)),
    ],
    ids=lambda value: getattr(value, "name", value),
)
@pytest.mark.usefixtures("few_tokens")
def test_a_bundle_computes_what_torch_computes(precision: FixedPrecision, shape: Shape, tmp_path: Path) -> None:
    source = latent_checkpoint(tmp_path / "source", shape)
    made = export(str(source), tmp_path / "bundle", precision, accept_quality_loss=True).bundle
    facts, checkpoint = made.manifest.latent, load_checkpoint(str(source))
    assert facts is not None and facts.reference is not None and checkpoint.latent is not None
    assert facts.dtype == ("float32" if precision == "fp32" else "float16")
    model = edgelm.load(made.path, threads=1)
    ids = [0, *checkpoint.tokenizer.encode(TEXT)]
    mean, log_variance = encode(checkpoint.model, checkpoint.latent, ids)
    logprobs = token_logprobs(checkpoint.model, checkpoint.latent, [*ids, 0], torch.tensor(Z))
    found, score = model.latent.encode(TEXT), model.latent.score(TEXT, Z)
    exact = precision == "fp32"
    # Random weights are harder to quantize than trained ones.
    np.testing.assert_allclose(found.mean, mean, atol=1e-3 if exact else 0.5)
    np.testing.assert_allclose(found.log_variance, log_variance, atol=1e-3 if exact else 0.5)
    differences = np.abs(np.array([token.logprob for token in score.tokens]) - logprobs.numpy())
    assert differences.max() < (1e-3 if exact else 3.0) and differences.mean() < (1e-3 if exact else 0.6)
    reference = facts.reference
    assert reference.passed or not exact
    if exact:
        assert max(reference.max_posterior_difference, reference.max_logprob_difference) < 1e-4
    else:
        assert reference.max_logprob_difference < 5


@pytest.mark.usefixtures("few_tokens")
def test_a_missed_gate_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = latent_checkpoint(tmp_path / "source", Shape())
    monkeypatch.setattr("edgelm_export.certify.latent.FP32_GATE", 0.0)
    with pytest.raises(ExportError, match="the latent part of the fp32 bundle missed its gate"):
        export(str(source), tmp_path / "bundle", "fp32")
    assert not (tmp_path / "bundle").exists()
    assert export(str(source), tmp_path / "bundle", "fp32", accept_quality_loss=True).bundle.manifest.latent is not None


@pytest.mark.usefixtures("few_tokens")
def test_a_shorter_context_and_a_pruned_vocabulary_keep_the_latent_part(tmp_path: Path) -> None:
    source, words = latent_checkpoint(tmp_path / "source", Shape()), tmp_path / "words.txt"
    words.write_text(TEXT, encoding="utf-8")
    made = export(str(source), tmp_path / "bundle", "fp32", vocabulary=words, context=32).bundle
    assert set(made.manifest.required_features) == {"pruned_vocabulary", "latent"}
    whole = load_checkpoint(str(source))
    assert whole.latent is not None
    mean, _ = encode(whole.model, whole.latent, [0, *whole.tokenizer.encode(TEXT)])
    np.testing.assert_allclose(edgelm.load(made.path).latent.encode(TEXT).mean, mean, atol=1e-3)


def test_latent_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    source = latent_checkpoint(tmp_path / "source", Shape())
    weights = load_file(source / LATENT_FILE)

    def refused(**changes: torch.Tensor) -> str:
        save_file({key: value for key, value in (weights | changes).items() if len(value)}, source / LATENT_FILE)
        return refusal(source)

    assert "was made for a model of other sizes" in refused(**{"posterior.weight": torch.zeros(10, 31)})
    assert "was made for a model of other sizes" in refused(**{"prefix.bias": torch.zeros(7)})
    assert "has other tensors than a latent part" in refused(more=torch.zeros(1))
    assert "has other tensors than a latent part" in refused(**{"prefix.bias": torch.zeros(0)})
    assert "contains NaN or infinity" in refused(**{"posterior.bias": torch.full((10,), torch.nan)})
    (source / LATENT_FILE).write_bytes(b"not a file of tensors")
    assert "cannot read latent.safetensors" in refusal(source)
    llama = save_checkpoint(tmp_path / "llama", Shape(family="llama", width=48, heads=6, kv_heads=2, tied=False))
    save_file(weights, llama / LATENT_FILE)
    assert "has latent.safetensors, but is no GPT-2" in refusal(llama)


@pytest.mark.usefixtures("few_tokens")
def test_no_adapter_and_no_missing_end_token(tmp_path: Path) -> None:
    source = latent_checkpoint(tmp_path / "source", Shape())
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}), encoding="utf-8")
    pytest.importorskip("peft")
    with pytest.raises(ExportError, match="has a latent part, which fits its own weights only"):
        export(str(source), tmp_path / "a", "fp32", adapter=str(tmp_path / "adapter"))
    config = json.loads((source / "config.json").read_text(encoding="utf-8")) | {"eos_token_id": None}
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    settings = source / "generation_config.json"
    settings.write_text("{}", encoding="utf-8")
    with pytest.raises(ExportError, match="has a latent part and no eos_token_id"):
        export(str(source), tmp_path / "b", "fp32")
