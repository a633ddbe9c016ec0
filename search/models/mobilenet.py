"""MobileNet-V1 (Howard et al., arXiv 1704.04861) and MobileNet-V2 (Sandler et al., arXiv 1801.04381)."""

from __future__ import annotations

from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from amc_env.validation import Positive
from search.models.resnet import build_for_images, initialise
from search.models.source import ModelSource


def mobilenet(
    weights: str | None = None,
    url: str | None = None,
    original_lr: Positive = 0.1,
    key: str | None = None,
    stride: Literal[1, 2] = 1,
) -> ModelSource:
    """MobileNet-V1; `stride` is that of the first convolution: 1 for 32 x 32 images, 2 for ImageNet."""
    network = partial(MobileNet, stride=stride)
    return ModelSource("mobilenet", partial(build_for_images, network), original_lr, weights, url, key=key)


def mobilenet_v2(
    weights: str | None = None, url: str | None = None, original_lr: Positive = 0.1, key: str | None = None
) -> ModelSource:
    """MobileNet-V2 for 32 x 32 images."""
    return ModelSource(
        "mobilenet_v2", partial(build_for_images, MobileNetV2), original_lr, weights, url, key=key
    )


class MobileNet(nn.Module):
    """MobileNet-V1; strides as published after the first convolution, whose published stride is 2."""

    def __init__(self, in_channels: int = 3, classes: int = 10, stride: int = 1) -> None:
        super().__init__()
        widths = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
        # Where the width doubles the image is halved, the first block excepted.
        strides = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
        blocks = zip(widths[:-1], widths[1:], strides, strict=True)
        self.conv1 = _conv_bn(in_channels, 32, 3, stride)
        self.features = nn.Sequential(*(_separable(*block) for block in blocks))
        self.classifier = nn.Sequential(nn.Linear(widths[-1], classes))

    def forward(self, x: Tensor) -> Tensor:
        out = F.adaptive_avg_pool2d(self.features(self.conv1(x)), 1)
        logits: Tensor = self.classifier(out.flatten(1))
        return logits


def _conv_bn(
    in_channels: int,
    out_channels: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    relu: type[nn.Module] = nn.ReLU,
) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), relu())


def _separable(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Depthwise 3x3, batch norm, ReLU, pointwise 1x1, batch norm, ReLU: in one flat Sequential, 0 to 5."""
    depthwise = _conv_bn(in_channels, in_channels, 3, stride, groups=in_channels)
    return nn.Sequential(*depthwise, *_conv_bn(in_channels, out_channels, 1))


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter depthwise, project by 1x1; a shortcut where shapes allow. torchvision's names."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        expand = [] if expansion == 1 else [_conv_bn(in_channels, hidden, 1, relu=nn.ReLU6)]
        self.residual = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            *expand,
            _conv_bn(hidden, hidden, 3, stride, groups=hidden, relu=nn.ReLU6),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    """MobileNet-V2 in torchvision's layout, with stride 1 in its first convolution and its second stage."""

    STAGES = (
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self, in_channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        blocks: list[nn.Module] = [_conv_bn(in_channels, 32, 3, relu=nn.ReLU6)]
        width = 32
        for expansion, planes, count, stride in self.STAGES:
            for i in range(count):
                blocks.append(InvertedResidual(width, planes, stride if i == 0 else 1, expansion))
                width = planes
        blocks.append(_conv_bn(width, 1280, 1, relu=nn.ReLU6))
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))
        return logits
