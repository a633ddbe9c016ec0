"""Cycles by hand, in steps of the array, and those of the cut networks."""

from dataclasses import replace

import pytest
from networks import NETWORKS, SMALL, Chain, images, problem, random_removed, traced
from refusals import refused

from amc_env.costs.counts import Macs, kept_channels
from amc_env.costs.cycles import Cycles
from amc_env.graph.layers import Layer, LayerGraph
from amc_env.graph.tracing import _layers, trace
from amc_env.testing import check_cost


def layer(
    name: str, kind: str, into: int, out: int, kernel: int, size: int, groups: int = 1, **more
) -> Layer:
    shape = (size, size)
    return Layer(name, 0, kind, into, out, (kernel, kernel), (1, 1), groups, False, shape, shape, **more)


def test_by_hand() -> None:
    layers = (
        layer("conv", "conv", 3, 40, 3, 7),  # ceil(49/8) * ceil(3/16) * ceil(40/16) * 9
        layer("depthwise", "conv", 40, 40, 3, 7, groups=40),  # ceil(49/4) * ceil(40/16) * 9
        layer("grouped", "conv", 40, 80, 1, 2, groups=2),  # ceil(4/8) * ceil(20/16) * ceil(40/16) * 2
        layer("free", "conv", 80, 80, 1, 2, costless=True),
        layer("fc", "linear", 100, 10, 1, 1),  # ceil(100/16) * ceil(10/16)
    )
    cycles = Cycles(LayerGraph(layers, (), (), (), 0, other_macs=5000))
    assert cycles([]) == 7 * 3 * 9 + 13 * 3 * 9 + 2 * 3 * 2 + 0 + 7 + 3  # 5,000 MACs at 2,048 a cycle
    assert (cycles.name, cycles.unit) == ("cycles", "cycles")


def test_a_full_array_is_fully_used() -> None:
    full = LayerGraph((layer("conv", "conv", 32, 16, 3, 4),), (), (), (), 0)
    assert Cycles(full)([]) == 2 * 2 * 9


def test_channels_pay_in_steps_of_the_array() -> None:
    graph = trace(Chain((3, 17, 16, 10)).eval(), images(1, size=32))
    cycles = Cycles(graph)
    assert cycles([0, 0]) == 128 * 9 * (2 + 2 + 1)
    assert cycles([1, 0]) == 128 * 9 * 3  # 1 of 17
    assert cycles([1, 1]) == cycles([1, 15]) == cycles([1, 0])  # of 16


def test_kept_channels() -> None:
    sizes, per_unit = kept_channels(trace(Chain().eval(), images(1, size=32)))
    assert sizes.tolist() == [[3, 16], [16, 32], [32, 64], [64, 10]]
    assert (sizes - per_unit @ [3, 2, 1]).tolist() == [[3, 13], [13, 30], [30, 63], [63, 10]]


@pytest.mark.parametrize("name", NETWORKS)
def test_cycles_are_those_of_the_cut_network(name: str) -> None:
    candidates, grids = problem(name)
    removed = random_removed(grids, 0)
    small = tuple(_layers(candidates.cut(removed).eval(), images()).values())
    parallel = 3, 5, 7
    cut = Cycles(LayerGraph(small, (), (), (), 0), *parallel)
    assert Cycles(replace(candidates.graph, other_macs=0), *parallel)(removed) == cut([])


@pytest.mark.parametrize("name", NETWORKS)
def test_one_multiplier_takes_a_cycle_for_each_mac(name: str) -> None:
    graph = traced(name)[1]
    nothing = [0] * len(graph.groups)
    biases = sum(x.out_channels * x.positions for x in graph.layers if x.kind == "linear" and x.bias)
    one = Cycles(graph, 1, 1, 1)
    assert one(nothing) == Macs(graph)(nothing) - biases


@pytest.mark.parametrize("name", SMALL)
def test_cycles_keep_the_contract_of_costs(name: str) -> None:
    candidates, grids = problem(name, multiple=1)
    check_cost(Cycles(candidates.graph, 4, 4, 8), grids)


def test_refusals_name_all_that_is_wrong() -> None:
    with refused("out_of_range", ""):
        Cycles(LayerGraph((), (), (), (), 0), input_parallel=0, pixel_parallel=-1)
