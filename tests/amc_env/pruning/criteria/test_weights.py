"""Criteria of weights, by hand."""

import pytest
import torch
from networks import images, network, traced
from refusals import refused
from torch import Tensor, nn

from amc_env.graph.tracing import trace
from amc_env.pruning.criteria import FPGM, BatchNormScale, Criterion, Norm, Random, Sample

NOTHING = Sample(torch.empty(0, 3, 8, 8), torch.empty(0, dtype=torch.int64))


def scores(model: nn.Module, criterion: Criterion) -> Tensor:
    return criterion.channel_scores(model, trace(model.eval(), images(1)), NOTHING)[0]


def same_up_to_scale(found: Tensor, wanted: list[float]) -> bool:
    expected = torch.tensor(wanted, dtype=torch.float64)
    return torch.allclose(found / found.sum(), expected / expected.sum(), rtol=1e-7, atol=1e-7)


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
    assert same_up_to_scale(scores(chain, Norm(p, members)), expected)  # type: ignore[arg-type]
    raw = scores(chain, Norm(p, members, "sum"))  # type: ignore[arg-type]
    torch.testing.assert_close(raw, torch.tensor(expected, dtype=torch.float64))


def test_members_count_alike_whatever_their_size(chain: nn.Module) -> None:
    both = scores(chain, Norm(1, "all"))
    alone = scores(chain, Norm(1, "producers")), scores(chain, Norm(1, "consumers"))
    torch.testing.assert_close(both, (alone[0] + alone[1]) / 2)
    torch.testing.assert_close(scores(chain, Norm(1, "all", "max")), torch.maximum(*alone))
    chain[1].weight.data *= 1000
    torch.testing.assert_close(both, scores(chain, Norm(1, "all")))


def test_grouped_consumer_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, groups=2, bias=False), nn.Conv2d(4, 1, 1))
    rows = [[1.0, 1.0], [0.0, 1.0], [4.0, 10.0], [-6.0, 10.0]]
    model[1].weight.data = torch.tensor(rows).view(4, 2, 1, 1)
    # Units: channels (0, 2) and (1, 3).
    assert same_up_to_scale(scores(model, Norm(1, "consumers")), [11, 22])


def test_free_layers_have_no_say() -> None:
    model, graph = traced("selection")
    before = Norm(2, "all").channel_scores(model, graph)
    other = network("selection")
    other.get_submodule("layer2.0.shortcut").weight.mul_(1e6)
    after = Norm(2, "all").channel_scores(other, graph)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_magnitudes_of_single_weights(chain: nn.Module) -> None:
    graph = trace(chain.eval(), images(1))
    for p in (1, 2):
        found = Norm(p).saliency(chain, graph.layers)  # type: ignore[arg-type]
        assert list(found) == ["0", "1"]
        assert torch.equal(found["0"], chain[0].weight.detach().double().abs() ** p)
    assert Norm(1).name == "l1"
    assert Norm(2).name == "l2"


def test_batch_norm_scales_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))
    model[1].weight.data = torch.tensor([-3.0, 1.0, 2.0])
    assert same_up_to_scale(scores(model, BatchNormScale()), [3, 1, 2])
    # A batch norm each for a convolution and the depthwise one that rides along.
    depthwise = nn.Conv2d(3, 3, 3, groups=3), nn.BatchNorm2d(3)
    model = nn.Sequential(*model[:2], *depthwise, model[2])
    model[3].weight.data = torch.tensor([30.0, 60.0, -90.0])
    torch.testing.assert_close(
        scores(model, BatchNormScale()), torch.tensor([2.0, 1.5, 2.5], dtype=torch.float64) / 2
    )


def test_flattened_channels_sum_their_scales() -> None:
    model, graph = traced("flatten")
    group = next(g for g in graph.groups if g.name == "conv2")
    member = next(m for m in group.members if m.module == "norm")
    assert member.positions.shape == (8, 16)
    graph = graph.only({g.name: "left out" for g in graph.groups if g.name not in ("conv2", "hidden")})
    found = BatchNormScale("sum").channel_scores(model, graph, NOTHING)
    scale = model.norm.weight.detach().double().abs().view(8, 16).sum(1)  # type: ignore[union-attr, operator]
    torch.testing.assert_close(found[[g.name for g in graph.groups].index("conv2")], scale)


@pytest.mark.parametrize("affine", [True, False])
def test_groups_without_a_scale_are_refused_by_name(affine: bool) -> None:
    first = [nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)] if not affine else [nn.Conv2d(3, 4, 1)]
    model = nn.Sequential(*first, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    with refused("unsupported", "criterion"):
        scores(model, BatchNormScale())


def test_distances_to_the_other_filters_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 1, 1))
    model[0].weight.data = torch.tensor([[0.0, 0, 0], [3, 4, 0], [0, 0, 12]]).view(3, 3, 1, 1)
    torch.testing.assert_close(
        scores(model, FPGM("sum")), torch.tensor([17.0, 18.0, 25.0], dtype=torch.float64)
    )
    assert same_up_to_scale(scores(model, FPGM()), [17, 18, 25])


def test_equal_filters_are_at_no_distance() -> None:
    model = nn.Sequential(nn.Conv2d(3, 40, 3, bias=False), nn.Conv2d(40, 1, 1))
    model[0].weight.data[:] = model[0].weight.data[0]
    assert torch.equal(scores(model, FPGM()), torch.zeros(40, dtype=torch.float64))


def test_chance_is_a_function_of_seed_and_name() -> None:
    model, graph = traced("residual")
    first, again, other = (
        Random().channel_scores(model, graph, Sample(NOTHING.inputs, NOTHING.targets, seed))
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    twins = [score for group, score in zip(graph.groups, first, strict=True) if group.total == 16]
    assert len(twins) > 1
    assert not torch.equal(twins[0], twins[1])
    elements = Random().saliency(model, graph.layers, NOTHING)
    assert all(bool(((value >= 0) & (value < 1)).all()) for value in elements.values())
    assert {name: value.shape for name, value in elements.items()} == {
        layer.name: model.get_submodule(layer.name).weight.shape for layer in graph.layers
    }


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Norm(3), "p"),  # type: ignore[arg-type]
        (lambda: Norm(1, "both"), "members"),  # type: ignore[arg-type]
        (lambda: BatchNormScale("median"), "aggregate"),  # type: ignore[arg-type]
        (lambda: FPGM("median"), "aggregate"),  # type: ignore[arg-type]
    ],
)
def test_wrong_settings_are_refused(make, field: str) -> None:
    with refused("out_of_range", field):
        make()
