"""Cutting modules by hand."""

import pytest
import torch
from torch import nn

from amc_env.graph.surgery import resize, silence_inputs


def keep(*indices: int) -> torch.Tensor:
    return torch.tensor(indices)


def test_convolution_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    weight, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    resize(model, {"0": {"in": keep(0, 3), "out": keep(1, 2, 5)}})
    assert torch.equal(model[0].weight, weight[[1, 2, 5]][:, [0, 3]])
    assert torch.equal(model[0].bias, bias[[1, 2, 5]])
    assert (model[0].in_channels, model[0].out_channels) == (2, 3)
    assert model(torch.zeros(1, 2, 5, 5)).shape == (1, 3, 3, 3)


def test_depthwise_convolution_keeps_a_group_for_every_channel() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4))
    resize(model, {"0": {"out": keep(1, 3)}})
    assert (model[0].in_channels, model[0].out_channels, model[0].groups) == (2, 2, 2)
    assert model(torch.zeros(1, 2, 5, 5)).shape == (1, 2, 3, 3)


def test_grouped_convolution_loses_the_same_inputs_in_every_group() -> None:
    model = nn.Sequential(nn.Conv2d(6, 4, 1, groups=2))
    weight = model[0].weight.detach().clone()
    resize(model, {"0": {"in": keep(0, 2, 3, 5)}})
    assert torch.equal(model[0].weight, weight[:, [0, 2]])
    assert (model[0].in_channels, model[0].groups) == (4, 2)


def test_linear_batch_norm_and_prelu() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.PReLU(4))
    model[1].running_mean = torch.arange(4.0)
    stay = {"out": keep(0, 2)}
    resize(model, {"0": {"in": keep(4), **stay}, "1": stay, "2": stay})
    assert model[0].weight.shape == (2, 1)
    assert (model[0].in_features, model[0].out_features) == (1, 2)
    assert model[1].running_mean.tolist() == [0, 2]
    assert (model[1].num_features, model[2].num_parameters) == (2, 2)
    assert model(torch.zeros(3, 1)).shape == (3, 2)


def test_parameters_are_new_and_keep_requires_grad() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].bias.requires_grad_(False)
    old = model[0].weight
    resize(model, {"0": {"out": keep(0, 1)}})
    with torch.no_grad():
        model[0].weight.zero_()
    assert bool(old.ne(0).any())
    assert model[0].weight.requires_grad
    assert not model[0].bias.requires_grad


@pytest.mark.parametrize("module", [nn.Conv2d(6, 4, 3, groups=2), nn.Conv2d(6, 4, 3), nn.Linear(6, 4)])
def test_silenced_inputs_no_longer_matter(module: nn.Module) -> None:
    shape = (2, 6) if isinstance(module, nn.Linear) else (2, 6, 5, 5)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, [1, 4]] += 7
    silence_inputs(module, keep(1, 4))
    with torch.no_grad():
        torch.testing.assert_close(module(x), module(changed))
    changed[:, 0] += 7
    with torch.no_grad():
        assert not torch.allclose(module(x), module(changed))
