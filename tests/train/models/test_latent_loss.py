"""The losses of a latent model against numbers made by hand and against torch's distributions."""

import math

import pytest
import torch
from torch.distributions import Normal, kl

from edgelm_train.models.latent_loss import (
    active_units,
    kl_divergence,
    kl_weight,
    reconstruction_loss,
    sample,
    with_free_bits,
)

pytestmark = pytest.mark.export


def test_the_divergence_by_hand() -> None:
    mean, log_variance = torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[0.0, 0.0, math.log(4)]])
    # Nothing; half the squared mean; half of 4 - ln 4 - 1.
    assert kl_divergence(mean, log_variance).tolist() == [pytest.approx([0, 0.5, 0.5 * (4 - math.log(4) - 1)])]


def test_the_divergence_is_torchs() -> None:
    torch.manual_seed(0)
    mean, log_variance = torch.randn(5, 7), torch.randn(5, 7)
    expected = kl.kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(kl_divergence(mean, log_variance), expected)


def test_a_draw_moves_the_mean_by_noise_and_lets_gradients_pass() -> None:
    mean = torch.tensor([[1.0, -2.0]], requires_grad=True)
    log_variance = torch.tensor([[math.log(9.0), 0.0]], requires_grad=True)
    z = sample(mean, log_variance, torch.tensor([[2.0, -1.0]]))
    assert z.tolist() == [pytest.approx([1 + 3 * 2, -2 - 1])]
    z.sum().backward()
    assert mean.grad is not None and mean.grad.tolist() == [[1, 1]]
    assert log_variance.grad is not None
    assert log_variance.grad.tolist() == [pytest.approx([3.0, -0.5])]  # noise * sigma / 2


def test_the_reconstruction_loss_sums_a_texts_labelled_tokens() -> None:
    logits = torch.zeros(2, 3, 4)
    logits[0, 0] = torch.tensor([math.log(5.0), 0, 0, 0])  # probabilities 5/8 and 1/8
    labels = torch.tensor([[-100, 0, 2], [-100, 1, -100]])
    expected = [math.log(8 / 5) + math.log(4), math.log(4)]
    assert reconstruction_loss(logits, labels).tolist() == pytest.approx(expected)


def test_free_bits_bound_each_dimensions_mean_over_the_batch() -> None:
    divergence = torch.tensor([[0.1, 2.0, 0.0], [0.5, 0.0, 0.2]], requires_grad=True)  # means 0.3, 1.0, 0.1
    loss = with_free_bits(divergence, 0.5)
    assert float(loss) == pytest.approx(0.5 + 1.0 + 0.5)
    loss.backward()
    assert divergence.grad is not None and divergence.grad.tolist() == [[0, 0.5, 0], [0, 0.5, 0]]


@pytest.mark.parametrize(
    ("step", "weight"), [(0, 0.0), (10, 0.4), (25, 1.0), (49, 1.0), (50, 0.0), (60, 0.4), (75, 1.0), (99, 1.0)]
)
def test_the_weight_rises_in_each_cycles_first_half(step: int, weight: float) -> None:
    assert kl_weight(step, 100, 2) == pytest.approx(weight)


def test_without_cycles_the_weight_is_always_one() -> None:
    assert [kl_weight(step, 10, 0) for step in range(10)] == [1.0] * 10


def test_units_whose_means_hardly_vary_are_not_active() -> None:
    means = torch.tensor([[0.0, 0.0, 5.0], [1.0, 0.1, 5.0], [2.0, 0.0, 5.0]])  # variances 1, 0.0033, 0
    assert active_units(means) == 1
