"""ResNets: CIFAR variants (He et al., arXiv 1512.03385, section 4.2) and ResNet-50."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from amc_env.errors import UserError
from amc_env.validation import Positive
from search.models.source import ModelSource

SHORTCUTS = ("pad", "selection", "conv", "none")


# ---------------------------------------------------------------------------------------------------- sources


def resnet(
    depth: int,
    shortcut: str = "pad",
    weights: str | None = None,
    url: str | None = None,
    original_lr: Positive = 0.1,
    key: str | None = None,
) -> ModelSource:
    """A CIFAR ResNet; `depth` is 6n + 2. See ResNet for `shortcut`."""
    name = f"plain{depth}" if shortcut == "none" else f"resnet{depth}"
    if depth < 8 or (depth - 2) % 6:
        raise UserError(
            f"model.depth={depth}: a CIFAR ResNet has 6n + 2 layers (20, 32, 44, 56, 110)",
            code="out_of_range",
            field="model.depth",
        )
    if shortcut not in SHORTCUTS:
        raise UserError(
            f"model.shortcut={shortcut}: one of {', '.join(SHORTCUTS)} is needed",
            code="unknown_name",
            field="model.shortcut",
        )
    return ModelSource(name, partial(build_resnet, depth, shortcut), original_lr, weights, url, key=key)


def resnet50(
    weights: str | None = None, url: str | None = None, original_lr: Positive = 0.1, key: str | None = None
) -> ModelSource:
    """ResNet-50 for ImageNet."""
    return ModelSource("resnet50", partial(build_for_images, ResNet50), original_lr, weights, url, key=key)


def build_resnet(depth: int, shortcut: str, shape: tuple[int, int, int], classes: int) -> nn.Module:
    return ResNet(depth, shortcut, shape[0], classes)


def build_for_images(
    network: Callable[[int, int], nn.Module], shape: tuple[int, int, int], classes: int
) -> nn.Module:
    return network(shape[0], classes)


# --------------------------------------------------------------------------------------------------- networks


class FixedSelection(nn.Conv2d):
    """A 1x1 convolution that copies input channels to output positions and gives 0 elsewhere.

    It says a zero-padded shortcut in a form that a tracer of coupled channels can follow. Its weight holds
    0 and 1 only and is a buffer: no optimiser sees it and it is no parameter. Weights without it load.

    Attributes:
        costless: True: no MACs are charged for it, and no repair or training touches it.
    """

    costless = True

    def __init__(self, in_channels: int, out_channels: int, offset: int, stride: int) -> None:
        """Input channel i goes to output channel offset + i."""
        super().__init__(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
        del self.weight
        selection = torch.zeros(out_channels, in_channels, 1, 1)
        selection[torch.arange(in_channels) + offset, torch.arange(in_channels)] = 1
        self.register_buffer("weight", selection)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.setdefault(prefix + "weight", self.weight)
        super()._load_from_state_dict(state_dict, prefix, *args)


class PadShortcut(nn.Module):
    """Option A of the ResNet paper: every second pixel, `padding` zero channels before and after."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, and a shortcut around them unless the network is a plain one."""

    def __init__(self, in_planes: int, planes: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = _shortcut(in_planes, planes, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out if self.shortcut is None else out + self.shortcut(x))


def _shortcut(in_planes: int, planes: int, stride: int, kind: str) -> nn.Module | None:
    if kind == "none":
        return None
    if stride == 1 and in_planes == planes:
        return nn.Sequential()
    if kind == "pad":
        return PadShortcut(planes // 4)
    if kind == "selection":
        return FixedSelection(in_planes, planes, offset=planes // 4, stride=stride)
    projection = nn.Conv2d(in_planes, planes, 1, stride, bias=False)
    return nn.Sequential(projection, nn.BatchNorm2d(planes))


class ResNet(nn.Module):
    """CIFAR ResNet: a 3x3 convolution, three stages of 16, 32 and 64 channels, pooling, a linear layer.

    `shortcut` says how a stage's first block carries its input over: "pad" (option A), "selection" (the same
    function as a fixed convolution, so that the streams can be pruned), "conv" (option B); "none" is a plain
    network.
    """

    def __init__(self, depth: int, shortcut: str = "pad", in_channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, 1, shortcut)
        self.layer2 = _stage(16, 32, blocks, 2, shortcut)
        self.layer3 = _stage(32, 64, blocks, 2, shortcut)
        self.linear = nn.Linear(64, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


def _stage(in_planes: int, planes: int, blocks: int, stride: int, shortcut: str) -> nn.Sequential:
    first = BasicBlock(in_planes, planes, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(planes, planes, 1, shortcut) for _ in range(blocks - 1)))


def initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not isinstance(module, FixedSelection):
            nn.init.kaiming_normal_(module.weight)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the last to four times the width, and a shortcut around them.

    The stride is in the 3x3 convolution ("v1.5"), as the published weights want it; the paper has it in the
    first 1x1.
    """

    EXPANSION = 4

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        out_planes = planes * self.EXPANSION
        self.conv1 = nn.Conv2d(in_planes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, out_planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_planes)
        self.downsample = (
            None
            if stride == 1 and in_planes == out_planes
            else _shortcut(in_planes, out_planes, stride, "conv")
        )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    """ResNet-50 in torchvision's layout: 25,557,032 parameters, 4.09 G MACs for 224 x 224 images."""

    STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))

    def __init__(self, in_channels: int = 3, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        width = 64
        stages = []
        for planes, count, stride in self.STAGES:
            blocks = [Bottleneck(width, planes, stride)]
            width = planes * Bottleneck.EXPANSION
            blocks += [Bottleneck(width, planes, 1) for _ in range(count - 1)]
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(width, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        out = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits
