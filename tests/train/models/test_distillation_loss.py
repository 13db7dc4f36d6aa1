"""The losses of distillation against sums made by hand, and a student made of its teacher's layers."""

import math
from types import SimpleNamespace

import pytest
import torch
import transformers

from edgelm_train.models.distillation_loss import (
    DistillationWeights,
    distillation_loss,
    hidden_state_loss,
    soft_target_loss,
    teacher_layer,
)
from edgelm_train.models.student import student_from_layers

pytestmark = pytest.mark.export

# Two tokens to choose from: logits (log p, log (1-p)) have the probabilities p and 1-p.
THREE_QUARTERS = [math.log(3), 0.0]
HALF = [0.0, 0.0]


def test_soft_targets_by_hand() -> None:
    labels = torch.tensor([[0, 1, -100, 1]])
    teacher = torch.tensor([[THREE_QUARTERS, [9.0, 0.0], HALF, [-50.0, 50.0]]])
    student = torch.tensor([[HALF, [0.0, 7.0], THREE_QUARTERS, [3.0, 1.0]]])
    # The labels at 1 and 3 are learned, which the logits at 0 and 2 predict.
    first = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    second = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    loss = soft_target_loss(student, teacher, labels, temperature=1.0)
    assert float(loss) == pytest.approx((first + second) / 2, abs=1e-6)


def test_temperature_softens_and_keeps_the_size() -> None:
    labels = torch.tensor([[0, 1]])
    teacher, student = torch.tensor([[[math.log(9), 0.0], HALF]]), torch.tensor([[HALF, HALF]])
    # Temperature 2 halves the logit to log 3, whose probability is three quarters.
    expected = 4 * (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))
    assert float(soft_target_loss(student, teacher, labels, temperature=2.0)) == pytest.approx(expected, abs=1e-6)


def test_no_loss_where_nothing_differs() -> None:
    logits, states = torch.randn(2, 5, 7), [torch.randn(2, 5, 3)]
    assert float(soft_target_loss(logits, logits, torch.ones(2, 5), 2.0)) == pytest.approx(0, abs=1e-6)
    assert float(hidden_state_loss(states, states, torch.nn.Identity())) == pytest.approx(0, abs=1e-6)


def test_hidden_states_by_hand() -> None:
    east, north, west = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]
    student = [torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])]
    teacher = [torch.tensor([[west, west]]), torch.tensor([[north, [5.0, 5.0]]])]
    swap = torch.nn.Linear(2, 2, bias=False).requires_grad_(False)
    with torch.no_grad():
        swap.weight.copy_(torch.tensor([north, east]))
    # The only layer of the student is paired with the last layer of the teacher: cosines 1 and 1/sqrt 2.
    assert float(hidden_state_loss(student, teacher, swap)) == pytest.approx((0 + 1 - math.sqrt(0.5)) / 2)


def test_layers_are_paired_evenly() -> None:
    assert [teacher_layer(i, 2, 6) for i in range(2)] == [2, 5]
    assert [teacher_layer(i, 3, 12) for i in range(3)] == [3, 7, 11]
    assert [teacher_layer(i, 4, 6) for i in range(4)] == [0, 2, 3, 5]
    assert [teacher_layer(i, 4, 4) for i in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize("hidden", [0.0, 0.25])
def test_the_three_are_weighed(hidden: float) -> None:
    labels = torch.tensor([[0, 1]])
    states = [torch.zeros(1, 2, 2), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])]
    turned = [torch.zeros(1, 2, 2), torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])]
    student = SimpleNamespace(loss=torch.tensor(3.0), logits=torch.tensor([[HALF, HALF]]), hidden_states=states)
    teacher = SimpleNamespace(logits=torch.tensor([[THREE_QUARTERS, HALF]]), hidden_states=turned)
    soft = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    weights = DistillationWeights(soft=2.0, hidden=hidden, hard=0.5, temperature=1.0)
    loss = distillation_loss(student, teacher, labels, torch.nn.Identity(), weights)
    assert float(loss) == pytest.approx(1.5 + 2 * soft + hidden * 1)


def test_a_student_of_alternate_layers() -> None:
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=4, n_head=2)
    torch.manual_seed(0)
    teacher = transformers.GPT2LMHeadModel(config).eval()
    student = student_from_layers(teacher, 2).eval()
    assert student.config.n_layer == 2 and teacher.config.n_layer == 4
    for mine, his in [(0, 1), (1, 3)]:
        for name, value in student.transformer.h[mine].state_dict().items():
            assert torch.equal(value, teacher.transformer.h[his].state_dict()[name])
    assert torch.equal(student.transformer.wte.weight, teacher.transformer.wte.weight)
    assert student.lm_head.weight is student.transformer.wte.weight
    ids = torch.tensor([[1, 2, 3]])
    whole = student_from_layers(teacher, 4).eval()
    assert torch.allclose(whole(ids).logits, teacher(ids).logits, atol=1e-6)
