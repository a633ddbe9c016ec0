"""Convolutions in eight bits: near the plain ones, exact where bytes can say it, refused by name where they cannot be."""

import pytest
import torch
from networks import NETWORKS, images, network, problem, random_removed, settled
from refusals import refused
from torch import Tensor, fx, nn
from torch.nn import functional

from amc_env.errors import UserError
from amc_env.evaluation import int8 as quantization
from amc_env.evaluation.int8 import (
    Dequantize,
    Int8Folder,
    Quantize,
    QuantizedConv2d,
    Scales,
    calibrate,
    obstacle,
    quantized,
)
from amc_env.graph.topology import Topology

REASON = obstacle()
pytestmark = pytest.mark.skipif(bool(REASON), reason=f"no convolutions in eight bits here: {REASON}")
X = images(40).contiguous(memory_format=torch.channels_last)
CONVOLUTIONAL = [name for name in NETWORKS if any(isinstance(m, nn.Conv2d) for m in network(name).modules())]


def folder_of(model: nn.Module) -> Int8Folder:
    return Int8Folder(model, Topology.of(model), X, channels_last=True, batch_size=len(X))


def distance(got: Tensor, want: Tensor) -> float:
    """Of the whole."""
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("name", CONVOLUTIONAL)
@torch.no_grad()
def test_candidates_give_nearly_what_they_give_in_floats(name: str) -> None:
    candidates, grids = problem(name)
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
    eight_bit = quantized(fx.symbolic_trace(model), X[:2])
    calibrate(eight_bit, X, len(X))
    kinds = {}
    for node, value in values(eight_bit, X).items():
        if node.op == "call_module":
            kinds[str(node.target)] = (type(eight_bit.get_submodule(str(node.target))), value.dtype)
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
    assert distance(eight_bit(X), model(X)) < 0.05


def values(eight_bit: fx.GraphModule, x: Tensor) -> dict[fx.Node, Tensor]:
    lane = fx.Interpreter(eight_bit, garbage_collect_values=False)
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
    eight_bit = quantized(fx.symbolic_trace(model), x)
    calibrate(eight_bit, x, 16)
    size = float(high - low) / 255
    assert eight_bit.get_submodule("0").gives.size == pytest.approx(size)
    zero = eight_bit.get_submodule("0").gives.zero
    rounded = ((hidden / size).round().clamp(-zero, 255 - zero)) * size
    torch.testing.assert_close(eight_bit(x), second(rounded), rtol=1e-4, atol=2 * size * 127)
    assert (eight_bit(x) - second(rounded)).abs().median() < 1e-3 * second(rounded).abs().max()


def noted(*values: float) -> Scales:
    scales = Scales()
    scales.wanted = True
    scales.note(torch.tensor(values).view(1, 1, -1, 1))
    return scales


@pytest.mark.parametrize(
    ("values", "size", "zero"),
    [((-1.0, 0.3, 4.1), 5.1 / 255, 50), ((2.0, 3.0), 3 / 255, 0), ((-2.0, -1.0), 2 / 255, 255)],
)
def test_scales_hold_zero_and_the_range(values: tuple[float, ...], size: float, zero: int) -> None:
    scales = noted(*values)
    assert scales.buffer().tolist() == [0, 0]
    assert scales.calibrate()
    assert (scales.size, scales.zero) == (pytest.approx(size), zero)
    assert scales.buffer().tolist() == [scales.size, scales.zero]
    scales.note(torch.full((1, 1, 1, 1), 100.0))  # nobody wants to know
    scales.calibrate()
    assert scales.size == pytest.approx(size)
    scales.forget()
    assert scales.buffer().tolist() == [0, 0]


def test_scales_of_zeros_and_of_what_is_not_finite() -> None:
    assert noted(0.0).calibrate()
    for value in (float("inf"), -float("inf"), float("nan")):
        scales = noted(0.0, value)
        assert not scales.calibrate()
        assert not scales.known


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("kind", ["weight", "bias"])
@pytest.mark.parametrize("name", ["residual", "depthwise", "concat"])
@torch.no_grad()
def test_what_is_not_finite_is_computed_in_floats(name: str, kind: str, place: int) -> None:
    model = network(name)
    folder = folder_of(model)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    parameter = getattr(norms[place], kind)
    value = parameter[0].clone()
    for wrong in (float("nan"), float("inf")):
        parameter[0] = wrong
        broken = folder(model)
        assert not any(tensor.dtype == torch.uint8 for tensor in values(broken, X).values())
        assert not broken(X).isfinite().all()
    parameter[0] = value
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


