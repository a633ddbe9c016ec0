"""The distillation loss by hand, and a teacher that is left as it was."""

import math

import pytest
import torch
from networks import images, with_state
from torch import nn

from search.models.resnet import ResNet
from search.training.distillation import Teacher, distillation_loss, distillation_problems


def test_the_loss_by_hand() -> None:
    # At temperature 2 the teacher says (3/4, 1/4) and the student (1/2, 1/2).
    soft = torch.tensor([[2 * math.log(3), 0.0]])
    logits = torch.zeros(1, 2)
    labels = torch.tensor([1])
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    for share in (0.0, 0.25, 1.0):
        expected = (1 - share) * math.log(2) + share * 4 * divergence
        loss = distillation_loss(logits, soft, labels, share, 2.0)
        assert loss.item() == pytest.approx(expected, rel=1e-5)
    twice = distillation_loss(logits.repeat(2, 1), soft.repeat(2, 1), labels.repeat(2), 1.0, 2.0)
    assert twice.item() == pytest.approx(4 * divergence, rel=1e-5)


def test_a_student_like_its_teacher_has_nothing_to_learn() -> None:
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = distillation_loss(logits, logits.detach(), torch.zeros(8, dtype=torch.int64), 1.0, 4.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert logits.grad.abs().max() < 1e-6


def test_at_a_high_temperature_logits_are_matched() -> None:
    """Hinton et al., equation 4: the gradient tends to (z - v) / (N T^2), times the loss's T^2."""
    generator = torch.Generator().manual_seed(0)
    logits, soft = (torch.randn(1, 5, generator=generator) for _ in range(2))
    logits, soft = (logits - logits.mean()).requires_grad_(), soft - soft.mean()
    (gradient,) = torch.autograd.grad(distillation_loss(logits, soft, torch.tensor([0]), 1.0, 100.0), logits)
    torch.testing.assert_close(gradient, (logits - soft).detach() / 5, rtol=0.05, atol=1e-3)


def test_the_teacher_is_a_frozen_copy_in_eval_mode() -> None:
    network = ResNet(8, classes=4).train()
    before = with_state(network)
    teacher = Teacher(network, images(2), 0.5, 4.0)
    logits = torch.zeros(4, 4, requires_grad=True)
    teacher.loss(images(4), logits, torch.arange(4)).backward()
    assert teacher.layout is torch.channels_last
    assert network.training
    assert not teacher.network.training
    assert all(p.requires_grad and p.is_contiguous() and p.grad is None for p in network.parameters())
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert all(torch.equal(before[key], value) for key, value in teacher.network.state_dict().items())
    with torch.no_grad():
        expected = distillation_loss(logits, network.eval()(images(4)), torch.arange(4), 0.5, 4.0)
    torch.testing.assert_close(teacher.loss(images(4), logits, torch.arange(4)), expected)


def test_settings_out_of_range_are_named() -> None:
    teacher = nn.Identity()
    assert distillation_problems(0.5, 4.0, teacher) == distillation_problems(0.0, 4.0, None) == []
    for share, of in ((1.5, teacher), (math.nan, teacher), (0.5, None)):
        assert [space.field for space in distillation_problems(share, 4.0, of)] == ["distillation"]
    both = distillation_problems(-1.0, 0.0, teacher)
    assert [space.field for space in both] == ["distillation", "temperature"]
