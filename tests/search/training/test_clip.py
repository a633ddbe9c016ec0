"""Gradients are cut to a norm where networks have no batch norms, or where a setting says so."""

import math

import pytest
import torch
from torch import Tensor, nn

from search.data.base import Data
from search.training.batches import FirstBatches, training_batches
from search.training.finetune import finetune


def moved(data: Data, norm: nn.Module, clip: float | None) -> Tensor:
    """How far one step with a learning rate of 1 moves all weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(data.train.inputs[0].numel(), 4), norm)
    with torch.no_grad():
        model[1].weight.mul_(100)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    batches = FirstBatches(training_batches(data, 32, 0, "cpu"), 1)
    finetune(model, batches, epochs=1, lr=1.0, momentum=0.0, weight_decay=0.0, clip=clip)
    return nn.utils.parameters_to_vector(model.parameters()).detach() - before


def test_one_step_is_no_longer_than_the_norm(small_data: Data) -> None:
    assert moved(small_data, nn.Identity(), math.inf).norm() > 1.5
    assert moved(small_data, nn.Identity(), 0.5).norm().item() == pytest.approx(0.5, rel=1e-3)


def test_the_default_is_one_without_batch_norms_and_no_limit_with_them(small_data: Data) -> None:
    assert torch.equal(moved(small_data, nn.Identity(), None), moved(small_data, nn.Identity(), 1.0))
    assert torch.equal(
        moved(small_data, nn.BatchNorm1d(4), None), moved(small_data, nn.BatchNorm1d(4), math.inf)
    )
