"""Convolutions in eight bits: near the plain ones, exact where bytes can say it, refused by name where they cannot be."""

import pytest
import torch
from networks import NETWORKS, images, network, prepared, random_removed, settled
from torch import Tensor, fx, nn
from torch.nn import functional

from amc_env.errors import UserError
from amc_env.pruning import quantization
from amc_env.pruning.folding import Folder
from amc_env.pruning.quantization import (
    Dequantize,
    Quantize,
    QuantizedConv2d,
    Steps,
    obstacle,
    quantized,
    settle,
)

REASON = obstacle()
pytestmark = pytest.mark.skipif(bool(REASON), reason=f"no convolutions in eight bits here: {REASON}")
X = images(40).contiguous(memory_format=torch.channels_last)
CONVOLUTIONAL = [name for name in NETWORKS if any(isinstance(m, nn.Conv2d) for m in network(name).modules())]


def folder_of(model: nn.Module) -> Folder:
    return Folder(model, X[:2], channels_last=True, batch_size=len(X), ranging=X)


def distance(got: Tensor, want: Tensor) -> float:
    """Of the whole."""
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("name", CONVOLUTIONAL)
@torch.no_grad()
def test_candidates_give_nearly_what_they_give_in_floats(name: str) -> None:
    candidates, grids = prepared(name)
    folder = folder_of(candidates.original)
    for seed in range(3):
        small = candidates.cut(random_removed(grids, seed))
        got = folder(small)(X)
        assert distance(got, small(X)) < 0.1
        assert not torch.equal(got, small(X))
        torch.testing.assert_close(folder(small)(X[:3]), got[:3], rtol=1e-4, atol=1e-5)


