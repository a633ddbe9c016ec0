"""VGG-16 with batch norms (Simonyan and Zisserman, arXiv 1409.1556)."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from amc_env.validation import Positive
from search.models.resnet import build_for_images, initialise
from search.models.source import ModelSource


def vgg16(
    weights: str | None = None, url: str | None = None, original_lr: Positive = 0.1, key: str | None = None
) -> ModelSource:
    """VGG-16 with batch norm for 32 x 32 images."""
    return ModelSource("vgg16", partial(build_for_images, VGG16), original_lr, weights, url, key=key)


class VGG16(nn.Module):
    """VGG-16 with batch norm: torchvision's `features`, average pooling, and one linear layer."""

    PLAN = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")

    def __init__(self, in_channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = in_channels
        for entry in self.PLAN:
            if isinstance(entry, str):
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(width, entry, 3, padding=1), nn.BatchNorm2d(entry), nn.ReLU()]
            width = entry
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))
        return logits
