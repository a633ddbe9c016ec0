"""Loss terms by hand, their gradients, and what they cannot be taken of."""

import copy

import pytest
import torch
from networks import SMALL, images, network, traced
from refusals import refused
from torch import Tensor, nn

from amc_env.graph.layers import LayerGraph, keeps_of
from amc_env.graph.surgery import resize
from amc_env.graph.tracing import trace
from amc_env.pruning.regularization import L1, L2, BNScale, GroupLasso, NoRegularization, Regularization
from search.models.resnet import ResNet

ALL = (L1(0.1), L2(0.1), BNScale(0.1), GroupLasso(0.1))


def small() -> tuple[nn.Sequential, LayerGraph]:
    """Two hidden units: the first with weights 1, 2 and 2, the second with none but zeros."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    graph = trace(model, torch.ones(1, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
        model[0].bias.fill_(9.0)
        model[2].weight.copy_(torch.tensor([[-2.0, 0.0]]))
    return model, graph


def gradient(regularization: Regularization, model: nn.Module, graph: LayerGraph) -> list[Tensor | None]:
    """The term's gradient with respect to every parameter; None where it does not depend on it."""
    term = regularization.penalty(model, graph)
    assert term is not None
    parameters = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(term(model), parameters, allow_unused=True))


# ------------------------------------------------------------------------------------------------- known answers


def test_none_is_no_term_and_has_no_settings() -> None:
    model, graph = small()
    none = NoRegularization()
    assert none.penalty(model, graph) is None
    assert (none.weight, none.before_epochs, none.during) == (0.0, 0, False)
    with refused("unknown_key", "weight"):
        NoRegularization(weight=0.1)


def test_l1_and_l2_by_hand() -> None:
    model, graph = small()
    assert L1(0.5).penalty(model)(model).item() == pytest.approx(0.5 * 5)
    assert L2(0.5).penalty(model)(model).item() == pytest.approx(0.25 * 9)
    first, bias, second, _ = gradient(L1(0.5), model, graph)
    assert first.tolist() == [[0.5, 0.5], [0.0, 0.0]]
    assert second.tolist() == [[-0.5, 0.0]]
    assert bias is None
    first, bias, second, _ = gradient(L2(0.5), model, graph)
    assert torch.equal(first, 0.5 * model[0].weight)
    assert bias is None


def test_scales_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(2, affine=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([-2.0, 0.5]))
        model[1].bias.fill_(7.0)
    term = BNScale(0.1).penalty(model)
    assert term(model).item() == pytest.approx(0.25)
    term(model).backward()
    assert model[1].weight.grad.tolist() == pytest.approx([-0.1, 0.1])
    assert model[1].bias.grad is None
    assert model[0].weight.grad is None


def test_group_lasso_by_hand() -> None:
    model, graph = small()
    # Three weights of norm 3 in the first unit; the dead unit adds nothing.
    assert GroupLasso(0.1).penalty(model, graph)(model).item() == pytest.approx(0.1 * 3**0.5 * 3)
    first, bias, second, _ = gradient(GroupLasso(0.1), model, graph)
    pull = 0.1 * 3**0.5 / 3
    assert first.tolist() == [[pytest.approx(pull), pytest.approx(2 * pull)], [0.0, 0.0]]
    assert second.tolist() == [[pytest.approx(-2 * pull), 0.0]]
    assert bias is None


def unit_weights(module: nn.Module, side: str, position: int) -> Tensor:
    """The weights of one row or column, sliced by hand."""
    weight = module.weight
    if side == "out":
        return weight[position].flatten()
    groups = getattr(module, "groups", 1)
    rows, columns = weight.shape[0] // groups, weight.shape[1]
    block, local = divmod(position, columns)
    return weight[block * rows : (block + 1) * rows, local].flatten()


@pytest.mark.parametrize("name", [*SMALL, "depthwise"])
def test_group_lasso_unit_by_unit(name: str) -> None:
    model, graph = traced(name)
    expected = 0.0
    for group in graph.groups:
        for unit in range(group.total):
            parts = []
            for member in group.members:
                module = model.get_submodule(member.module)
                if isinstance(module, nn.Conv2d | nn.Linear) and "weight" in dict(module.named_parameters()):
                    parts += [unit_weights(module, member.side, p) for p in member.positions[unit].tolist()]
            weights = torch.cat(parts).detach().double()
            expected += len(weights) ** 0.5 * weights.norm().item()
    assert GroupLasso(0.3).penalty(model, graph)(model).item() == pytest.approx(0.3 * expected, rel=1e-5)


