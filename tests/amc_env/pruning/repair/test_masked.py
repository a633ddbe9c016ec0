"""Least squares with zeros held."""

import pytest
import torch
from networks import images as some_images
from networks import network
from torch import nn

from amc_env.graph.topology import Topology
from amc_env.graph.tracing import trace_layers
from amc_env.pruning.calibration import Moments
from amc_env.pruning.candidate import MaskedCandidates
from amc_env.pruning.granularity import NM, FineGrained
from amc_env.pruning.repair.masked import MaskedLeastSquares, MaskedSequential, refitted


def by_hand(x, y, weight, ridge, intercept):
    """One output at a time, from the samples themselves."""
    x, y = x.double(), y.double()
    centre = x - x.mean(0) if intercept else x
    target = y - y.mean(0) if intercept else y
    lift = ridge * (centre**2).sum(0).mean()
    out = torch.zeros_like(weight, dtype=torch.float64)
    for row, kept in enumerate(weight != 0):
        a = centre[:, kept]
        left = a.T @ a + lift * torch.eye(a.shape[1], dtype=torch.float64)
        out[row, kept] = torch.linalg.solve(left, a.T @ target[:, row] + lift * weight[row, kept].double())
    return out, y.mean(0) - out @ x.mean(0)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("kept", [0.2, 0.7])
def test_every_output_is_fitted_on_what_it_still_sees(intercept, kept):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=generator) + 0.5
    weight = torch.randn(20, 12, generator=generator)
    y = x @ weight.T + 1.0
    weight = weight * (torch.rand(20, 12, generator=generator) < kept)
    weight[3] = 0.0
    got, offset = refitted(Moments.of(x, y, 1), weight, intercept, 1e-2)
    want, wanted_offset = by_hand(x, y, weight, 1e-2, intercept)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
    assert torch.equal(got == 0, weight == 0)
    if intercept:
        torch.testing.assert_close(offset, wanted_offset, rtol=1e-8, atol=1e-10)
    else:
        assert offset is None


def test_a_copy_of_a_lost_input_takes_over_its_weight():
    x = torch.randn(100, 1, generator=torch.Generator().manual_seed(0)).expand(-1, 2)
    got, _ = refitted(Moments.of(x, 5.0 * x[:, :1], 1), torch.tensor([[2.0, 0.0]]), False, 1e-9)
    torch.testing.assert_close(got, torch.tensor([[5.0, 0.0]], dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_groups_are_fitted_apart():
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(80, 6, generator=generator), torch.randn(4, 3, generator=generator)
    y = torch.cat([x[:, :3] @ weight[:2].T, x[:, 3:] @ weight[2:].T], dim=1)
    weight = weight * torch.tensor([[1, 0, 1], [1, 1, 1], [0, 1, 1], [1, 1, 0]])
    got, _ = refitted(Moments.of(x, y, 2), weight, False, 1e-3)
    want = [
        by_hand(x[:, 3 * g :][:, :3], y[:, 2 * g :][:, :2], weight[2 * g :][:2], 1e-3, False)[0]
        for g in (0, 1)
    ]
    torch.testing.assert_close(got, torch.cat(want), rtol=1e-8, atol=1e-10)


def masked(granularity, ratio):
    """A network, images, its masked candidates' builder, its layers and counts."""
    model = network("residual")
    images = some_images(60)
    graph, grids = granularity.decisions(trace_layers(model, images[:2]))
    removal_rank = {
        grid.name: granularity.removal_rank(
            model.get_submodule(grid.name).weight.detach().abs(), graph.layer(grid.name)
        )
        for grid in grids
    }
    builder = MaskedCandidates(model, grids, removal_rank)
    layers = [graph.layer(grid.name) for grid in grids]
    return model, images, builder, layers, [grid.snap(ratio) for grid in grids]


@torch.no_grad()
@pytest.mark.parametrize("granularity, ratio", [(FineGrained(), 0.5), (NM(2, 4), 0.5)])
@pytest.mark.parametrize("kind", [MaskedLeastSquares, MaskedSequential])
def test_outputs_come_nearer_and_zeros_stay(granularity, ratio, kind):
    model, images, builder, layers, removed = masked(granularity, ratio)
    repair = kind(model, layers, Topology.of(model), images, per_image=16, seed=0)
    want = model(images)
    cut = builder.cut(removed)
    error = (cut(images) - want).square().mean()
    repair(cut, removed, {})
    assert (cut(images) - want).square().mean() < 0.6 * error
    for name, mask in builder.masks(removed).items():
        weight = cut.get_submodule(name).weight
        assert (weight[~mask] == 0).all()
        assert (weight[mask] != 0).all()


@torch.no_grad()
@pytest.mark.parametrize("kind", [MaskedLeastSquares, MaskedSequential])
def test_what_lost_nothing_is_left_alone(kind):
    model, images, builder, layers, removed = masked(FineGrained(), 0.5)
    repair = kind(model, layers, Topology.of(model), images, per_image=4, seed=0)
    first = [removed[0]] + [0] * (len(removed) - 1)
    cut = builder.cut(first)
    before = {
        name: module.weight.clone() for name, module in cut.named_modules() if isinstance(module, nn.Conv2d)
    }
    repair(cut, first, {})
    changed = [
        name for name, weight in before.items() if not torch.equal(weight, cut.get_submodule(name).weight)
    ]
    assert changed == [layers[0].name]
