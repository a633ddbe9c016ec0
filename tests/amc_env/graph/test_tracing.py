"""The layer graph: what goes together, what stays whole and why."""

import numpy as np
import pytest
import torch
from networks import NETWORKS, SMALL, images, network, problem, random_removed, same_state, settled, traced
from refusals import refused
from torch import Tensor, nn
from torch.nn import functional as F

from amc_env.costs.counts import Params
from amc_env.graph.layers import Skipped
from amc_env.graph.surgery import resize, silence_inputs
from amc_env.graph.tracing import trace, trace_layers
from amc_env.pruning.candidate import Candidates
from amc_env.pruning.granularity import Channel, FineGrained
from search.models.resnet import ResNet

# Names of a network's groups with their units, in the order of decisions.
GROUPS = {
    "concat": {"left": 8, "right": 6, "join": 10},
    "grouped": {"before": 4, "grouped": 6, "halves": 6, "after": 8},
    "flatten": {"conv": 6, "conv2": 8, "hidden": 12},
    "mlp": {"1": 20, "3": 16},
    "gated": {
        "first.0": 8,
        "blocks.0.conv.0.0": 16,
        "blocks.1.conv.0.0": 16,
        "blocks.1.conv.2": 12,
        "squeeze": 6,
        "last": 10,
    },
    "pad": {"layer1.0.conv1": 16, "layer2.0.conv1": 32, "layer3.0.conv1": 64},
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_and_their_units(name: str) -> None:
    _, graph = traced(name)
    assert {group.name: group.total for group in graph.groups} == GROUPS[name]


@pytest.mark.parametrize(("shortcut", "groups"), [("pad", 9), ("selection", 12), ("conv", 12), ("none", 19)])
def test_resnet20_groups(shortcut: str, groups: int) -> None:
    graph = trace(ResNet(20, shortcut).eval(), images(2))
    assert len(graph.groups) == groups
    skipped = {w.name: w.reason for w in graph.skipped}
    assert skipped.pop("linear") == "its channels are the network's output"
    streams = {layer.name for layer in graph.layers if layer.name == "conv1" or layer.name.endswith("conv2")}
    assert set(skipped) == (streams if shortcut == "pad" else set())
    assert all("padded" in reason and "model.shortcut=selection" in reason for reason in skipped.values())


def test_selection_shortcut_couples_the_streams() -> None:
    _, graph = traced("selection")
    stream = graph.groups[0]
    assert stream.producers == ("conv1", "layer1.0.conv2")
    assert stream.consumers == ("layer1.0.conv1", "layer2.0.conv1", "layer2.0.shortcut")
    assert graph.layer("layer2.0.shortcut").costless
    assert not graph.layer("conv1").costless


@pytest.mark.parametrize("name", SMALL)
def test_decisions_stand_in_the_forward_order_of_their_consumers(name: str) -> None:
    _, graph = traced(name)
    firsts = [graph.layer(group.consumers[0]).index for group in graph.groups]
    assert firsts == sorted(firsts)
    assert [layer.index for layer in graph.layers] == list(range(len(graph.layers)))


def test_layer_says_what_the_module_is() -> None:
    _, graph = traced("grouped")
    layer = graph.layer("halves")
    assert (layer.kind, layer.in_channels, layer.out_channels, layer.groups) == ("conv", 24, 12, 2)
    assert (layer.kernel, layer.stride, layer.in_size, layer.out_size) == ((3, 3), (2, 2), (8, 8), (4, 4))
    assert layer.bias
    assert layer.positions == 16
    assert not layer.depthwise
    _, graph = traced("depthwise")
    assert graph.layer("features.0.0").depthwise


def test_units_of_a_grouped_convolution_take_one_channel_of_every_group() -> None:
    _, graph = traced("grouped")
    group = graph.groups[0]
    assert (group.total, group.channels) == (4, 16)
    consumed = next(member for member in group.members if member.module == "grouped")
    assert consumed.positions[1].tolist() == [1, 5, 9, 13]


def test_units_before_a_flattening_take_whole_maps() -> None:
    _, graph = traced("flatten")
    consumed = next(member for member in graph.groups[1].members if member.module == "hidden")
    assert consumed.size == 128
    assert consumed.positions[2].tolist() == list(range(32, 48))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NETWORKS)
def test_cut_network_computes_what_the_masked_one_does(name: str, seed: int) -> None:
    candidates, grids = problem(name)
    removed = random_removed(grids, seed)
    masked = network(name)
    modules = dict(masked.named_modules())
    for group, order, count in zip(candidates.graph.groups, candidates.orders, removed, strict=True):
        for member in group.members:
            if member.module in group.consumers and member.side == "in":
                gone = order[len(order) - count :]
                silence_inputs(modules[member.module], member.positions[gone].flatten())
    small = candidates.cut(removed)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in masked.parameters())
    with torch.no_grad():
        torch.testing.assert_close(small(images()), masked(images()), rtol=1e-4, atol=1e-5)


class Normed(nn.Module):
    """A prunable start, then channels that pass through ``norm``."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 1)
        self.norm = norm
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.middle(F.relu(self.first(x))))).mean((2, 3))


class Scaled(nn.Module):
    """A parameter of its own for every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (
            nn.GroupNorm(1, 8),
            "its channels are normalised together by norm: granularity.residual=true cuts them",
        ),
        (
            nn.LayerNorm([8, 8, 8]),
            "its channels are normalised together by norm: granularity.residual=true cuts them",
        ),
    ],
)
def test_what_cannot_be_pruned_is_left_whole_with_its_reason(norm: nn.Module, reason: str) -> None:
    graph = trace(Normed(norm).eval(), images(1))
    assert graph.groups[0].name == "first"
    reasons = {w.name: w.reason for w in graph.skipped}
    assert reasons["last"] == "its channels are the network's output"
    assert reasons["middle"] == reason


