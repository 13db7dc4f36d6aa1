"""Prefixes through the build side: a baked text in every recipe, and learned keys and values beside transformers'."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from edgelm import ExportError, Model, PrefixError
from edgelm.bundle.manifest import FixedPrecision
from edgelm.bundle.task import TaskFile, parse_task
from edgelm.engine.graph import Graph
from edgelm.loading import load
from edgelm.reuse.prefix import copy_prefix, write_learned_prefix
from edgelm.text.tokenizer import Tokenizer
from edgelm_export.pipeline import export
from edgelm_export.quantize.budget import Budget
from edgelm_export.source.fingerprint import body_sha256
from tests.export.checkpoints import Logits, Shape, Tiny, TinyExport, TorchModel, save_checkpoint

pytestmark = pytest.mark.export

TEXT = "Q: red or blue?\nA: red.\n\n"
SHAPES = [Shape(width=40, heads=4, context=96), Shape(width=36, heads=3, context=96, tied=False)]
"""Heads of 10 and 12 numbers, which are padded."""
LEARNED_TOKENS = 5
RECIPES: tuple[FixedPrecision, ...] = ("fp32", "fp16", "int8", "int4")
"""w8a8 and int4-small fold and round like these."""
OPTIONS: list[dict[str, Any]] = [
    {"do_sample": False, "logprobs": 1},
    {"num_beams": 2},
    {"do_sample": True, "seed": 1, "repetition_penalty": 1.2},
]


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: shape.name)
def shape(request: pytest.FixtureRequest) -> Shape:
    found: Shape = request.param
    return found


@pytest.fixture(params=RECIPES)
def tiny(request: pytest.FixtureRequest, shape: Shape, tiny_export: TinyExport) -> Tiny:
    return tiny_export(shape, request.param)


@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize("precision", RECIPES)
def test_a_baked_text_is_the_text_before_the_prompt(precision: FixedPrecision, tmp_path: Path) -> None:
    """Bit for bit, in every recipe; what was measured is what it is without the text."""
    source = save_checkpoint(tmp_path / "source", SHAPES[0])
    (tmp_path / "task.txt").write_bytes(TEXT.encode())
    plain = export(str(source), tmp_path / "plain", precision, accept_quality_loss=True)
    baked = export(str(source), tmp_path / "baked", precision, accept_quality_loss=True, prefix=tmp_path / "task.txt")
    assert baked.certificate.texts == plain.certificate.texts
    assert baked.bundle.manifest.required_features == ("prefix",)
    assert "tokens stand before every prompt" in (baked.bundle.path / "README.md").read_text(encoding="utf-8")
    bundle = baked.bundle
    with_text = Model(Graph.open(bundle, device="cpu", threads=1), Tokenizer.of_bundle(bundle))
    model = load(bundle.path, device="cpu", threads=1)
    assert model.prefix is not None and model.prefix.text == TEXT
    for prompt in ("Q: tea?", "x", "\n"):
        for options in OPTIONS:
            found = model.generate(prompt, max_new_tokens=12, **options)
            with_text.forget()
            assert found.choices == with_text.generate(TEXT + prompt, max_new_tokens=12, **options).choices
    assert model.score("Q: tea?", " yes") == with_text.score(f"{TEXT}Q: tea?", " yes")


def learned(folder: Path, tiny: Tiny) -> tuple[Path, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A file of random keys and values for a checkpoint, and the same for transformers, (1, H, N, h) each."""
    shape = tiny.shape
    rng = np.random.default_rng(0)
    size = (2 * shape.layers, shape.heads, LEARNED_TOKENS, shape.width // shape.heads)
    content = rng.normal(size=size).astype(np.float32)
    path = folder / "task.prefix"
    write_learned_prefix(path, content, source=tiny.source.name, body_sha256=body_sha256(tiny.torch.model))
    tensors = torch.from_numpy(content)[:, None]
    return path, [(tensors[2 * layer], tensors[2 * layer + 1]) for layer in range(shape.layers)]


def wanted_logits(tiny: Tiny, past: list[tuple[torch.Tensor, torch.Tensor]], ids: list[int]) -> Logits:
    cache = transformers.DynamicCache()
    for layer, (keys, values) in enumerate(past):
        cache.update(keys, values, layer)
    with torch.no_grad():
        found: Logits = tiny.torch.model(torch.tensor([ids]), past_key_values=cache).logits[0].numpy()
    return found


LARGEST_DIFFERENCE = {"fp32": 1e-3, "fp16": 0.05, "int8": 0.5, "int4": 6.0}


def test_learned_keys_and_values_fit_every_bundle(tiny: Tiny, tmp_path: Path) -> None:
    path, past = learned(tmp_path, tiny)
    ids = tiny.text()[:40].tolist()
    wanted = wanted_logits(tiny, past, ids)
    model = load(tiny.exported.bundle.path, device="cpu", threads=1, prefix=path)
    assert model.prefix is not None and model.session.context_length == tiny.shape.context - LEARNED_TOKENS
    found = model.session.score(ids)
    plain = load(tiny.exported.bundle.path, device="cpu", threads=1).session.score(ids)
    recipe = tiny.exported.bundle.manifest.recipe.name
    error = float(np.abs(found - wanted).max())
    assert error < LARGEST_DIFFERENCE[recipe]
    # The prefix matters more than what the recipe loses.
    assert np.square(found - wanted).mean() < 0.2 * np.square(plain - wanted).mean()
    if recipe == "fp32":
        greedy = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=()).choices[0].token_ids
        text = list(ids)
        for _ in range(20):
            text.append(int(wanted_logits(tiny, past, text)[-1].argmax()))
        assert list(greedy) == text[len(ids) :]


