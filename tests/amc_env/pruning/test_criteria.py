"""Norms by hand, and ranking."""

import pytest
import torch
from networks import SMALL, images, network, traced
from torch import nn

from amc_env.layers import LayerGraph
from amc_env.pruning.criteria import Norm, rank


def scores(model: nn.Module, criterion: Norm) -> torch.Tensor:
    return criterion.scores(model, LayerGraph.trace(model.eval(), images(1)))[0]


@pytest.fixture
def chain() -> nn.Module:
    """3 -> 3 -> 1 channels; the first layer's filters have weights 1, 2, 3, the second reads with 3, 2, 2."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 1, 2, bias=False))
    model[0].weight.data = torch.tensor([1.0, -2.0, 3.0]).view(3, 1, 1, 1).repeat(1, 3, 1, 1)
    model[1].weight.data = torch.tensor([-3.0, 2.0, 2.0]).view(1, 3, 1, 1).repeat(1, 1, 2, 2)
    return model


@pytest.mark.parametrize(
    ("p", "members", "expected"),
    [
        (1, "producers", [3, 6, 9]),
        (1, "consumers", [12, 8, 8]),
        (2, "producers", [3**0.5, 12**0.5, 27**0.5]),
        (2, "consumers", [6, 4, 4]),
    ],
)
def test_norms_by_hand(chain: nn.Module, p: int, members: str, expected: list[float]) -> None:
    found = scores(chain, Norm(p, members))  # type: ignore[arg-type]
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found / found.sum(), wanted / wanted.sum())


def test_members_count_alike_whatever_their_size(chain: nn.Module) -> None:
    both = scores(chain, Norm(1, "all"))
    alone = scores(chain, Norm(1, "producers")), scores(chain, Norm(1, "consumers"))
    torch.testing.assert_close(both, (alone[0] + alone[1]) / 2)
    chain[1].weight.data *= 1000
    torch.testing.assert_close(both, scores(chain, Norm(1, "all")))


def test_grouped_consumer_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, groups=2, bias=False), nn.Conv2d(4, 1, 1))
    rows = [[1.0, 1.0], [0.0, 1.0], [4.0, 10.0], [-6.0, 10.0]]
    model[1].weight.data = torch.tensor(rows).view(4, 2, 1, 1)
    found = scores(model, Norm(1, "consumers"))  # units: channels (0, 2) and (1, 3)
    torch.testing.assert_close(found / found.sum(), torch.tensor([11.0, 22.0], dtype=torch.float64) / 33)


@pytest.mark.parametrize("members", ["consumers", "producers", "all"])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("name", SMALL)
def test_every_unit_has_a_finite_score(name: str, p: int, members: str) -> None:
    model, graph = traced(name)
    found = Norm(p, members).scores(model, graph)  # type: ignore[arg-type]
    assert [len(score) for score in found] == [group.total for group in graph.groups]
    assert all(bool(score.isfinite().all()) and bool((score > 0).all()) for score in found)


def test_free_layers_have_no_say() -> None:
    model, graph = traced("selection")
    before = Norm(2, "all").scores(model, graph)
    other = network("selection")
    other.get_submodule("layer2.0.shortcut").weight.mul_(1e6)
    assert all(torch.equal(a, b) for a, b in zip(before, Norm(2, "all").scores(other, graph), strict=True))


def test_rank_is_stable() -> None:
    assert rank([torch.tensor([1.0, 3.0, 1.0, 3.0, 2.0])])[0].tolist() == [1, 3, 4, 0, 2]
