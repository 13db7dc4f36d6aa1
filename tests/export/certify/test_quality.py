"""What the recipes lose on trained checkpoints. The numbers are shown in every case."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgelm.bundle.manifest import FixedPrecision
from edgelm.engine.graph import Graph
from edgelm.loading import load
from edgelm.model import Model
from edgelm.scoring.comparison import Comparison, compare_texts
from edgelm_export.certify.optimum_graph import OptimumGraph
from edgelm_export.pipeline import Exported, export
from edgelm_export.source.drawn_text import TextDrawer
from edgelm_export.source.tokenizer import load_tokenizer
from tests.build_side import Report
from tests.export.checkpoints import FOOTPRINT, Ids, Logits, TorchModel, greedy

pytestmark = [pytest.mark.export, pytest.mark.shared]

HELD_OUT_STORIES = 206
HELD_OUT_TOKENS = 41_913
JUDGED_WINDOWS = 8
JUDGED_LOSS = 2.1918
"""Loss of the source on the first windows of 512, in nats a token, computed by transformers."""

MakeBundle = Callable[[str, FixedPrecision], Exported]


@pytest.fixture(scope="session")
def checkpoints(shared_folder: Path) -> Path:
    return shared_folder / "checkpoints"


@pytest.fixture(scope="session")
def make_bundle(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeBundle:
    """Exports a trained checkpoint, once per session for each precision; its gate must pass."""
    folder = tmp_path_factory.mktemp("trained")
    done: dict[tuple[str, FixedPrecision], Exported] = {}
    drawn: dict[tuple[int, int, int, int], list[Ids]] = {}

    class DrawOnce(TextDrawer):
        """The text that an export draws does not depend on the precision, so it is drawn once."""

        def draw(self, tokens: int, seed: int) -> list[Ids]:
            sizes = self._bundle.manifest.architecture
            key = (sizes.vocab_size, sizes.hidden_size, tokens, seed)
            if key not in drawn:
                drawn[key] = super().draw(tokens, seed)
            return drawn[key]

    def make(name: str, precision: FixedPrecision) -> Exported:
        key = (name, precision)
        if key not in done:
            with (
                mock.patch("edgelm_export.pipeline.TextDrawer", DrawOnce),
                mock.patch("edgelm_export.pipeline.EVALUATION_TOKENS", 2_000),  # the tests here measure for themselves
                mock.patch("edgelm_export.certify.certificate.measure_footprint", lambda bundle: FOOTPRINT),
            ):
                done[key] = export(str(checkpoints / name), folder / f"{Path(name).name}-{precision}", precision)
        return done[key]

    return make


@pytest.fixture(scope="session")
def stories(shared_folder: Path) -> list[Ids]:
    """The held-out stories of stories-6m, in windows of its context."""
    text = (shared_folder / "data" / "tinystories_slice.txt").read_text(encoding="utf-8")
    parts = [story for part in text.split("<|endoftext|>") if (story := part.strip())][:HELD_OUT_STORIES]
    tokenizer = load_tokenizer(shared_folder / "checkpoints" / "stories-6m")
    ids = np.array([token for story in parts for token in (0, *tokenizer.encode(story))], np.int64)
    assert len(ids) == HELD_OUT_TOKENS
    return np.split(ids, range(512, len(ids), 512))


@pytest.fixture(scope="session")
def stories_torch(checkpoints: Path) -> TorchModel:
    return TorchModel(checkpoints / "stories-6m")


@pytest.fixture(scope="session")
def stories_logits(stories: list[Ids], stories_torch: TorchModel) -> Callable[[Ids], Logits]:
    """Torch's logits of the windows, computed once for all recipes."""
    known = {window.tobytes(): stories_torch.logits(window) for window in stories[:JUDGED_WINDOWS]}
    return lambda ids: known[ids.tobytes()]


def show(name: str, measured: Comparison) -> str:
    ratio = math.exp((measured.bundle_nats - measured.source_nats) / measured.tokens)
    perplexity = math.exp(measured.bundle_nats / measured.tokens)
    return (
        f"{name}, {measured.tokens:,} held-out tokens: perplexity {perplexity:.4f} "
        f"(x {ratio:.5f}), KL {measured.kl_nats / measured.tokens:.2e} nats, "
        f"same top token {measured.same_top1 / measured.tokens:.2%}, "
        f"max |dlogit| {measured.max_abs_logit_difference:.2e}"
    )


@pytest.mark.parametrize(("precision", "most"), [("fp32", 1.00001), ("int8", 1.002), ("int4", 1.01)])
def test_perplexity_of_held_out_stories(
    precision: FixedPrecision,
    most: float,
    make_bundle: MakeBundle,
    stories: list[Ids],
    stories_logits: Callable[[Ids], Logits],
    report: Report,
) -> None:
    model = load(make_bundle("stories-6m", precision).bundle.path, device="cpu")
    measured = compare_texts(stories_logits, model.session, stories[:JUDGED_WINDOWS])
    report(show(f"stories-6m {precision}", measured))
    assert measured.source_nats / measured.tokens == pytest.approx(JUDGED_LOSS, abs=5e-3)
    assert math.exp((measured.bundle_nats - measured.source_nats) / measured.tokens) <= most
    if precision == "fp32":
        assert measured.max_abs_logit_difference <= 1e-3
        assert measured.same_top1 == measured.tokens


