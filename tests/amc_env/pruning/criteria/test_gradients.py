"""Gradients and curvature against exact ones; Taylor and OBD by hand."""

import math

import pytest
import torch
from networks import NETWORKS, images, network, traced
from refusals import refused
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from amc_env.graph.layers import Layer, LayerGraph
from amc_env.graph.tracing import trace, trace_layers
from amc_env.pruning.criteria import OBD, Sample, Taylor
from amc_env.pruning.criteria.gradients import (
    fisher_diagonal,
    gauss_newton_diagonal,
    hessian_diagonal,
    per_example_gradients,
)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gathered(model: nn.Module, layers: tuple[Layer, ...], sample: Sample) -> dict[str, Tensor]:
    """Every example's gradient by layer name, [N, *weight's shape]."""
    found: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    per_example_gradients(model, layers, sample, lambda layer, own: found[layer.name].append(own))
    return {name: torch.cat(parts) for name, parts in found.items()}


def one_by_one(model: nn.Module, layers: tuple[Layer, ...], sample: Sample) -> dict[str, Tensor]:
    """The same by a backward pass for each example."""
    weights = [model.get_submodule(layer.name).weight.requires_grad_() for layer in layers]
    rows = []
    for image, label in zip(sample.inputs, sample.targets, strict=True):
        loss = F.cross_entropy(model(image[None]), label[None]).sum()
        rows.append(torch.autograd.grad(loss, weights))
    return {layer.name: torch.stack(own) for layer, own in zip(layers, zip(*rows, strict=True), strict=True)}


class Twice(nn.Module):
    """A convolution that is run at two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.twice(F.relu(self.first(x))))
        return self.last(F.relu(self.twice(F.avg_pool2d(x, 2)))).mean((2, 3))


class Tokens(nn.Module):
    """Linear layers on the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.gelu(self.first(x))).mean((1, 2))


def paddings() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"),
        nn.ReLU(inplace=True),
        nn.Conv2d(5, 6, 4, padding="same"),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 7, (1, 5), stride=(2, 1), padding=(0, 2)),
        nn.Conv2d(7, 4, 3, padding=2, dilation=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


OTHERS = {"twice": Twice, "tokens": Tokens, "paddings": paddings}


def example(name: str) -> tuple[nn.Module, tuple[Layer, ...]]:
    if name in NETWORKS:
        model, graph = traced(name)
        return model, graph.layers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = OTHERS[name]().eval()
    return model, trace_layers(model, images()).layers


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("name", [*NETWORKS, *OTHERS])
def test_gradients_are_those_of_single_examples(name: str) -> None:
    model, layers = example(name)
    sample = Sample(images(3), torch.tensor([0, 3, 1]))
    found, wanted = gathered(model, layers, sample), one_by_one(model, layers, sample)
    for layer in layers:
        torch.testing.assert_close(found[layer.name], wanted[layer.name], rtol=1e-4, atol=1e-6)


def test_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph = traced("residual")
    sample = Sample(images(7), torch.arange(7) % 4)
    whole = gathered(model, graph.layers, sample)
    monkeypatch.setattr("amc_env.pruning.criteria.gradients._MOST", 3)
    for name, own in gathered(model, graph.layers, sample).items():
        torch.testing.assert_close(own, whole[name], rtol=1e-4, atol=2e-6)
    monkeypatch.setattr(
        "amc_env.pruning.criteria.gradients._BYTES", 1
    )  # room for nothing: one image at a time
    sizes: list[int] = []
    per_example_gradients(model, graph.layers[:1], sample, lambda _, own: sizes.append(len(own)))
    assert sizes == [1] * 7


def test_examples_that_are_mixed_are_refused() -> None:
    class Merging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x.flatten(0, 2))).view(len(x), -1, 4).mean(1)

    model = Merging().eval()
    layers = trace_layers(model, images()).layers
    with refused("unsupported", "criterion"):
        gathered(model, layers, Sample(images(2), torch.tensor([0, 1])))


