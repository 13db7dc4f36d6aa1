"""Scores of fp32 bundles against torch and transformers."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from edgelm.loading import load
from edgelm.model import Model
from tests.build_side import Report
from tests.export.checkpoints import Ids, Shape, Tiny, TinyExport

pytestmark = pytest.mark.export

SHAPE = Shape(width=48, heads=4)


@pytest.fixture(scope="module")
def tiny(tiny_export: TinyExport) -> Tiny:
    return tiny_export(SHAPE, "fp32")


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Model:
    return load(tiny.exported.bundle.path, device="cpu", threads=1)


def torch_logprobs(tiny: Tiny, ids: Ids) -> npt.NDArray[np.float64]:
    """Log-probabilities (T - 1,) of every token except the first."""
    logits = torch.from_numpy(tiny.torch.logits(ids)).double()
    logprobs: npt.NDArray[np.float64] = torch.log_softmax(logits, -1).numpy()[np.arange(len(ids) - 1), ids[1:]]
    return logprobs


def test_log_probabilities(tiny: Tiny, model: Model, report: Report) -> None:
    worst = 0.0
    for seed in range(10):
        ids = tiny.text(seed)
        expected = torch_logprobs(tiny, ids)
        for cut in (1, 2, 17, 40, 63):
            logprobs = [token.logprob for token in model.score(ids[:cut].tolist(), ids[cut:].tolist()).tokens]
            worst = max(worst, float(np.abs(np.array(logprobs) - expected[cut - 1 :]).max()))
    report(f"log-probabilities against torch: max difference {worst:.1e}")
    assert worst <= 1e-4


def test_choices(tiny: Tiny, model: Model) -> None:
    for seed in range(10):
        ids = tiny.text(seed).tolist()
        prompt, options = ids[:20], [ids[20:21], ids[21:24], ids[24:34]]
        sums = [torch_logprobs(tiny, np.array(prompt + option))[19:].sum() for option in options]
        logprobs = model.choose(prompt, options)
        assert [option.logprob for option in logprobs.options] == pytest.approx(sums, abs=1e-4)
        expected = torch.softmax(torch.tensor(np.array(sums)), 0).tolist()
        assert [option.probability for option in logprobs.options] == pytest.approx(expected, abs=1e-5)


def transformers_perplexity(tiny: Tiny, ids: Ids, stride: int) -> float:
    """The loop in transformers' documentation, "Perplexity of fixed-length models", unchanged."""
    model, encodings = tiny.torch.model, torch.from_numpy(ids)[None]
    max_length = model.config.n_positions
    seq_len = encodings.size(1)
    nll_sum = torch.tensor(0.0)
    n_tokens = 0
    prev_end_loc = 0
    for begin_loc in range(0, seq_len, stride):
        end_loc = min(begin_loc + max_length, seq_len)
        trg_len = end_loc - prev_end_loc
        input_ids = encodings[:, begin_loc:end_loc]
        target_ids = input_ids.clone()
        target_ids[:, :-trg_len] = -100
        with torch.no_grad():
            outputs = model(input_ids, labels=target_ids)
            neg_log_likelihood = outputs.loss
        num_valid_tokens = (target_ids != -100).sum().item()
        batch_size = target_ids.size(0)
        num_loss_tokens = num_valid_tokens - batch_size
        nll_sum += neg_log_likelihood * num_loss_tokens
        n_tokens += num_loss_tokens
        prev_end_loc = end_loc
        if end_loc == seq_len:
            break
    return float(torch.exp(nll_sum / n_tokens))


@pytest.mark.parametrize("stride", [2, 16, 32, 63, 64])
@pytest.mark.parametrize("length", [10, 64, 200, 260])
def test_perplexity_is_transformers_recipe(tiny: Tiny, model: Model, stride: int, length: int) -> None:
    ids = np.random.default_rng(length).integers(0, SHAPE.vocab, length)
    expected = transformers_perplexity(tiny, ids, stride)
    assert model.perplexity(ids.tolist(), stride=stride).value == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_embeddings(tiny_export: TinyExport, precision: str) -> None:
    tiny = tiny_export(SHAPE, precision)  # type: ignore[arg-type]
    model = load(tiny.exported.bundle.path, device="cpu", threads=1)
    for seed in range(5):
        ids = tiny.text(seed)
        with torch.no_grad():
            hidden = tiny.torch.model.transformer(torch.from_numpy(ids)[None]).last_hidden_state[0].numpy()  # (T, D)
        most = 1e-3 if precision == "fp32" else 5e-2
        model.session.reset()
        np.testing.assert_allclose(model.session.step_hidden(ids)[1], hidden, atol=most)
        np.testing.assert_allclose(model.embed(ids.tolist()), hidden.mean(axis=0), atol=most)
        np.testing.assert_allclose(model.embed(ids.tolist(), pooling="last"), hidden[-1], atol=most)
