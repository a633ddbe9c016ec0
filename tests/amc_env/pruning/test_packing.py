"""Packed convolutions: what the plain network gives, activations taken in, and plain again where that is safer."""

import pytest
import torch
from networks import NETWORKS, images, network, prepared, random_removed, settled
from torch import Tensor, fx, nn
from torch.nn import functional

from amc_env.pruning import packing
from amc_env.pruning.folding import Folder
from amc_env.pruning.packing import PackedConv2d, pack, packed

ONEDNN = torch.backends.mkldnn.is_available()
pytestmark = pytest.mark.skipif(not ONEDNN, reason="torch was built without oneDNN")
HALF = pytest.mark.skipif(
    not ONEDNN or not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 here"
)
X = images().contiguous(memory_format=torch.channels_last)


class Kinds(nn.Module):
    """Convolutions of all kinds, activations that can be taken in, and some that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8, bias=False)
        self.grouped = nn.Conv2d(8, 12, 1, groups=4)
        self.same = nn.Conv2d(12, 12, 3, padding="same")
        self.mirrored = nn.Conv2d(12, 12, 3, padding=1, padding_mode="reflect")
        self.twice = nn.Conv2d(12, 12, 1)
        self.wide, self.narrow, self.named = (nn.Conv2d(12, 12, 1) for _ in range(3))
        self.onto, self.spread = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.first(x))
        x = functional.relu6(self.deep(x))
        x = functional.gelu(self.grouped(x))
        x = functional.relu(self.mirrored(functional.relu(self.same(x))))
        x = self.twice(functional.relu(self.twice(x)))
        x = functional.relu(self.wide(x) + x)
        y = self.named(input=functional.relu6(x + self.narrow(x)))
        y.add_(self.onto(x))  # what it overwrites is read below
        x = functional.relu(self.spread(x) + y.mean((2, 3), keepdim=True))
        return (x + functional.relu(x)).mean((2, 3))


def kinds(dtype: torch.dtype = torch.float32) -> tuple[fx.GraphModule, fx.GraphModule, Tensor]:
    """Plain, packed, and images."""
    model = settled(Kinds()).to(memory_format=torch.channels_last, dtype=dtype)
    plain = fx.symbolic_trace(model)
    return plain, packed(plain, X[:2].to(dtype)), X.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=HALF)])
@torch.no_grad()
def test_outputs_are_the_plain_ones(dtype: torch.dtype) -> None:
    plain, twin, x = kinds(dtype)
    error = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for count in (len(x), 3):
        pack(twin, count)
        torch.testing.assert_close(twin(x), plain(x), **error)
        torch.testing.assert_close(twin(x[:1]), plain(x[:1]), **error)


def test_what_is_packed_and_what_it_takes_in() -> None:
    _, twin, _ = kinds()
    found = {
        name: (m._activation.__name__, m._shortcut)
        for name, m in twin.named_modules()
        if isinstance(m, PackedConv2d)
    }
    assert found == {
        "first": ("relu", False),
        "deep": ("relu6", False),
        "grouped": ("identity", False),
        "wide": ("relu", True),
        "narrow": ("identity", True),
        "onto": ("identity", False),
        "spread": ("identity", False),
    }


class Normed(nn.Module):
    """A batch norm that is behind no layer, and a convolution that takes an activation in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.conv(self.norm(x))).mean((2, 3))


@pytest.mark.parametrize("name", ["conv.weight", "conv.bias", "norm.running_mean"])
@torch.no_grad()
def test_what_is_not_a_number_is_not_hidden(name: str) -> None:
    twin = packed(fx.symbolic_trace(settled(Normed())), X[:2])
    broken = dict(twin.state_dict(keep_vars=True))[name].detach()
    pack(twin, 4)
    assert twin(X).isfinite().all()
    value = broken[0].clone()
    broken[0] = float("nan")
    pack(twin, 4)
    assert twin(X).isnan().any()
    broken[0] = value
    pack(twin, 4)
    assert twin(X).isfinite().all()


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_the_folder_packs_every_candidate_anew(name: str) -> None:
    candidates, grids = prepared(name)
    folder = Folder(candidates.original, X[:2], channels_last=True, batch_size=len(X))
    for seed in range(3):
        small = candidates.cut(random_removed(grids, seed))
        folded = folder(small)
        plain = [module for module in folded.modules() if type(module) is nn.Conv2d]
        assert not plain
        torch.testing.assert_close(folded(X), small(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("error", [AttributeError("no such operator"), RuntimeError("not for these sizes")])
def test_without_the_operators_convolutions_stay_plain(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(network: nn.Module, images: int) -> None:
        if any(isinstance(module, PackedConv2d) for module in network.modules()):
            raise error

    monkeypatch.setattr("amc_env.pruning.folding.pack", refuse)
    model = network("residual")
    with caplog.at_level("INFO"):
        folded = Folder(model, X[:2], channels_last=True)(model)
    assert not any(isinstance(module, PackedConv2d) for module in folded.modules())
    assert f"convolutions are not packed: {error}" in caplog.text
    torch.testing.assert_close(folded(X), model(X), rtol=1e-4, atol=1e-5)


def test_operators_that_give_something_else_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(packing.FUSED, functional.relu, ("none", [], ""))
    model = network("depthwise")
    with caplog.at_level("INFO"):
        folded = Folder(model, X[:2], channels_last=True)(model)
    assert "convolutions are not packed: the network's outputs change" in caplog.text
    assert not any(isinstance(module, PackedConv2d) for module in folded.modules())


def test_contiguous_images_are_for_plain_convolutions() -> None:
    model = network("residual")
    folded = Folder(model, images(2), channels_last=False)(model)
    assert not any(isinstance(module, PackedConv2d) for module in folded.modules())