@pytest.mark.usefixtures("few_tokens")
def test_a_learned_prefix_can_lie_in_the_bundle(tiny_export: TinyExport, tmp_path: Path) -> None:
    tiny = tiny_export(SHAPES[0], "fp32")
    path, _ = learned(tmp_path, tiny)
    content = b'{"kind": "generate", "template": "{text} ="}'
    copy_prefix(path, path, TaskFile(parse_task(content), content))
    domain = tmp_path / "domain.txt"
    domain.write_text("what is the colour of the sky?", encoding="utf-8")
    for name, vocabulary in (("whole", None), ("pruned", domain)):
        made = export(
            str(tiny.source), tmp_path / name, "int8", prefix=path, vocabulary=vocabulary, accept_quality_loss=True
        )
        model = load(made.bundle.path, device="cpu", threads=1)
        assert model.prefix is not None and model.prefix.text is None
        assert model.prefix.task is None and made.bundle.read_file("task.json", 99) == content
        assert "learned by prefix-tuning" in (made.bundle.path / "README.md").read_text(encoding="utf-8")
        outside = load(made.bundle.path, device="cpu", threads=1, prefix=path)
        options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
        assert model.generate("what", **options).choices == outside.generate("what", **options).choices
    other = save_checkpoint(tmp_path / "other", Shape(width=40, heads=4, context=96, seed=1))
    with pytest.raises(ExportError, match="was learned with other weights than 'other'"):
        export(str(other), tmp_path / "no", "fp32", prefix=path)
    with pytest.raises(ExportError, match="stays as it is"):
        export(str(tiny.source), tmp_path / "no", "fp32", prefix=path, prefix_dtype="float16")
    text = tmp_path / "text.prefix"
    load(tiny.exported.bundle.path, device="cpu").save_prefix(text, TEXT)
    with pytest.raises(ExportError, match="give the text itself"):
        export(str(tiny.source), tmp_path / "no", "fp32", prefix=text)
    with pytest.raises(PrefixError, match="computed with another bundle"):
        load(tiny_export(SHAPES[0], "int4").exported.bundle.path, device="cpu", prefix=text)
    assert not (tmp_path / "no").exists()


@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"x", "needs 2 tokens at least"),
        (b"caf\xe9", "is not UTF-8 text"),
        (b"a b " * 40, "holds a prefix of 88 at most: shorten it"),
        (b"\x02\0\0\0\0\0\0\0{}", "it is no prefix file"),
    ],
)
def test_texts_that_cannot_be_baked(tiny_export: TinyExport, tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "task.txt").write_bytes(content)
    with pytest.raises(ExportError, match=words):
        export(str(tiny_export(SHAPES[0], "fp32").source), tmp_path / "no", "fp32", prefix=tmp_path / "task.txt")
    with pytest.raises(ExportError, match="cannot read the prefix"):
        export(str(tiny_export(SHAPES[0], "fp32").source), tmp_path / "no", "fp32", prefix=tmp_path / "none")
    assert [path.name for path in tmp_path.iterdir()] == ["task.txt"]


@pytest.mark.usefixtures("few_tokens")
def test_float16_and_budgets(tmp_path: Path) -> None:
    shape = SHAPES[0]
    source = save_checkpoint(tmp_path / "source", shape)
    (tmp_path / "task.txt").write_bytes(TEXT.encode())
    limit = 400_000
    made = export(
        str(source),
        tmp_path / "small",
        Budget(limit, None, None),
        prefix=tmp_path / "task.txt",
        prefix_dtype="float16",
        accept_quality_loss=True,
    )
    assert made.bundle.size_bytes <= limit
    prefix = load(made.bundle.path, device="cpu").prefix
    assert prefix is not None
    numbers = prefix.content.size
    assert 2 * numbers < made.bundle.manifest.files["prefix.safetensors"].size_bytes < 2 * numbers + 1000
    modes = {path.stat().st_mode for path in made.bundle.path.iterdir()}
    assert len(modes) == 1, "who may read the bundle may read its prefix"


def test_the_body_is_what_tells_checkpoints_apart(tmp_path: Path) -> None:
    first, same, other = (
        TorchModel(save_checkpoint(tmp_path / name, Shape(seed=seed))).model
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert body_sha256(first) == body_sha256(same) != body_sha256(other)
    with torch.no_grad():
        same.transformer.wte.weight[0] += 1
    assert body_sha256(first) == body_sha256(same)
    with torch.no_grad():
        same.transformer.h[1].ln_1.bias[3] += 1e-3
    assert body_sha256(first) != body_sha256(same)
