"""Folding batch norms: equal outputs, or the reason why not."""

import pytest
import torch
from networks import NETWORKS, images, network, prepared, random_removed, same_state
from torch import Tensor, nn

from amc_env.pruning.folding import Folder


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_folded_outputs_are_the_unfolded_ones(name: str, channels_last: bool) -> None:
    candidates, grids = prepared(name)
    folder = Folder(candidates.original, images(2), channels_last=channels_last)
    assert folder.reason == ""
    for seed in range(3):
        small = candidates.cut(random_removed(grids, seed))
        state = {key: value.clone() for key, value in small.state_dict().items()}
        with torch.no_grad():
            torch.testing.assert_close(folder(small)(images()), small(images()), rtol=1e-4, atol=1e-5)
        assert all(torch.equal(state[key], value) for key, value in small.state_dict().items())


def test_no_batch_norm_is_left_behind_a_layer() -> None:
    model = network("residual")
    folded = Folder(model, images(1), channels_last=False)(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
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
    folder = Folder(model, images(1), channels_last=True)
    assert "torch.fx cannot trace it" in folder.reason
    assert folder(model) is model


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
    folder = Folder(model.eval(), images(2), channels_last=False)
    assert folder.reason == "its outputs change when batch norms are folded"
    assert folder(model) is model


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_bias_and_affine_by_hand(bias: bool, affine: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1, bias=bias), nn.BatchNorm2d(2, affine=affine)).eval()
    model[1].running_mean = torch.tensor([1.0, -2.0])
    model[1].running_var = torch.tensor([4.0, 0.25])
    folded = Folder(model, images(1), channels_last=False)(model)
    scale = (model[1].running_var + model[1].eps).rsqrt()
    torch.testing.assert_close(folded.get_submodule("0").weight, model[0].weight * scale.view(2, 1, 1, 1))
    with torch.no_grad():
        torch.testing.assert_close(folded(images()), model(images()))