# --------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("regularization", ALL, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("name", ["residual", "concat", "grouped", "depthwise"])
def test_gradients_agree_with_differences(name: str, regularization: Regularization) -> None:
    model, (_, graph) = network(name).double(), traced(name)
    term = regularization.penalty(model, graph)
    parameters = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    directions = [
        torch.randn(p.shape, generator=generator, dtype=torch.float64) * p.detach().abs() for p in parameters
    ]
    slopes = torch.autograd.grad(term(model), parameters, allow_unused=True)
    slope = sum(float((g * d).sum()) for g, d in zip(slopes, directions, strict=True) if g is not None)
    values = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += step * direction
            values.append(float(term(model)))
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("regularization", ALL, ids=lambda r: type(r).__name__)
def test_a_network_of_zeros_has_a_gradient_of_zeros(regularization: Regularization) -> None:
    model, (_, graph) = network("residual"), traced("residual")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert regularization.penalty(model, graph)(model).item() == 0
    found = [g for g in gradient(regularization, model, graph) if g is not None]
    assert found
    assert all(bool((g == 0).all()) for g in found)


def test_terms_follow_the_network_that_is_trained() -> None:
    model, (_, graph) = network("residual"), traced("residual")
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    terms = [regularization.penalty(model, graph) for regularization in ALL]
    before = [term(model).item() for term in terms]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter *= 2
    assert [term(other).item() for term in terms] == pytest.approx(
        [2 * before[0], 4 * before[1], 2 * before[2], 2 * before[3]], rel=1e-5
    )
    assert [term(model).item() for term in terms] == before


def test_fixed_selections_are_no_weights() -> None:
    model, graph = traced("selection")
    without = sum(p.abs().sum() for n, p in model.named_parameters() if "conv" in n or n == "linear.weight")
    assert L1(1.0).penalty(model)(model).item() == pytest.approx(without.item(), rel=1e-5)
    assert any(type(m).__name__ == "FixedSelection" for m in model.modules())
    assert GroupLasso(1.0).penalty(model, graph)(model).isfinite()


# ------------------------------------------------------------------------------------------------------ refusals


def cut(model: nn.Module, graph: LayerGraph) -> nn.Module:
    """Every second unit of every group is gone."""
    return resize(
        copy.deepcopy(model), keeps_of(graph.groups, [torch.arange(0, g.total, 2) for g in graph.groups])
    )


@pytest.mark.parametrize("name", ["residual", "selection", "grouped", "depthwise"])
def test_group_lasso_wants_the_graph_of_the_network_that_is_trained(name: str) -> None:
    model, graph = traced(name)
    slim = cut(model, graph)
    with refused("does_not_fit", "regularization"):
        GroupLasso().penalty(slim, graph)
    with refused("does_not_fit", "regularization"):
        GroupLasso().penalty(model, graph)(slim)
    with refused("missing", "regularization"):
        GroupLasso().penalty(slim)
    own = GroupLasso().penalty(slim, trace(slim, images()))
    assert 0 < own(slim).item() < GroupLasso().penalty(model, graph)(model).item()


def test_the_others_need_no_graph_and_fit_a_cut_network() -> None:
    model, graph = traced("residual")
    slim = cut(model, graph)
    for regularization in ALL[:3]:
        term = regularization.penalty(model)
        assert 0 < term(slim).item() < term(model).item()


def test_a_network_without_batch_norms_cannot_be_slimmed() -> None:
    model, _ = small()
    with refused("unsupported", "regularization"):
        BNScale().penalty(model)
    with refused("unsupported", "regularization"):
        L1().penalty(nn.ReLU())


@pytest.mark.parametrize("kind", [L1, L2, BNScale, GroupLasso])
def test_settings_out_of_range_are_refused_together(kind: type[Regularization]) -> None:
    with refused("out_of_range", "weight", "before_epochs"):
        kind(weight=0, before_epochs=-1)
    with refused("out_of_range", "weight"):
        kind(weight=float("nan"))


def test_frozen_weights_do_not_stop_a_term() -> None:
    model = ResNet(8, "conv", classes=4)
    model.conv1.weight.requires_grad_(False)
    L1(0.1).penalty(model)(model).backward()
    assert model.conv1.weight.grad is None
    assert torch.equal(model.linear.weight.grad, 0.1 * model.linear.weight.detach().sign())
