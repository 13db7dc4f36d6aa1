"""Muon: the orthogonal update, and one step by hand against torch's own optimizer."""

import pytest
import torch
import transformers

from edgelm_train.run.muon import _Muon, muon_seconds, orthogonal

pytestmark = pytest.mark.export


@pytest.mark.parametrize("shape", [(8, 8), (4, 12), (12, 4)])
def test_the_update_is_nearly_orthogonal(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonal(matrix)
    u, singular, vh = torch.linalg.svd(matrix, full_matrices=False)
    assert singular.max() / singular.min() > 1.5
    assert torch.linalg.svdvals(found) == pytest.approx(torch.ones(min(shape)), abs=0.35)
    assert torch.diagonal(u.T @ found @ vh.T).min() > 0.6  # the same directions
    assert torch.allclose(orthogonal(100 * matrix), found, atol=1e-5)


def test_on_a_cpu_nothing_is_computed_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many processors multiply bfloat16 ten times slower than float32."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", None)
    assert orthogonal(torch.eye(3)).dtype == torch.float32


def test_steps_equal_torchs_optimizer() -> None:
    """torch.optim.Muon computes the update in bfloat16, so the steps are equal to its precision."""
    start = torch.randn((6, 16), generator=torch.Generator().manual_seed(1))
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = (
        _Muon([ours], 0.02, 0.1),
        torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for seed in range(5):
        gradient = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = (theirs - start).abs().mean()
    assert (ours - theirs).abs().mean() < 0.02 * moved


def test_a_timed_step_changes_no_weight() -> None:
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    )
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert muon_seconds(model) > 0
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