# ------------------------------------------------------------------------------------------------- curvature


def line(inputs: Tensor, weights: list[float]) -> tuple[nn.Module, tuple[Layer, ...]]:
    """y = w'x, and its only layer."""
    model = nn.Sequential(nn.Linear(inputs.shape[1], 1, bias=False)).double()
    model[0].weight.data = double(*weights)[None]
    return model.eval(), trace_layers(model, inputs).layers


def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs[:, 0] - targets).square() / 2


def test_the_fisher_of_a_quadratic_is_its_hessian_where_residuals_have_unit_variance() -> None:
    # Loss (w'x - t)^2 / 2 is the likelihood of a Gaussian of variance 1; its Hessian is the mean of xx'.
    inputs = double(*range(12)).view(4, 3)
    model, layers = line(inputs, [0.5, -1.0, 2.0])
    targets = model(inputs)[:, 0].detach() + double(1, -1, -1, 1)
    found = fisher_diagonal(model, layers, Sample(inputs, targets), half_square)["0"]
    torch.testing.assert_close(found, inputs.square().mean(0, keepdim=True))
    # Where they have another one it is off by as much: it is the gradients' square, not a curvature.
    targets = model(inputs)[:, 0].detach() + 3
    found = fisher_diagonal(model, layers, Sample(inputs, targets), half_square)["0"]
    torch.testing.assert_close(found, 9 * inputs.square().mean(0, keepdim=True))


@pytest.mark.parametrize("probes", [1, 3])
def test_hutchinson_is_exact_where_the_hessian_is_diagonal(probes: int) -> None:
    inputs = torch.diag(double(1, 2, 3))
    model, layers = line(inputs, [0.5, -1.0, 2.0])
    found = hessian_diagonal(model, layers, Sample(inputs, double(7, 8, 9)), probes, half_square)["0"]
    torch.testing.assert_close(found, double(1, 4, 9)[None] / 3)


def test_hutchinson_on_a_quadratic() -> None:
    inputs = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model, layers = line(inputs, [1.0] * 6)
    exact = inputs.T @ inputs / 20
    probes = 400
    found = hessian_diagonal(model, layers, Sample(inputs, inputs[:, 0]), probes, half_square)["0"][0]
    deviation = (exact.square().sum(1) - exact.diagonal().square()).sqrt() / probes**0.5
    assert bool(((found - exact.diagonal()).abs() < 4 * deviation).all())
    assert not torch.equal(found, exact.diagonal())


