"""Folding batch norms: equal outputs, or the reason why not."""

import pytest
import torch
from networks import NETWORKS, images, network, problem, random_removed, same_state, settled
from torch import Tensor, nn
from torch.nn import functional

from amc_env.evaluation.folding import Folder
from amc_env.graph.topology import Topology


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_folded_outputs_are_the_unfolded_ones(name: str, channels_last: bool) -> None:
    candidates, grids = problem(name)
    folder = Folder(
        candidates.original, Topology.of(candidates.original), images(2), channels_last=channels_last
    )
    assert folder.reason == ""
    for seed in range(3):
        small = candidates.cut(random_removed(grids, seed))
        state = {key: value.clone() for key, value in small.state_dict().items()}
        with torch.no_grad():
            torch.testing.assert_close(folder(small)(images()), small(images()), rtol=1e-4, atol=1e-5)
        assert all(torch.equal(state[key], value) for key, value in small.state_dict().items())


def test_no_batch_norm_is_left_behind_a_layer() -> None:
    model = network("residual")
    folded = Folder(model, Topology.of(model), images(1), channels_last=False)(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert same_state(model, network("residual"))


class Activations(nn.Module):
    """Two activations that may overwrite what is before them, and two that may not: it is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU()
        self.second = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.relu(x)  # of the images themselves
        y = self.norm(self.conv(first - x))
        z = self.second(functional.relu(y))  # y is added below
        return self.relu(functional.relu6(self.conv(x)) + self.relu(z + y)).mean((2, 3))


def test_activations_overwrite_only_what_nothing_else_reads() -> None:
    model = settled(Activations())
    x = images()
    folder = Folder(model, Topology.of(model), images(2), channels_last=False)
    assert folder.reason == ""
    folded = folder(model)
    nodes = [node for node in folded.graph.nodes if node.kwargs.get("inplace")]
    assert [node.target for node in nodes] == [functional.relu6, functional.relu, functional.relu]
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x))
    assert torch.equal(x, images())


def test_weights_become_bfloat16_after_folding_and_the_network_itself_stays() -> None:
    model = network("residual")
    folder = Folder(model, Topology.of(model), images(2), channels_last=True, dtype=torch.bfloat16)
    folded = folder(model)
    assert {parameter.dtype for parameter in folded.parameters()} == {torch.bfloat16}
    exact = Folder(model, Topology.of(model), images(2), channels_last=True)(model)
    for name, parameter in exact.named_parameters():
        assert torch.equal(folded.get_parameter(name), parameter.bfloat16())
    assert same_state(model, network("residual"))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return (x if x.sum() > 0 else 2 * x).mean((2, 3))


def test_an_untraceable_network_is_scored_as_it_is() -> None:
    model = Branching().eval()
    folder = Folder(model, Topology.of(model), images(1), channels_last=True)
    assert "torch.fx cannot trace it" in folder.reason
    assert folder(model) is model
    coarse = Folder(model, Topology.of(model), images(1), channels_last=True, dtype=torch.bfloat16)(model)
    assert coarse.conv.weight.dtype == torch.bfloat16
    assert model.conv.weight.dtype == torch.float32


class Tokens(nn.Module):
    """The batch norm works on another dimension than the layer's outputs, of the same size."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.last = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.linear(x.mean(1)))).mean(1)


def test_a_fold_that_changes_outputs_is_not_believed() -> None:
    model = Tokens()
    model.norm.running_mean = torch.arange(8.0)
    model.norm.running_var = torch.arange(1.0, 9.0)
    folder = Folder(model.eval(), Topology.of(model.eval()), images(2), channels_last=False)
    assert folder.reason == "its outputs change when batch norms are folded"
    assert folder(model) is model


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_bias_and_affine_by_hand(bias: bool, affine: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1, bias=bias), nn.BatchNorm2d(2, affine=affine)).eval()
    model[1].running_mean = torch.tensor([1.0, -2.0])
    model[1].running_var = torch.tensor([4.0, 0.25])
    folded = Folder(model, Topology.of(model), images(1), channels_last=False)(model)
    scale = (model[1].running_var + model[1].eps).rsqrt()
    torch.testing.assert_close(folded.get_submodule("0").weight, model[0].weight * scale.view(2, 1, 1, 1))
    with torch.no_grad():
        torch.testing.assert_close(folded(images()), model(images()))
