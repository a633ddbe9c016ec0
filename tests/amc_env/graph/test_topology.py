"""Batch norms behind layers, shortcuts, and running a network layer by layer."""

import weakref

import pytest
import torch
from networks import NETWORKS, images, network
from torch import Tensor, fx, nn

from amc_env.graph.topology import Run, Topology, values_of
from amc_env.inputs import Inputs, call


def test_batch_norms_and_shortcuts_of_a_residual_network() -> None:
    topology = Topology.of(network("residual"))
    assert topology.norm_after["layer2.0.conv2"] == "layer2.0.bn2"
    assert topology.norm_after["layer2.0.shortcut.0"] == "layer2.0.shortcut.1"
    assert "linear" not in topology.norm_after
    partners = {name: str(node.target) for name, node in topology.partner.items()}
    assert set(partners) == {"layer1.0.conv2", "layer2.0.conv2", "layer3.0.conv2"}
    assert partners["layer2.0.conv2"] == "layer2.0.shortcut.1"


def test_a_norm_that_others_read_past_is_not_behind_the_layer() -> None:
    class Peeking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y) * y

    assert Topology.of(Peeking()).norm_after == {}


def test_concatenated_branches_have_no_single_norm() -> None:
    assert Topology.of(network("concat")).norm_after == {"join": "join_norm"}


def test_flattened_maps_have_no_norm_of_their_own() -> None:
    assert Topology.of(network("flatten")).norm_after == {"hidden": "hidden_norm"}


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_running_layer_by_layer_is_running(name: str, traced: bool) -> None:
    model = network(name)
    topology = Topology.of(model) if traced else Topology(None)
    ran: list[str] = []

    gave: dict[str, list[Tensor]] = {}

    def before(layer: str, module: nn.Module, xs: list[Tensor], shortcuts: list[Tensor] | None) -> None:
        ran.append(layer)
        assert (shortcuts is not None) == (layer in topology.partner)
        gave[layer] = [module.forward(x) for x in xs]  # a call would be reported again

    def after(layer: str, ys: list[Tensor]) -> None:
        assert all(torch.equal(got, want) for got, want in zip(ys, gave[layer], strict=True))

    batches = list(images().split(3 if traced else len(images())))
    with torch.no_grad():
        outputs = Run(model, topology)(batches, before, after)
        wanted = [model(batch) for batch in batches]
    assert all(torch.equal(got, want) for got, want in zip(outputs, wanted, strict=True))
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert sorted(ran) == sorted(layers)


@pytest.mark.parametrize("name", NETWORKS)
def test_folding_batch_norms_moves_outputs_by_rounding_only(name: str) -> None:
    model = network(name)
    inputs = images()

    def negate(layer: str, module: nn.Module, xs: list[Tensor], shortcuts: list[Tensor] | None) -> None:
        module.weight.data = -module.weight  # what is changed before a layer's turn counts

    with torch.no_grad():
        (found,) = Run(model, Topology.of(model))([inputs], negate)
        torch.testing.assert_close(found, model(inputs))


def test_a_batch_s_inputs_are_let_go_of_as_its_outputs_come() -> None:
    alive: list[int] = []

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            references.append(weakref.ref(x))
            alive.append(sum(reference() is not None for reference in references))
            return x * 1

    references: list[weakref.ref[Tensor]] = []
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Watched(), Watched())

    class Whole(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return True

    topology = Topology(Whole().trace(model))
    with torch.no_grad():
        Run(model, topology)(list(images().split(1)), lambda *_: None)
    # an input is gone before the next batch's is read
    assert max(alive) == 1


def test_a_layer_runs_after_the_shortcut_that_is_added_to_it() -> None:
    topology = Topology.of(network("residual"))
    order = [str(node.target) for node in topology.order()]
    assert order.index("layer2.0.shortcut.1") < order.index("layer2.0.conv2")


class Branching(nn.Module):
    """Looks at the data to decide: cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return self.last(x if x.sum() > 0 else 2 * x).mean((2, 3))


def test_what_cannot_be_traced_says_why() -> None:
    topology = Topology.of(Branching())
    assert topology.graph is None
    assert "torch.fx cannot trace it (TraceError: symbolically traced variables" in topology.reason
    assert topology.norm_after == topology.partner == {}


def test_a_trace_leaves_the_network_as_it_was_but_for_tensors_that_it_creates() -> None:
    class Creating(Branching):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.ones(1)

    branching, shifted = Creating(), Shifted()
    assert Topology.of(branching).graph is None
    assert branching.calls == 0
    graph = Topology.of(shifted).graph
    assert graph is not None
    values = list(values_of(shifted, graph, torch.zeros(1, 3)).values())
    assert torch.equal(values[-1], torch.ones(1, 3))


class Optional(nn.Module):
    """Takes two inputs and an option that it tests."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, a: Tensor, b: Tensor | None = None, *, double: bool = False) -> dict[str, Tensor]:
        y = self.left(a) if b is None else self.left(a) + self.right(b)
        return {"logits": 2 * y if double else y}


ALONE = torch.ones(5, 3)


@pytest.mark.parametrize(
    "inputs", [ALONE, (ALONE, torch.ones(5, 2)), {"b": torch.ones(5, 2), "a": ALONE}, {"a": ALONE}]
)
def test_inputs_go_where_they_belong_and_others_keep_their_defaults(inputs: Inputs) -> None:
    model = Optional()
    topology = Topology.of(model, inputs)
    assert topology.graph is not None, topology.reason
    wanted = call(model, inputs)["logits"]
    values = values_of(model, topology.graph, inputs)
    found = next(value for node, value in values.items() if node.op == "output")
    (ran,) = Run(model, topology)([inputs], lambda *_: None)
    for outputs in (found, ran, call(fx.GraphModule(model, topology.graph), inputs)):
        assert torch.equal(outputs["logits"], wanted)