def small(activation: type[nn.Module]) -> tuple[nn.Module, tuple[Layer, ...], Sample]:
    """A convolution and a linear layer, 42 weights, float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(1, 2, 3), activation(), nn.Flatten(), nn.Linear(8, 3)).double().eval()
    pixels = images(5, size=4)[:, :1].double()
    return model, trace_layers(model, pixels).layers, Sample(pixels, torch.tensor([0, 1, 2, 0, 1]))


def exact_hessian(model: nn.Module, layers: tuple[Layer, ...], sample: Sample) -> Tensor:
    """The Hessian of the mean cross-entropy over all weights of the layers, side by side."""
    names = [f"{layer.name}.weight" for layer in layers]
    shapes = [model.get_parameter(name).shape for name in names]
    start = torch.cat([model.get_parameter(name).detach().flatten() for name in names])

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([math.prod(shape) for shape in shapes])
        weights = {n: part.view(shape) for n, part, shape in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(functional_call(model, weights, (sample.inputs,)), sample.targets)

    return torch.autograd.functional.hessian(loss, start)


def flat(found: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in found.values()])


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_hutchinson_on_a_small_network(activation: type[nn.Module]) -> None:
    model, layers, sample = small(activation)
    exact = exact_hessian(model, layers, sample)
    probes = 2000
    found = flat(hessian_diagonal(model, layers, sample, probes))
    deviation = (exact.square().sum(1) - exact.diagonal().square()).sqrt() / probes**0.5
    assert bool(((found - exact.diagonal()).abs() < 4.5 * deviation + 1e-12).all())
    assert (found - exact.diagonal()).abs().mean() < 0.06 * exact.diagonal().max()


def test_gauss_newton_is_the_hessian_of_a_network_that_is_linear_in_each_weight() -> None:
    model, layers, sample = small(nn.ReLU)
    exact = exact_hessian(model, layers, sample).diagonal()
    assert exact.min() >= -1e-12
    repeats = 800
    many = Sample(sample.inputs.repeat(repeats, 1, 1, 1), sample.targets.repeat(repeats))
    found = flat(gauss_newton_diagonal(model, layers, many))
    assert found.min() >= 0
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0.01 * exact.max().item())


def test_the_fisher_on_a_small_network() -> None:
    model, layers, sample = small(nn.ReLU)
    found = fisher_diagonal(model, layers, sample)
    wanted = {name: own.square().mean(0) for name, own in one_by_one(model, layers, sample).items()}
    torch.testing.assert_close(flat(found), flat(wanted))
    # With labels drawn from the network's own predictions it is an estimate of the Gauss-Newton part, here the
    # Hessian; with the true ones it is not.
    exact = exact_hessian(model, layers, sample).diagonal()
    repeats = 1500
    many = sample.inputs.repeat(repeats, 1, 1, 1)
    with torch.no_grad():
        chances = model(many).softmax(1)
    drawn = torch.multinomial(chances, 1, generator=torch.Generator().manual_seed(0))[:, 0]
    of_drawn = flat(fisher_diagonal(model, layers, Sample(many, drawn)))
    torch.testing.assert_close(of_drawn, exact, rtol=0.15, atol=0.01 * exact.max().item())
    assert (flat(found) - exact).abs().max() > 0.2 * exact.max()


# -------------------------------------------------------------------------------------------------- criteria


@pytest.fixture
def even() -> tuple[nn.Module, LayerGraph]:
    """Two linear layers with hidden units 1, 2, 1 on the input 1, and equal logits 0, 0.

    With label 0 the gradient of the logits is (-1/2, 1/2), of the hidden units (1/2, -1/2, 1/2).
    """
    model = nn.Sequential(nn.Linear(1, 3, bias=False), nn.Linear(3, 2, bias=False)).eval()
    model[0].weight.data = torch.tensor([[1.0], [2.0], [1.0]])
    model[1].weight.data = torch.tensor([[2.0, -1.0, 0.0], [3.0, -2.0, 1.0]])
    return model, trace(model, torch.ones(1, 1))


ONE = Sample(torch.ones(1, 1), torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        # w * dL/dw: consumer (-1, 3/2), (1, -2), (0, 1/2); producer 1/2, -1, 1/2.
        (Taylor(members="consumers", aggregate="sum"), (0.25, 1.0, 0.25)),
        (Taylor(members="producers", aggregate="sum"), (0.25, 1.0, 0.25)),
        (Taylor(members="all", aggregate="sum"), (0.5, 2.0, 0.5)),
        (Taylor(), (0.5, 2.0, 0.5)),
        (OBD("fisher", members="consumers", aggregate="sum"), (1.625, 2.5, 0.125)),
        (OBD("fisher", members="producers", aggregate="sum"), (0.125, 0.5, 0.125)),
        (OBD("fisher", members="all", aggregate="sum"), (1.75, 3.0, 0.25)),
    ],
    ids=str,
)
def test_scores_by_hand(
    even: tuple[nn.Module, LayerGraph], criterion: Taylor | OBD, expected: tuple[float, ...]
) -> None:
    found = criterion.channel_scores(*even, ONE)[0]
    if criterion.aggregate == "mean":
        assert found.tolist() == pytest.approx([0.5, 2.0, 0.5])  # both members have the mean 1/2
    else:
        torch.testing.assert_close(found, double(*expected))


def test_worths_of_single_weights_by_hand(even: tuple[nn.Module, LayerGraph]) -> None:
    model, graph = even
    taylor = Taylor().saliency(model, graph.layers, ONE)
    torch.testing.assert_close(taylor["0"], double(0.5, 1, 0.5)[:, None])
    torch.testing.assert_close(taylor["1"], torch.stack([double(1, 1, 0), double(1.5, 2, 0.5)]))
    fisher = OBD("fisher").saliency(model, graph.layers, ONE)
    torch.testing.assert_close(fisher["0"], double(0.125, 0.5, 0.125)[:, None])
    torch.testing.assert_close(fisher["1"], torch.stack([double(0.5, 0.5, 0), double(1.125, 2, 0.125)]))


def test_gauss_newton_by_hand(even: tuple[nn.Module, LayerGraph]) -> None:
    # The curvature of the logits is 1/4 [[1, -1], [-1, 1]]: of a weight that adds x to one of them, x^2 / 4. Signs
    # that are equal give nothing, others twice that: the mean over many is halfway.
    many = Sample(torch.ones(4000, 1), torch.zeros(4000, dtype=torch.int64))
    criterion = OBD("gauss_newton", images=4000, members="consumers", aggregate="sum")
    found = criterion.channel_scores(*even, many)[0]
    torch.testing.assert_close(found, double(1.625, 2.5, 0.125), rtol=0.05, atol=0)


def test_taylor_is_squared_before_examples_are_averaged(even: tuple[nn.Module, LayerGraph]) -> None:
    both = Sample(torch.ones(2, 1), torch.tensor([0, 1]))  # opposite gradients: their mean is zero
    found = Taylor(members="consumers", aggregate="sum").channel_scores(*even, both)[0]
    torch.testing.assert_close(found, double(0.25, 1.0, 0.25))


def test_taylor_is_the_slope_of_a_gate_on_the_channels() -> None:
    model, graph = traced("flatten")
    sample = Sample(images(3), torch.tensor([2, 0, 1]))
    found = Taylor(members="consumers", aggregate="sum").channel_scores(model, graph, sample)
    names = [group.name for group in graph.groups]
    gate = torch.ones(3, 12, requires_grad=True)
    handle = model.get_submodule("head").register_forward_pre_hook(lambda _, x: x[0] * gate)
    try:
        F.cross_entropy(model(sample.inputs), sample.targets, reduction="sum").backward()
    finally:
        handle.remove()
        model.zero_grad()
    assert gate.grad is not None
    wanted = gate.grad.double().square().mean(0)
    torch.testing.assert_close(found[names.index("hidden")], wanted, rtol=1e-4, atol=1e-9)


def test_noise_below_zero_counts_by_its_magnitude() -> None:
    model, graph = traced("residual")
    sample = Sample(images(4), torch.arange(4))
    raw = hessian_diagonal(model, graph.layers, sample, 2)
    assert any(bool((value < 0).any()) for value in raw.values())
    found = OBD("hutchinson").saliency(model, graph.layers, sample)
    for name, value in found.items():
        weight = model.get_parameter(f"{name}.weight").detach().double()
        torch.testing.assert_close(value, (raw[name] * weight.square() / 2).abs())


def test_hutchinson_depends_on_the_seed_alone() -> None:
    model, layers, sample = small(nn.Tanh)
    first, again, other = (
        flat(hessian_diagonal(model, layers, Sample(sample.inputs, sample.targets, seed), 1))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_only_the_asked_layers_are_scored() -> None:
    model, graph = network("residual"), traced("residual")[1]
    some = graph.layers[2:4]
    sample = Sample(images(4), torch.arange(4))
    for criterion in (Taylor(), OBD("fisher"), OBD("hutchinson")):
        found = criterion.saliency(model, some, sample)
        assert list(found) == [layer.name for layer in some]
    whole = Taylor().saliency(model, graph.layers, sample)
    torch.testing.assert_close(Taylor().saliency(model, some, sample)[some[0].name], whole[some[0].name])
