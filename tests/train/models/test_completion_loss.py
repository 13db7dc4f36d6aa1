"""The loss in parts is transformers' own loss, with fewer logits and less padding."""

from typing import Any

import pytest
import torch

from edgelm_train.data.parts import parts_of_rows
from edgelm_train.models import completion_loss
from edgelm_train.models.completion_loss import learned_logits, losses_in_parts
from tests.export.checkpoints import SMALL_FAMILIES, _config, randomize

pytestmark = pytest.mark.export


def model_of(family: str) -> Any:
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(_config(SMALL_FAMILIES[family])).eval()
    randomize(model)
    return model


@pytest.mark.parametrize("family", ["llama", "granite", "gemma3_text"])
def test_gradients_are_those_of_the_whole_batch(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Granite scales its logits after the head."""
    model = model_of(family)
    ids = torch.randint(0, 300, (5, 40), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for row, length in enumerate((40, 12, 30, 9, 12)):
        labels[row, : length // 2] = labels[row, length:] = -100
    model(input_ids=ids, labels=labels).loss.backward()
    expected = {name: value.grad.clone() for name, value in model.named_parameters()}
    whole = float(model(input_ids=ids, labels=labels).loss)
    model.zero_grad()
    monkeypatch.setitem(completion_loss._TOKENS_AT_ONCE, "cpu", 50)
    parts = []
    for loss in losses_in_parts(model, {"input_ids": ids, "labels": labels}):
        loss.backward()
        parts.append(float(loss))
    assert len(parts) == 3
    assert sum(parts) == pytest.approx(whole, rel=1e-5)
    for name, value in model.named_parameters():
        assert torch.allclose(value.grad, expected[name], rtol=1e-3, atol=1e-5), name


def test_the_head_computes_learned_tokens_alone() -> None:
    model = model_of("llama")
    seen = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, arguments, logits: seen.append(tuple(logits.shape)))
    ids = torch.arange(20).view(2, 10)
    labels = torch.full_like(ids, -100)
    labels[0, 7:], labels[1, 0] = ids[0, 7:], 5
    logits, targets = learned_logits(model, ids, labels)
    assert seen == [(1, 3, 300)] and targets.tolist() == [7, 8, 9]
    with torch.no_grad():
        assert torch.allclose(logits, model(ids).logits[0, 6:9], atol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "parts"),
    [
        ([5, 5, 5], [[0, 1, 2]]),
        ([3, 100, 4], [[1], [2, 0]]),
        ([60, 50, 40, 30], [[0, 1], [2, 3]]),
        ([200, 10], [[0], [1]]),
        ([], []),
    ],
)
def test_rows_of_similar_lengths_are_computed_together(lengths: list[int], parts: list[list[int]]) -> None:
    assert parts_of_rows(lengths, 120) == parts