@pytest.fixture(scope="session")
def outlier_checkpoint(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories-6m with six channels of every LayerNorm times 30, and the rows that read them divided by 30.

    The function is the same, and as hard to round as real GPT-2 checkpoints.
    """
    folder = tmp_path_factory.mktemp("outliers") / "stories-6m-outliers"
    shutil.copytree(checkpoints / "stories-6m", folder)
    weights = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(0)
    for name, linear in (("ln_1", "attn.c_attn"), ("ln_2", "mlp.c_fc")):
        for layer in range(6):
            loud = torch.from_numpy(rng.choice(256, 6, replace=False))
            for key in ("weight", "bias"):
                weights[f"transformer.h.{layer}.{name}.{key}"][loud] *= 30
            weights[f"transformer.h.{layer}.{linear}.weight"][loud] /= 30
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_perplexity_with_outliers(
    outlier_checkpoint: Path,
    make_bundle: MakeBundle,
    stories: list[Ids],
    stories_logits: Callable[[Ids], Logits],
    report: Report,
) -> None:
    session = Graph.open(make_bundle(str(outlier_checkpoint), "int8").bundle, device="cpu").session()
    measured = compare_texts(stories_logits, session, stories[:JUDGED_WINDOWS])
    report(show("stories-6m with outliers int8", measured))
    assert math.exp((measured.bundle_nats - measured.source_nats) / measured.tokens) <= 1.005


def test_fp32_logits_equal_optimums_graph(
    make_bundle: MakeBundle, stories: list[Ids], stories_torch: TorchModel, tmp_path: Path, report: Report
) -> None:
    session = load(make_bundle("stories-6m", "fp32").bundle.path, device="cpu").session
    reference = OptimumGraph(stories_torch.model, tmp_path)
    worst = 0.0
    for window in stories[:10]:
        session.reset()
        worst = max(worst, float(np.abs(session.score(window) - reference.logits(window)).max()))
    report(f"stories-6m fp32 against optimum's graph, 5,120 tokens: max |dlogit| {worst:.2e}")
    assert worst <= 1e-3


def equal_before_first_difference(found: list[int], wanted: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b), len(wanted))


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_greedy_stories(
    precision: FixedPrecision, make_bundle: MakeBundle, stories: list[Ids], stories_torch: TorchModel, report: Report
) -> None:
    prompts = np.stack([window[:16] for window in stories[:20]])  # (20, 16)
    with torch.no_grad():
        ids = torch.from_numpy(prompts)
        wanted = stories_torch.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),  # else token 0, which begins a story, would count as padding
            max_new_tokens=64,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[:, 16:].tolist()
    session = load(make_bundle("stories-6m", precision).bundle.path, device="cpu").session
    found = [greedy(session, prompt.tolist(), 64) for prompt in prompts]
    equal = [equal_before_first_difference(*pair) for pair in zip(found, wanted, strict=True)]
    same = sum(n == 64 for n in equal)
    report(
        f"stories-6m {precision}, greedy: {same} of 20 continuations of 64 tokens equal torch's, "
        f"{sum(equal)} of 1,280 tokens before the first difference"
    )
    if precision == "fp32":
        assert same == 20


def sorted_right(model: Model, digits: list[int]) -> bool:
    return greedy(model.session, digits, 6) == sorted(digits)  # the 12th token comes from the 11th position, the last


def test_sorts_digits(make_bundle: MakeBundle, report: Report) -> None:
    model = load(make_bundle("mingpt_nano_sort", "int8").bundle.path, device="cpu")
    inputs = np.random.default_rng(0).integers(0, 3, (300, 6)).tolist()
    right = sum(sorted_right(model, digits) for digits in inputs)
    report(f"mingpt_nano_sort int8: {right} of 300 inputs sorted")
    assert right >= 300


def test_continues_its_corpus(checkpoints: Path, make_bundle: MakeBundle, report: Report) -> None:
    folder = checkpoints / "slm4096"
    model, source = load(make_bundle("slm4096", "fp32").bundle.path, device="cpu"), TorchModel(folder)
    corpus = (folder / "corpus.txt").read_text(encoding="utf-8")
    by_heart = same = 0
    starts = range(0, 4000, 800)
    for start in starts:
        prompt, rest = corpus[start : start + 28], corpus[start + 28 : start + 129]
        ids = model.tokenizer.encode(prompt)
        assert len(ids) == 28
        found = greedy(model.session, ids, min(101, len(rest)))
        same += found == source.greedy(ids, len(found))
        by_heart += model.tokenizer.decode(found) == rest
    report(f"slm4096 fp32: {same} of {len(starts)} continuations equal torch's, {by_heart} the corpus itself")
    assert same == len(starts)
    assert by_heart >= len(starts) - 1
