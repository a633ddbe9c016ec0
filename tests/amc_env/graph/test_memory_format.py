"""Channels-last where a network runs in it, and where its gradients are right."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from amc_env.graph.memory_format import fastest_format, training_format
from search.models.resnet import ResNet


class FlattenByView(nn.Module):
    """A network as users write it: `view` on feature maps, which does not run in channels-last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.linear = nn.Linear(4 * 64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.conv(x).view(x.shape[0], -1))


def test_the_layout_is_channels_last_where_the_network_runs_in_it() -> None:
    example = torch.randn(2, 3, 8, 8)
    assert fastest_format(ResNet(8), example) is torch.channels_last
    by_view = FlattenByView()
    assert fastest_format(by_view, example) is torch.contiguous_format
    assert by_view.conv.weight.is_contiguous()


class Wide(nn.Module):
    """A convolution behind which training has something to do, in a network of two outputs."""

    def __init__(self, channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 32, kernel, stride, kernel // 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).square().mean((2, 3))


def test_small_strided_pointwise_convolutions_are_trained_contiguous() -> None:
    """uxlfoundation/oneDNN#6035: their weight gradient overruns its workspace in channels-last."""
    for channels, kernel, stride, expected in (
        (15, 1, 2, torch.contiguous_format),
        (16, 1, 2, torch.channels_last),
        (3, 1, 1, torch.channels_last),
        (3, 3, 2, torch.channels_last),
    ):
        model = Wide(channels, kernel, stride)
        assert training_format(model, torch.randn(2, channels, 8, 8)) is expected
        assert model.conv.weight.is_contiguous(memory_format=expected)


class WrongInChannelsLast(torch.autograd.Function):
    """The identity; its gradient is doubled in channels-last."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.wrong = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * (2 if ctx.wrong else 1)


def test_a_network_whose_gradients_differ_in_channels_last_is_trained_contiguous() -> None:
    class Wrong(Wide):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return WrongInChannelsLast.apply(self.conv(x)).square().mean((2, 3))

    example = torch.randn(2, 16, 8, 8)
    assert training_format(Wide(16, 3, 1), example) is torch.channels_last
    assert training_format(Wrong(16, 3, 1), example) is torch.contiguous_format


_GRADIENTS = """
import copy, torch
from amc_env.graph.memory_format import training_format
from test_memory_format import Wide

for threads in (1, 2):
    torch.set_num_threads(threads)
    for kernel, stride, channels in [(1, 2, c) for c in (1, 3, 6, 8, 15, 16)] + [(1, 1, 3), (3, 1, 3), (3, 2, 6)]:
        torch.manual_seed(0)
        plain, x = Wide(channels, kernel, stride), torch.randn(32, channels, 16, 16)
        trained = copy.deepcopy(plain)
        layout = training_format(trained, x[:2])
        for _ in range(3):
            trained.zero_grad()
            trained(x.contiguous(memory_format=layout)).mean().backward()
        plain(x).mean().backward()
        expected = plain.conv.weight.grad
        error = float((trained.conv.weight.grad - expected).norm() / expected.norm())
        assert error < 1e-3, (kernel, stride, channels, error)
"""


@pytest.mark.parametrize("instructions", ["AVX2", "DEFAULT"])
def test_gradients_are_right_for_every_kernel_and_stride(instructions: str) -> None:
    """In a process of its own: a wrong choice ends the process."""
    folders = os.pathsep.join((str(Path(__file__).parent), str(Path(__file__).parents[3])))
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": instructions, "PYTHONPATH": folders}
    done = subprocess.run(
        [sys.executable, "-c", _GRADIENTS], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