class Overwriting(nn.Module):
    """The second convolution reads what the activation has overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y = functional.gelu(self.second(x))
        return (functional.relu(x, inplace=True) + y + self.second(x)).mean((2, 3))


@pytest.mark.parametrize(
    ("model", "channels_last", "reason"),
    [
        (Overwriting(), True, "the network overwrites values that it reads again"),
        (Branching(), True, "torch.fx cannot trace it"),
        (network("residual"), False, "images are not in channels-last memory format"),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4)),
            True,
            "the network has no convolution of the plain kind",
        ),
    ],
)
def test_networks_that_cannot_be_are_refused(model: nn.Module, channels_last: bool, reason: str) -> None:
    message = rf"evaluator.precision=int8 does not work here \({reason}.*\); use float32"
    with pytest.raises(UserError, match=message):
        Int8Folder(model.eval(), Topology.of(model.eval()), X, channels_last=channels_last, batch_size=len(X))


def test_processors_that_cannot_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise AttributeError("no such operator")

    forward = QuantizedConv2d.forward
    monkeypatch.setattr(QuantizedConv2d, "forward", lambda layer, x: forward(layer, x).clamp(max=16))
    assert obstacle() == "this processor's sums of products of bytes overflow"
    with refused("unsupported", "evaluator.precision"):
        folder_of(network("residual"))
    monkeypatch.setattr(quantization, "calibrate", missing)
    assert obstacle() == "no such operator"


def test_nothing_is_drawn() -> None:
    state = torch.get_rng_state()
    assert obstacle() == ""
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def test_a_shortcut_may_come_in_another_memory_format() -> None:
    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return (self.conv(x) + x.flip(1).contiguous()).mean((2, 3))

    model = settled(Shuffled())
    assert distance(folder_of(model)(model)(X), model(X)) < 0.1


@torch.no_grad()
def test_images_need_not_be_square() -> None:
    model = network("residual")
    x = X.reshape(20, 3, 16, 8).contiguous(memory_format=torch.channels_last)
    folder = Int8Folder(model, Topology.of(model), x, channels_last=True, batch_size=20)
    assert distance(folder(model)(x), model(x)) < 0.1


class Narrow(nn.Module):
    """Channels that are no multiples of eight, read by what can pass over further ones and what cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.deep = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 5, 3, padding=1, groups=5)
        self.point, self.split = nn.Conv2d(5, 6, 1), nn.Conv2d(6, 6, 1, groups=2)
        self.second, self.third, self.fourth = (
            nn.Conv2d(6, 6, 1),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.Conv2d(6, 6, 1),
        )
        self.lone = nn.Conv2d(6, 6, 3, padding=1, groups=6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.split(self.point(functional.relu(self.deep(functional.relu(self.first(x))))))
        x = self.fourth(functional.relu(self.third(self.second(x)))) + x
        return self.lone(functional.relu(x)).mean((2, 3))


@torch.no_grad()
def test_channels_are_filled_up_where_all_readers_pass_over_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = settled(Narrow()).to(memory_format=torch.channels_last)
    eight_bit = quantized(fx.symbolic_trace(model), X[:2])
    layers = {name: m for name, m in eight_bit.named_modules() if isinstance(m, QuantizedConv2d)}
    assert {name for name, layer in layers.items() if layer.pads} == {"first", "deep", "second", "third"}
    assert {name for name, layer in layers.items() if layer.padded} == {"deep", "point", "third", "fourth"}
    calibrate(eight_bit, X, len(X))
    widths = {
        str(node.target): value.shape[1]
        for node, value in values(eight_bit, X).items()
        if node.op == "call_module"
    }
    assert (widths["first"], widths["deep"], widths["point"], widths["third"], widths["fourth"]) == (
        8,
        8,
        6,
        8,
        6,
    )
    wide = eight_bit(X)
    monkeypatch.setattr(quantization, "_ALIGNED", 1)
    calibrate(eight_bit, X, len(X))
    torch.testing.assert_close(wide, eight_bit(X), rtol=1e-5, atol=1e-6)
    assert distance(wide, model(X)) < 0.1