@pytest.mark.parametrize(
    ("norm", "params"),
    [
        (nn.GroupNorm(2, 8), 8),
        (nn.InstanceNorm2d(8, affine=True), 8),
        (Scaled(), 4),
    ],
)
def test_channels_are_cut_through_norms_of_their_own_and_free_parameters(
    norm: nn.Module, params: int
) -> None:
    model = Normed(norm).eval()
    graph = trace(model, images(1))
    group = next(group for group in graph.groups if group.name == "middle")
    assert group.total == (2 if isinstance(norm, nn.GroupNorm) else 8)  # a GroupNorm loses whole groups
    small = Candidates(model, graph, [torch.arange(g.total) for g in graph.groups]).build(
        [0, group.total // 2]
    )
    assert sum(p.numel() for p in small.norm.parameters()) == params
    removed = [0, group.total // 2]
    assert Params(graph)(removed) == sum(p.numel() for p in small.parameters())
    assert small(images(2)).shape == (2, 4)


def test_depthwise_multiplier_loses_the_same_filters_of_every_channel() -> None:
    model = Normed(nn.Conv2d(8, 16, 1, groups=8))
    model.last = nn.Conv2d(16, 4, 1)
    graph = trace(model.eval(), images(1))
    assert {group.name: (group.total, group.channels) for group in graph.groups} == {
        "first": (8, 8),
        "norm": (2, 16),
    }
    graph, grids = Channel(multiple=1, max_ratio=0.9).decisions(graph)
    assert [grid.name for grid in grids] == ["first", "norm"]
    assert "middle" in {w.name for w in graph.skipped}


class SharedAndDepthwiseFirst(nn.Module):
    """A depthwise convolution on the image itself, and a convolution that is run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 3, 3, groups=3, padding=1)
        self.first = nn.Conv2d(3, 8, 1)
        self.twice = nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(self.image(x)))
        return self.last(F.relu(self.twice(F.relu(self.twice(x))))).mean((2, 3))


def test_inputs_of_the_network_and_shared_layers() -> None:
    graph = trace(SharedAndDepthwiseFirst().eval(), images(1))
    assert Skipped("image", "its channels are the network's input") in graph.skipped
    assert [group.producers for group in graph.groups] == [("first", "twice")]
    assert graph.layer("twice").calls == 2
    assert graph.layer("twice").positions == 128  # every call is paid for


def test_every_layer_is_in_a_group_or_whole_once() -> None:
    for name in NETWORKS:
        _, graph = traced(name)
        cut = {m.module for g in graph.groups for m in g.members if m.side == "out"}
        skipped = [w.name for w in graph.skipped]
        assert len(skipped) == len(set(skipped))
        assert {layer.name for layer in graph.layers} == (cut & {x.name for x in graph.layers}) | set(skipped)
        assert not cut & set(skipped)


def test_nothing_to_prune_is_refused_with_the_reasons() -> None:
    with refused("nothing_to_prune", ""):
        trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten()).eval(), images(1))


def test_a_network_that_does_not_run_is_refused() -> None:
    with refused("does_not_run", ""):
        trace(network("mlp"), images(1, size=4))


def test_tracing_leaves_the_network_and_the_random_state_alone() -> None:
    model = network("residual").requires_grad_(False).train()
    before = network("residual")
    state, arrays = torch.get_rng_state(), np.random.get_state()[1].copy()
    with torch.no_grad():
        graph = trace(model, images(2))
    assert same_state(model, before)
    assert model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert (arrays == np.random.get_state()[1]).all()
    assert len(graph.groups) == 6


def test_groups_left_out_are_reported_with_all_their_layers() -> None:
    _, graph = traced("residual")
    smaller = graph.only({"conv1": "for a test"})
    assert len(smaller.groups) == 5
    assert {w.name for w in smaller.skipped} >= {"conv1", "layer1.0.conv2"}
    assert {w.reason for w in smaller.skipped if w.name == "layer1.0.conv2"} == {"for a test"}


class PixelShuffled(nn.Module):
    """Channels become pixels: the tracer's coupling is not what the network computes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.mixed = nn.Conv2d(8, 16, 1)
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pixel_shuffle(self.mixed(F.relu(self.first(x))), 2)
        return self.last(x).mean((2, 3))


def test_coupling_is_proved_before_it_is_believed() -> None:
    graph = trace(settled(PixelShuffled()), images(1))
    assert [group.name for group in graph.groups] == ["first"]
    assert "mixed" in {w.name for w in graph.skipped}


def test_resize_gives_sizes_that_agree_with_the_tensors() -> None:
    model = resize(network("depthwise"), {})
    assert same_state(model, network("depthwise"))


class Tied(nn.Module):
    """Two layers that share one weight, beside one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one = nn.Conv2d(8, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 8, 3, padding=1)
        self.two.weight = self.one.weight
        self.free = nn.Linear(8, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.two(torch.relu(self.one(torch.relu(self.stem(x))))))
        return self.head(torch.relu(self.free(x.mean((2, 3)))))


@pytest.mark.parametrize("granularity", [Channel(1), FineGrained()])
def test_layers_that_share_a_parameter_are_left_as_they_are_and_counted_once(granularity) -> None:
    model = Tied()
    graph = (trace_layers if granularity.masked else trace)(model, images())
    graph, grids = granularity.decisions(graph)
    assert {"one", "two"} <= {skipped.name for skipped in graph.skipped}
    assert "free" in {grid.name for grid in grids}
    assert not {"one", "two"} & {grid.name for grid in grids}
    params = Params(graph, grids if granularity.masked else ())
    assert params([0] * len(grids)) == sum(parameter.numel() for parameter in model.parameters())
