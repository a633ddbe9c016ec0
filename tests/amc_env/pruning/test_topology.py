"""Batch norms behind layers, shortcuts, and running a network layer by layer."""

import pytest
import torch
from networks import NETWORKS, images, network
from torch import Tensor, nn

from amc_env.pruning.topology import Run, Topology


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


@pytest.mark.parametrize("name", NETWORKS)
def test_running_layer_by_layer_is_running(name: str) -> None:
    model = network(name)
    topology = Topology.of(model)
    ran: list[str] = []

    def visit(
        layer: str, module: nn.Module, xs: list[Tensor], shortcuts: list[Tensor] | None
    ) -> list[Tensor]:
        ran.append(layer)
        assert (shortcuts is not None) == (layer in topology.partner)
        return [module(x) for x in xs]

    batches = list(images().split(3))
    with torch.no_grad():
        outputs = Run(model, topology)(batches, visit)
        wanted = [model(batch) for batch in batches]
    assert all(torch.equal(got, want) for got, want in zip(outputs, wanted, strict=True))
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert sorted(ran) == sorted(layers)


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
