"""The int8 cache: how keys and values are rounded, which type their files have, and which options are refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import edgelm
from edgelm.bundle.manifest import INT8_CACHE_FEATURE, FixedPrecision, read_manifest
from edgelm.cli.shared import storage_formats
from edgelm.engine.memory import ModelMemory
from edgelm.errors import BundleError, ConfigError, ExportError, PrefixError
from edgelm.reuse.prefix import write_learned_prefix
from edgelm_export.model.families import collect_weights
from edgelm_export.pipeline import export
from edgelm_export.quantize.cache_scales import MARGIN, cache_scales
from edgelm_export.source.checkpoint import load_checkpoint
from edgelm_export.source.fingerprint import body_sha256
from tests.export.checkpoints import Shape, Tiny, TinyExport, save_checkpoint
from tests.export.test_latent import latent_checkpoint

pytestmark = pytest.mark.export

GPT2, LLAMA = Shape(width=36, heads=3), Shape(family="llama", heads=4, kv_heads=2)
SHAPES = [GPT2, LLAMA]


@pytest.fixture(params=SHAPES, ids=lambda shape: shape.name)
def pair(request: pytest.FixtureRequest, tiny_export: TinyExport) -> tuple[Tiny, Tiny]:
    """Bundles of one checkpoint with a cache of floats, and with one of integers."""
    return tiny_export(request.param, "int8"), tiny_export(request.param, "int8", int8_cache=True)


def test_integers_are_rounded_keys_and_values(pair: tuple[Tiny, Tiny]) -> None:
    floats, integers = pair
    ids = floats.text()
    sessions = [tiny.session() for tiny in pair]
    logits = [session.step(ids) for session in sessions]
    exact, rounded = (session.remembered(len(ids)) for session in sessions)  # (2·layers, G, T, p)
    assert exact.dtype == np.float32 and rounded.dtype == np.int8 and exact.shape == rounded.shape
    bundle = integers.exported.bundle
    graph = onnx.load(bundle.path / bundle.manifest.graph.file).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for part, name in enumerate(("keys", "values")):  # of the first layer, before which nothing was rounded
        scales = stored[f"h.0.{name}.scale"][0]  # (G, 1, p); the padding of heads has the smallest scale of all
        difference = np.clip(exact[part] / scales, -128, 127) - rounded[part]
        assert np.abs(difference[np.broadcast_to(scales > 1e-5, difference.shape)]).max() < 0.51
    assert (logits[0] - logits[1]).std() < 0.1 * logits[0].std()
    assert integers.certificate.drawn.perplexity_ratio < 1.05


def test_scales_cover_the_calibration_text(tmp_path: Path) -> None:
    weights = collect_weights(load_checkpoint(str(save_checkpoint(tmp_path / "m", GPT2))).model)
    rows = np.random.default_rng(0).integers(0, GPT2.vocab - 1, (3, 20))
    for layer in cache_scales(weights, rows):
        for scales in (layer.key, layer.value):
            assert scales.shape == (3, 16) and scales.dtype == np.float32  # heads of 12 are padded to 16
            assert (scales[:, 12:] == np.float32(1e-6)).all() and (scales[:, :12] > 1e-5).all()
    wider = cache_scales(weights, np.concatenate([rows, rows + 1]))
    assert (wider[0].key >= cache_scales(weights, rows)[0].key).all()
    assert MARGIN > 1


def test_the_bundle_says_so(pair: tuple[Tiny, Tiny]) -> None:
    floats, integers = (tiny.exported.bundle for tiny in pair)
    assert integers.manifest.graph.kv_dtype == "int8" and integers.manifest.graph.dtype == "float32"
    assert integers.manifest.required_features == (INT8_CACHE_FEATURE,)
    assert "with keys and values in 8 bits" in (integers.path / "README.md").read_text(encoding="utf-8")
    assert storage_formats(integers) == f"{storage_formats(floats)}; keys and values in 8 bits"
    assert 4 * ModelMemory.of(integers).cache_bytes == ModelMemory.of(floats).cache_bytes


def test_the_feature_and_the_type_stand_together(tiny_export: TinyExport) -> None:
    manifest = tiny_export(LLAMA, "int8", int8_cache=True).exported.bundle.manifest
    for other in (
        replace(manifest, required_features=()),
        replace(manifest, graph=replace(manifest.graph, kv_dtype="float32")),
    ):
        with pytest.raises(BundleError, match=r"has the feature 'int8_cache' without a graph's kv_dtype 'int8'"):
            read_manifest(other.sealed().to_json().encode())
    half = replace(manifest, graph=replace(manifest.graph, dtype="float16"))
    with pytest.raises(BundleError, match=r"graph\.kv_dtype is 'int8', which no bundle of float16 has"):
        read_manifest(half.sealed().to_json().encode())


def test_files_hold_the_integers(pair: tuple[Tiny, Tiny], tmp_path: Path) -> None:
    floats, integers = (tiny.exported.bundle.path for tiny in pair)
    prompt = pair[0].text()[:20].tolist()
    state = tmp_path / "prompt.state"
    with edgelm.load(integers, device="cpu", threads=1) as model:
        expected = model.generate(prompt, max_new_tokens=5, eos_token_id=()).choices[0].token_ids
        model.save_state(state, prompt)
        with pytest.raises(ConfigError, match="keys and values are int8, and stay so in a file: leave out"):
            model.save_state(state, prompt, dtype="float16")
        with pytest.raises(ConfigError, match="stay so in a file"):
            model.save_prefix(tmp_path / "text.prefix", "one two three", dtype="float32")
        model.save_prefix(tmp_path / "text.prefix", "one two three")
        text = [*model.tokenizer.encode("one two three"), *prompt]
        whole = model.generate(text, max_new_tokens=3, eos_token_id=()).choices[0].token_ids
        attentions = model.explain(prompt).attentions  # (L, H, T, T)
        assert np.allclose(attentions.sum(axis=-1), 1, atol=1e-3)
    assert state.stat().st_size < 2000 + 20 * (4 + model.bundle.manifest.architecture.cache_values_per_token)
    with edgelm.load(integers, device="cpu", threads=1) as model:
        model.load_state(state)
        again = model.generate(prompt, max_new_tokens=5, eos_token_id=())
        assert again.choices[0].token_ids == expected and again.stats.reused_tokens >= 18
    with edgelm.load(integers, device="cpu", threads=1, prefix=tmp_path / "text.prefix") as model:
        assert model.generate(prompt, max_new_tokens=3, eos_token_id=()).choices[0].token_ids == whole
    with pytest.raises(PrefixError, match="it has integers, and this bundle's cache has floats"):
        edgelm.load(floats, device="cpu", prefix=tmp_path / "text.prefix")


def test_a_learned_prefix_has_floats(tiny_export: TinyExport, tmp_path: Path) -> None:
    tiny = tiny_export(GPT2, "int8", int8_cache=True)
    checkpoint = load_checkpoint(str(tiny.source))
    content, learned = np.zeros((2 * GPT2.layers, 3, 4, 12), np.float32), tmp_path / "learned.prefix"
    write_learned_prefix(learned, content, source="m", body_sha256=body_sha256(checkpoint.model))
    with pytest.raises(PrefixError, match="it has floats, and this bundle's cache has integers: use one made without"):
        edgelm.load(tiny.exported.bundle.path, device="cpu", prefix=learned)
    with pytest.raises(ExportError, match="was learned, so it has floats: drop --int8-cache"):
        export(str(tiny.source), tmp_path / "out", "int8", prefix=learned, int8_cache=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_floats_are_refused(precision: FixedPrecision, tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "m", Shape())
    with pytest.raises(ExportError, match=f"an int8 cache loses more than {precision} promises"):
        export(str(source), tmp_path / "out", precision, int8_cache=True)


def test_a_latent_part_is_refused(tmp_path: Path) -> None:
    source = latent_checkpoint(tmp_path / "m", Shape())
    with pytest.raises(ExportError, match="an int8 cache does not go with a latent part"):
        export(str(source), tmp_path / "out", "int8", int8_cache=True)
