"""MACs and parameters against published counts, counts by hand, and the cut networks themselves."""

import pytest
import torch
from masking import SUITABLE, masked, weight
from networks import (
    NETWORKS,
    SMALL,
    Chain,
    ImageNetMobileNet,
    ImageNetMobileNetV2,
    images,
    network,
    problem,
    random_removed,
    traced,
)
from torch import Tensor, nn

from amc_env.costs.counts import Macs, Params
from amc_env.graph.layers import LayerGraph
from amc_env.graph.tracing import _layers, trace
from amc_env.space import Cost
from amc_env.testing import check_cost
from search.models.mobilenet import MobileNet
from search.models.resnet import ResNet
from search.study.apply import read_strategy

HALF_FLOPS = (24, 48, 96, 80, 192, 200, 328, 352, 368, 360, 328, 400, 736, 752)
HALF_TIME = (16, 48, 88, 80, 192, 168, 336, 360, 360, 352, 352, 368, 768, 680)


def layers_only(model: nn.Module) -> LayerGraph:
    """The layers of a network that is only counted, not pruned: no coupling is traced."""
    return LayerGraph(tuple(_layers(model.eval(), images(1, size=224)).values()), (), (), (), 0)


@pytest.mark.parametrize(
    ("model", "macs"),
    [
        (ImageNetMobileNet(), 568_741_352),
        (ImageNetMobileNet(HALF_FLOPS), 293_871_000),
        (ImageNetMobileNet(HALF_TIME), 273_977_912),
        (ImageNetMobileNetV2(), 300_775_272),
    ],
    ids=["v1", "v1_half_flops", "v1_half_time", "v2"],
)
def test_published_networks_on_imagenet(model: nn.Module, macs: int) -> None:
    assert Macs(layers_only(model))([]) == macs


@pytest.mark.parametrize(
    ("name", "macs"), [("amc_mobilenet_half_macs", 293_871_000), ("amc_mobilenet_half_time", 273_977_912)]
)
def test_published_strategies_leave_the_published_networks(name: str, macs: int) -> None:
    graph = trace(MobileNet(3, 1000, stride=2).eval(), images(2, size=224))
    decisions = read_strategy(name)["decisions"]
    assert [group.total for group in graph.groups] == [entry["total"] for entry in decisions.values()]
    assert Macs(graph)([decisions[group.name]["removed"] for group in graph.groups]) == macs


@pytest.mark.parametrize("shortcut", ["pad", "selection"])
def test_resnet20(shortcut: str) -> None:
    graph = trace(ResNet(20, shortcut).eval(), images(1, size=32))
    nothing = [0] * len(graph.groups)
    assert Macs(graph)(nothing) == 40_551_050
    assert Params(graph)(nothing) == 269_722


@pytest.mark.parametrize(
    ("removed", "weights", "macs"),
    [
        ((0, 0, 0), 29_232, 29_933_568),
        ((0, 0, 2), 28_476, 29_159_424),
        ((3, 0, 2), 27_531, 28_191_744),
        ((3, 2, 2), 26_181, 26_809_344),
    ],
)
def test_netadapts_worked_case(removed: tuple[int, ...], weights: int, macs: int) -> None:
    graph = trace(Chain().eval(), images(1, size=32))
    assert Params(graph)(removed) == weights
    assert Macs(graph)(removed) == macs


def hooked_macs(model: nn.Module, inputs: Tensor) -> int:
    """Counted while the network runs: outputs times the size of a filter, and a linear layer's bias."""
    total = 0

    def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        nonlocal total
        if getattr(module, "costless", False):
            return
        total += output[0].numel() * module.weight[0].numel()
        if isinstance(module, nn.Linear):
            total += output[0].numel()

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize("name", NETWORKS)
def test_costs_are_those_of_the_cut_network(name: str) -> None:
    candidates, grids = problem(name)
    removed = random_removed(grids, 0)
    small = candidates.cut(removed)
    assert Params(candidates.graph)(removed) == sum(p.numel() for p in small.parameters())
    assert Macs(candidates.graph)(removed) == pytest.approx(hooked_macs(small, images(1)), rel=1e-12)


@pytest.mark.parametrize(("name", "granularity"), SUITABLE)
def test_masked_costs_count_what_is_not_zero(name: str, granularity: str) -> None:
    candidates, graph, grids = masked(name, granularity)
    parameters = sum(p.numel() for p in candidates.original.parameters())
    assert Params(graph)([]) == parameters
    for removed in (random_removed(grids, 0), [grid.count(grid.size - 1) for grid in grids]):
        model = candidates.cut(removed)
        zeros = {grid.name: int((weight(model, grid.name) == 0).sum()) for grid in grids}
        assert Params(graph, grids)(removed) == parameters - sum(zeros.values())
        skipped = sum(graph.layer(layer).positions * count for layer, count in zeros.items())
        assert Macs(graph, grids)(removed) == hooked_macs(model, images(1)) - skipped


def test_masked_costs_by_hand() -> None:
    """mlp has 192 x 20, 20 x 16 and 16 x 4 weights, and 40 biases."""
    _, graph, grids = masked("mlp", "2:4")
    for removed, weights in (((0, 0, 0), 4224), ((2, 0, 0), 2304), ((0, 2, 2), 4032), ((2, 2, 2), 2112)):
        assert Params(graph, grids)(removed) == Macs(graph, grids)(removed) == weights + 40
    _, graph, grids = masked("mlp", "fine_grained")
    assert Params(graph, grids)((1, 10, 3)) == 4224 + 40 - 14


@pytest.mark.parametrize("cost", [Macs, Params])
@pytest.mark.parametrize(("name", "granularity"), SUITABLE)
def test_masked_costs_keep_the_contract_of_costs(name: str, granularity: str, cost: type[Cost]) -> None:
    _, graph, grids = masked(name, granularity)
    check_cost(cost(graph, grids), grids, falls=True, seeds=1)


@pytest.mark.parametrize("cost", [Macs, Params])
@pytest.mark.parametrize("name", SMALL)
def test_costs_keep_the_contract_of_costs(name: str, cost: type[Cost]) -> None:
    candidates, grids = problem(name, multiple=1)
    check_cost(cost(candidates.graph), grids, falls=True)


def test_other_parameters_are_counted() -> None:
    model = network("mlp")
    model.register_parameter("extra", nn.Parameter(torch.zeros(7)))
    graph = trace(model, images(1))
    assert graph.other_params == 7
    assert Params(graph)([0, 0]) == Params(traced("mlp")[1])([0, 0]) + 7


def test_names_and_units() -> None:
    _, graph = traced("mlp")
    assert [(c.name, c.unit) for c in (Macs(graph), Params(graph))] == [
        ("macs", "MACs"),
        ("params", "parameters"),
    ]