class Kinds(nn.Module):
    """What is read as bytes, as floats and as both; a shortcut, additions and layers that stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.short, self.deep = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.twice, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.first(x))
        x = functional.relu(self.second(x) + self.short(x))
        x = functional.relu6(self.deep(x) + x)
        x = functional.gelu(self.twice(self.twice(x)))
        return self.last(functional.max_pool2d(x, 2)).mean((2, 3))


@torch.no_grad()
def test_bytes_where_convolutions_read_them_and_floats_for_all_else() -> None:
    model = settled(Kinds()).to(memory_format=torch.channels_last)
    twin = quantized(fx.symbolic_trace(model), X[:2])
    settle(twin, X, len(X))
    kinds = {}
    for node, value in values(twin, X).items():
        if node.op == "call_module":
            kinds[str(node.target)] = (type(twin.get_submodule(str(node.target))), value.dtype)
    layer = QuantizedConv2d
    assert kinds.pop("twice") == (nn.Conv2d, torch.float32)
    assert kinds == {
        "_x_bytes": (Quantize, torch.uint8),
        "first": (layer, torch.uint8),
        "short": (layer, torch.uint8),
        "second": (layer, torch.uint8),  # with its shortcut and the activation
        "deep": (layer, torch.uint8),  # relu6 is not behind sums in eight bits
        "_deep_1_floats": (Dequantize, torch.float32),
        "_max_pool2d_bytes": (Quantize, torch.uint8),
        "last": (layer, torch.float32),
    }
    assert distance(twin(X), model(X)) < 0.05


def values(twin: fx.GraphModule, x: Tensor) -> dict[fx.Node, Tensor]:
    lane = fx.Interpreter(twin, garbage_collect_values=False)
    lane.run(x)
    return lane.env


@pytest.mark.parametrize("padding", [0, 1])
@torch.no_grad()
def test_what_bytes_can_say_is_exact(padding: int) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 3, padding=padding)
    for layer in (first, second):  # whole numbers whose largest is that of weights in eight bits
        layer.weight.copy_(torch.randint(-3, 4, layer.weight.shape, generator=generator))
        layer.weight.flatten(1)[:, 0] = 127
        layer.bias.copy_(torch.arange(len(layer.bias)))
    model = nn.Sequential(first, second).to(memory_format=torch.channels_last)
    x = torch.randint(0, 2, (16, 3, 6, 6), generator=generator).float()
    x = x.contiguous(memory_format=torch.channels_last)
    hidden = first(x)
    low, high = hidden.amin().clamp(max=0), hidden.amax()
    twin = quantized(fx.symbolic_trace(model), x)
    settle(twin, x, 16)
    size = float(high - low) / 255
    assert twin.get_submodule("0").gives.size == pytest.approx(size)
    zero = twin.get_submodule("0").gives.zero
    rounded = ((hidden / size).round().clamp(-zero, 255 - zero)) * size
    torch.testing.assert_close(twin(x), second(rounded), rtol=1e-4, atol=2 * size * 127)
    assert (twin(x) - second(rounded)).abs().median() < 1e-3 * second(rounded).abs().max()


@torch.no_grad()
def test_steps_hold_zero_and_the_range() -> None:
    steps = Steps()
    assert steps.buffer().tolist() == [0, 0]
    for low, high in ((-1.0, 2.0), (-0.5, 4.1)):
        steps.note(torch.tensor([low, 0.3, high]).view(1, 1, 3, 1))
    assert steps.settle()
    assert (steps.size, steps.zero) == (pytest.approx(5.1 / 255), 50)
    assert steps.buffer().tolist() == [steps.size, steps.zero]
    steps.forget()
    steps.note(torch.full((1, 2, 2, 2), 3.0))
    assert steps.settle()
    assert (steps.size, steps.zero) == (pytest.approx(3 / 255), 0)
    steps.forget()
    steps.note(torch.zeros(1, 1, 1, 1))
    assert steps.settle()
    assert steps.size > 0
    steps.forget()
    steps.note(torch.full((1, 1, 1, 1), float("inf")))
    assert not steps.settle()
    assert steps.buffer().tolist() == [0, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@torch.no_grad()
def test_what_is_not_finite_is_computed_in_floats(value: float) -> None:
    model = network("residual")
    folder = folder_of(model)
    layer = [module for module in model.modules() if isinstance(module, nn.Conv2d)][-1]
    weight = layer.weight[0].clone()
    layer.weight[0] = value
    broken = folder(model)
    assert not any(node.dtype == torch.uint8 for node in values(broken, X).values())
    assert not broken(X).isfinite().all()
    layer.weight[0] = weight
    assert folder(model)(X).isfinite().all()


@torch.no_grad()
def test_a_layer_without_weights_is_zero() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    torch.testing.assert_close(folder_of(model)(model)(X), model(X), rtol=1e-3, atol=1e-3)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return (x if x.sum() > 0 else 2 * x).mean((2, 3))


@pytest.mark.parametrize(
    ("model", "channels_last", "reason"),
    [
        (Branching(), True, "torch.fx cannot trace it"),
        (network("residual"), False, "it needs images in channels-last memory format"),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4)),
            True,
            "it has no convolution of the plain kind",
        ),
    ],
)
def test_networks_that_cannot_be_are_refused(model: nn.Module, channels_last: bool, reason: str) -> None:
    message = rf"evaluator.precision=int8 does not work for this network \({reason}.*\); use float32"
    with pytest.raises(UserError, match=message):
        Folder(model.eval(), X[:2], channels_last=channels_last, ranging=X)


def test_processors_that_cannot_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise AttributeError("no such operator")

    forward = QuantizedConv2d.forward
    monkeypatch.setattr(QuantizedConv2d, "forward", lambda layer, x: forward(layer, x).clamp(max=16))
    assert obstacle() == "this processor's sums of products of bytes overflow"
    with pytest.raises(UserError, match=r"overflow\); use float32"):
        folder_of(network("residual"))
    monkeypatch.setattr(quantization, "settle", missing)
    assert obstacle() == "no such operator"
