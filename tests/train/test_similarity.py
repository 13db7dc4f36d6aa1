"""Pairs of texts with scores teach a model vectors; they are the vectors that the runtime makes."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import edgelm
from edgelm.errors import EdgelmError
from edgelm_export.pipeline import export
from edgelm_export.source.checkpoint import load_checkpoint, quiet_torch
from edgelm_train.data.similarity import TextPair
from edgelm_train.finetune import EMBED_TASK_FILE, PREFIX_FILE, finetune
from edgelm_train.models.adapters import save_prefix, with_prefix
from edgelm_train.models.similarity_loss import cosent_loss, pooled_states, spearman
from edgelm_train.options import FinetuneOptions, Method
from edgelm_train.run.pair_data import pair_batch
from tests.export.checkpoints import SMALL_FAMILIES, save_checkpoint
from tests.train.conftest import WORDS, Playground

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'edgelm[train]'")

pytestmark = [pytest.mark.export, pytest.mark.usefixtures("few_tokens")]

TEXTS = [[70, 3, 41, 12, 200, 9, 33], [5, 6], [8, 120, 250, 77]]
QUICK = FinetuneOptions(
    prompt="{a}", second="{b}", similarity="score", epochs=4, batch_size=32, evaluations=3, prefix_tokens=4
)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two words each: the nearer the first words stand in the list, the more alike; the last words say nothing."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.tsv"
    rows = [
        f"{one} {WORDS[end]}\t{two} {WORDS[(end + place) % 8]}\t{-abs(place - other)}"
        for place, one in enumerate(WORDS)
        for other, two in enumerate(WORDS)
        for end in range(5)
    ]
    path.write_text("\n".join(["a\tb\tscore", *rows]), encoding="utf-8")
    return path


@pytest.mark.parametrize("family", ["gpt2", "llama", "granite", "gemma3_text"])
@pytest.mark.parametrize("with_a_prefix", [False, True], ids=["alone", "prefix"])
def test_vectors_are_those_of_the_runtime(
    family: str, with_a_prefix: bool, playground: Playground, tmp_path: Path
) -> None:
    base = playground.base if family == "gpt2" else save_checkpoint(tmp_path / "base", SMALL_FAMILIES[family])
    model: Any = load_checkpoint(str(base)).model
    prefix = None
    if with_a_prefix:
        model = with_prefix(model, list(range(5, 10))).eval()
        prefix = tmp_path / PREFIX_FILE
        save_prefix(model, load_checkpoint(str(base)), prefix)
    export(str(base), tmp_path / "bundle", "fp32")
    ids = torch.zeros(3, 7, dtype=torch.int64)
    for row, text in enumerate(TEXTS):
        ids[row, : len(text)] = torch.tensor(text)
    with edgelm.load(tmp_path / "bundle", device="cpu", threads=1, prefix=prefix) as bundle:
        for pooling in ("mean", "last"):
            with quiet_torch(), torch.no_grad():
                found = pooled_states(model, ids, list(map(len, TEXTS)), pooling).numpy()
            expected = np.stack([bundle.embed(text, pooling=pooling) for text in TEXTS])
            assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()


def test_the_loss_by_hand() -> None:
    scores = torch.tensor([5.0, 1.0, 1.0])
    similarities = torch.tensor([0.5, 0.6, 0.4])
    wrong = math.exp(20 * (0.6 - 0.5)) + math.exp(20 * (0.4 - 0.5))  # the pairs of equal score are in no order
    assert float(cosent_loss(similarities, scores)) == pytest.approx(math.log(1 + wrong), rel=1e-5)
    assert float(cosent_loss(similarities, torch.ones(3))) == 0
    assert float(cosent_loss(torch.tensor([1.0, -1.0, -1.0]), scores)) == pytest.approx(0, abs=1e-6)


def test_ranks_by_hand() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 1000]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(9 / math.sqrt(90))  # ranks 1, 2.5, 2.5, 4
    assert spearman([1, 1], [1, 2]) == 0


def test_a_batch_of_pairs() -> None:
    batch = pair_batch([TextPair((1, 2, 3), (4,), 0.5), TextPair((5,), (6, 7), 2.0)])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [5, 0, 0], [4, 0, 0], [6, 7, 0]]
    assert batch["lengths"].tolist() == [3, 1, 1, 2] and batch["scores"].tolist() == [0.5, 2.0]


@pytest.mark.parametrize(("method", "rate"), [("full", 3e-3), ("lora", 1e-2), ("prefix", 0.1)])
def test_pairs_are_ranked_better(
    method: Method, rate: float, pairs: Path, playground: Playground, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = finetune(str(playground.base), pairs, out, replace(QUICK, method=method, learning_rate=rate))
    assert done.report is not None
    ranked = done.report.losses
    assert ranked["after"] > ranked["before"] + 0.1
    best = min(point["eval_loss"] for point in done.outcome.log if "eval_loss" in point)
    assert ranked["after"] == pytest.approx(1 - best, abs=1e-6), "the best weights are kept, and measured again"
    assert f"| after | {ranked['after']:.4f} |" in (out / "report.md").read_text(encoding="utf-8")
    assert json.loads((out / EMBED_TASK_FILE).read_text(encoding="utf-8"))["second_template"] == "{b}"
    assert f"--task {out / EMBED_TASK_FILE}" in done.report.next_steps[0]


def test_the_result_is_a_bundle_that_compares_texts(pairs: Path, playground: Playground, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = finetune(str(playground.base), pairs, out, replace(QUICK, method="full", epochs=1, learning_rate=1e-3))
    assert done.report is not None
    export(str(out), tmp_path / "bundle", "fp32", task=out / EMBED_TASK_FILE)
    with edgelm.load(tmp_path / "bundle", device="cpu", threads=1) as bundle:
        result: Any = bundle.task({"a": "red cat", "b": "red dog"})
        vectors = [bundle.embed(text, normalize=True) for text in ("red cat", "red dog")]
    assert result.similarity == pytest.approx(float(vectors[0] @ vectors[1]), abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "rows", "words"),
    [
        ({"second": None}, "a\tb\tscore\nx\ty\t1", "needs all of --prompt, --second and --similarity"),
        ({"completion": "{b}"}, "a\tb\tscore\nx\ty\t1", "leave out --completion and --turn"),
        ({"second": "y"}, "a\tb\tscore\nx\ty\t1", "--second 'y' names no column"),
        ({"similarity": "much"}, "a\tb\tscore\nx\ty\t1", "has no column 'much'"),
        ({}, "a\tb\tscore\nx\ty\thigh", "line 2 of .* has 'high' where a number belongs"),
        ({}, "a\tb\tscore\nx\ty\tnan", "has 'nan' where a number belongs"),
        ({}, "a\tb\tscore\nx\ty\t1\nx\tz\t1", "no two usable pairs with different scores"),
        ({}, "a\tb\tscore\nx\ty\t1\nx\tz\t2", "have no two different scores; give more pairs"),
        ({"latent": True, "method": "full"}, "a\tb\tscore\nx\ty\t1", "--latent"),
    ],
    ids=str,
)
def test_what_is_refused(
    changes: dict[str, Any], rows: str, words: str, playground: Playground, tmp_path: Path
) -> None:
    (tmp_path / "pairs.tsv").write_text(rows, encoding="utf-8")
    with pytest.raises(EdgelmError, match=words) as caught:
        finetune(str(playground.base), tmp_path / "pairs.tsv", tmp_path / "out", replace(QUICK, **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
