"""Units: what belongs to a layer, and modules that stand for it."""

import dataclasses

import pytest
import torch
from networks import NETWORKS, traced
from torch import Tensor, nn
from torch.nn import functional as F

from amc_env.costs.latency.units import Unit, inside_units, units_of
from amc_env.errors import UserError
from amc_env.graph.tracing import trace_layers

CONV = Unit("conv", (3, 3), (1, 1), (1, 1), (1, 1), 1, False, (8, 8), True, "relu")


class Branches(nn.Module):
    """One activation in place, one that others read too, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.relu = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.second = nn.Conv2d(8, 8, 3, padding="same", dilation=2)
        self.twice = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.relu(self.norm(self.first(x))))
        x = F.relu(x) + torch.sigmoid(x)
        return self.head(self.twice(F.relu(self.twice(x))).mean((2, 3)))


class Hidden(Branches):
    """Cannot be traced symbolically."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


def test_a_residual_block_has_its_last_activation_behind_the_addition() -> None:
    units = units_of(*traced("residual"))
    assert units["conv1"] == CONV
    assert units["layer1.0.conv1"] == CONV  # in another place with other channels, yet the same unit
    assert units["layer1.0.conv2"] == dataclasses.replace(CONV, activation="")
    assert units["layer2.0.shortcut.0"].kernel == (1, 1)
    assert units["linear"] == Unit("linear", (1, 1), (1, 1), (0, 0), (1, 1), 1, True, (1, 1))
    assert {layer.name for layer in traced("residual")[1].layers} == set(units)


def test_what_belongs_to_a_unit_reads_nothing_else_and_is_read_by_all_that_follows() -> None:
    model = Branches().eval()
    units = units_of(model, trace_layers(model, torch.zeros(1, 3, 8, 8)))
    assert (units["first"].norm, units["first"].activation) == (True, "relu_")
    assert (units["second"].activation, units["second"].padding, units["second"].dilation) == (
        "",
        "same",
        (2, 2),
    )
    assert (units["twice"].norm, units["twice"].activation) == (False, "")


def test_operations_inside_of_units_go_by_the_names_of_the_trace() -> None:
    model = Branches().eval()
    graph = trace_layers(model, torch.zeros(1, 3, 8, 8))
    assert inside_units(model, graph) == {"first", "norm", "relu", "second", "twice", "twice_1", "head"}


def test_without_a_trace_layers_stand_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = Hidden().eval()
    units = units_of(model, trace_layers(model, torch.ones(1, 3, 8, 8)))
    assert not any(unit.norm or unit.activation for unit in units.values())
    assert caplog.text.count("layers are timed without what follows them") == 1


@pytest.mark.parametrize("name", NETWORKS)
def test_built_units_take_and_give_what_the_layers_do(name: str) -> None:
    model, graph = traced(name)
    state = torch.random.get_rng_state()
    for layer, unit in zip(graph.layers, units_of(model, graph).values(), strict=True):
        module = unit.build(layer.in_channels, layer.out_channels)
        example = unit.example(2, layer.in_channels)
        given = module(example)
        assert not module.training
        assert given.isfinite().all()
        assert given.shape[0] == 2
        if layer.kind == "conv":
            assert given.shape[1:] == (layer.out_channels, *layer.out_size)
        else:
            assert given[0].numel() == layer.out_channels * layer.positions
        assert 1 + unit.norm + bool(unit.activation) == len(module)
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_linear_layer_at_several_positions() -> None:
    unit = Unit("linear", (1, 1), (1, 1), (0, 0), (1, 1), 1, False, (5, 1))
    assert unit.build(6, 4)(unit.example(2, 6)).shape == (2, 5, 4)


@pytest.mark.parametrize("name", NETWORKS)
def test_units_survive_json(name: str) -> None:
    for unit in units_of(*traced(name)).values():
        assert Unit.from_json(unit.to_json()) == unit


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "pool"}, "kind='pool'"),
        ({"activation": "swishy"}, "activation='swishy'; allowed are conv, linear and relu"),
        ({"kernel": [3]}, "no unit of a latency table"),
        ({"colour": 1}, "no unit of a latency table"),
    ],
)
def test_what_is_no_unit_is_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Unit.from_json(CONV.to_json() | change)
