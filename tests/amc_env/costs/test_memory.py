"""Activations by hand, and against the networks that are really cut."""

from dataclasses import replace

import pytest
import torch
from networks import NETWORKS, SMALL, Chain, images, problem, random_removed, with_state
from refusals import refused
from torch import Tensor, fx, nn

from amc_env.costs.memory import Activations, Memory
from amc_env.graph.topology import Topology
from amc_env.graph.tracing import trace
from amc_env.pruning.granularity import Channel
from amc_env.space import Grid
from amc_env.testing import check_cost


def activations(
    model: nn.Module, example: Tensor, like: nn.Module | None = None
) -> tuple[Activations, tuple[Grid, ...]]:
    """Those of a network whose channels go one by one, and its decisions: its own, or those of one ``like`` it."""
    graph = trace((like or model).eval(), example)
    graph, grids = Channel(multiple=1, max_ratio=0.9).decisions(graph)
    graph = replace(graph, topology=Topology.of(model.eval()))
    return Activations(model, graph, grids, example), grids


class Residual(nn.Module):
    """A stream of 4 channels, and a branch with 6 inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.back = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head((x + self.back(self.inner(x))).mean((2, 3)))


class InPlace(nn.Module):
    """A weight outside of modules, in-place operations, and views."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Buffer(torch.ones(3, 2, 2))
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Dropout(), nn.Flatten())
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.offset
        x.add_(1)
        return self.head(self.layers(x))


class Gram(Residual):
    """An operation that gives the square of the channels."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.first(x).flatten(2)
        return super().forward(x) + torch.matmul(flat, flat.transpose(1, 2)).sum()


class Writing(Residual):
    """What writes into its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2))


class Branching(Residual):
    """What cannot be traced symbolically."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


def living(found: Activations, removed: list[int]) -> dict[str, int]:
    """Bytes in use while each operation of the cut network runs."""
    buffers = found.buffers - found.buffers_per_unit @ removed
    return dict(zip(found.operations, (found.live @ buffers).tolist(), strict=True))


# ---------------------------------------------------------------------------------------------- by hand


def test_a_chain() -> None:
    found, _ = activations(Chain(), images(2, size=32))
    memory = Memory(found)
    plane = 32 * 32 * 4
    nothing, some = [0, 0, 0], [1, 2, 3]
    assert living(found, nothing) == {
        "x": 3 * plane,
        "convs_0": (3 + 16) * plane,
        "convs_1": (16 + 32) * plane,
        "convs_2": (32 + 64) * plane,
        "convs_3": (64 + 10) * plane,
        "mean": 10 * plane + 40,
        "output": 40,
    }
    assert (memory(nothing), memory(some)) == (96 * plane, (30 + 61) * plane)
    assert found.elements(nothing) == (16 + 32 + 64 + 10) * 1024 + 10
    assert found.elements(some) == (15 + 30 + 61 + 10) * 1024 + 10
    assert found.elements(some, inside={"convs_0", "convs_2"}) == (30 + 10) * 1024 + 10
    assert (memory.name, memory.unit) == ("memory", "bytes")


def test_a_shortcut_lives_until_it_is_added() -> None:
    found, grids = activations(Residual(), images(size=2))
    memory = Memory(found)
    assert [grid.total for grid in grids] == [4, 6]
    live = living(found, [0, 0])
    want = {"first": 3 + 4, "inner": 4 + 6, "back": 4 + 6 + 4, "add": 4 + 4 + 4}
    assert {name: live[name] for name in want} == {name: 16 * count for name, count in want.items()}
    assert (live["mean"], live["head"]) == (16 * 4 + 4 * 4, 4 * 4 + 4 * 5)
    assert (memory([0, 0]), memory([1, 3])) == (16 * 14, 16 * (3 + 3 + 3))
    assert (
        found.elements([1, 3], inside=("first", "inner", "back", "head")) == 3 * 4 + 3
    )  # the sum and the mean


def test_a_concatenation_lives_with_its_parts() -> None:
    candidates, grids = problem("concat", multiple=1)
    found = Activations(candidates.original, candidates.graph, grids, images())
    memory = Memory(found)
    parts = {"left": 3 + 8, "right": 3 + 8 + 6, "cat": 8 + 6 + 14, "norm": 14 + 14}
    live = living(found, [0] * len(grids))
    assert {name: live[name] for name in parts} == {name: 256 * count for name, count in parts.items()}
    assert memory([int(grid.name == "left") for grid in grids]) == 256 * (7 + 6 + 13)


def test_what_shares_storage_counts_once_and_weights_do_not() -> None:
    found, _ = activations(InPlace(), images(size=2))
    assert living(found, [1]) == {
        "x": 48,
        "offset": 48,
        "add": 48 + 48,
        "add_": 48,
        "layers_0": 48 + 3 * 16,
        "layers_1": 48,
        "layers_2": 48,
        "layers_3": 48,
        "head": 48 + 20,
        "output": 20,
    }
    written = 12 + 12 + 12 + 12 + 5  # both sums, convolution, ReLU, linear layer; views give none
    assert found.elements([1]) == written
    assert found.elements([1], inside=["layers_2", "layers_3"]) == written


def test_nothing_of_the_callers_is_changed() -> None:
    model, example = Writing(), images(size=2)
    before = with_state(model)
    activations(model, example, like=Residual())
    assert torch.equal(example, images(size=2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---------------------------------------------------------------------------------------------- the cut networks


class Counting(fx.Interpreter):
    """Runs a network, forgets values behind their last reader, and looks at what is there."""

    def __init__(self, model: nn.Module):
        super().__init__(model, garbage_collect_values=True, graph=Topology.of(model).graph)
        self.peak = self.elements = 0

    def run_node(self, n: fx.Node) -> Tensor:
        before = {value.untyped_storage().data_ptr() for value in self.env.values()}
        result: Tensor = super().run_node(n)
        storages = [value.untyped_storage() for value in (*self.env.values(), result)]
        self.peak = max(
            self.peak, sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        )
        if n.op.startswith("call_") and result.untyped_storage().data_ptr() not in before:
            self.elements += result.numel()
        return result


@pytest.mark.parametrize("name", NETWORKS)
def test_they_are_those_of_the_cut_network(name: str) -> None:
    candidates, grids = problem(name)
    found = Activations(candidates.original, candidates.graph, grids, images())
    memory = Memory(found)
    most = [grid.count(grid.size - 1) for grid in grids]
    for removed in (random_removed(grids, 0), random_removed(grids, 1), most, [0] * len(grids)):
        cut = Counting(candidates.cut(removed))
        with torch.no_grad():
            cut.run(images(1))
        assert (memory(removed), found.elements(removed)) == (cut.peak, cut.elements)


@pytest.mark.parametrize("name", SMALL)
def test_memory_keeps_the_contract_of_costs(name: str) -> None:
    candidates, grids = problem(name, multiple=1)
    check_cost(Memory(Activations(candidates.original, candidates.graph, grids, images())), grids)


# ---------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_traced_is_refused_with_the_way_out() -> None:
    with refused("unsupported", "budget"):
        activations(Branching(), images())


def test_an_operation_that_is_not_linear_is_named() -> None:
    with refused("unsupported", "budget"):
        activations(Gram(), images(), like=Residual())
