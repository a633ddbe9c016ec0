"""Small networks for the digits data, trained here in seconds."""

from __future__ import annotations

from functools import partial

from torch import nn

from amc_env.validation import Count, Positive
from search.models.resnet import build_resnet
from search.models.source import ModelSource
from search.models.vit import build_vit
from search.training.finetune import Recipe


def digits_cnn(
    weights: str | None = None, original_lr: Positive = 0.1, epochs: Count = 30, key: str | None = None
) -> ModelSource:
    """ResNet-8 with convolutions in its shortcuts (9 convolutions), for the digits."""
    recipe = Recipe(epochs=epochs, lr=original_lr)
    return ModelSource(
        "digits_cnn", partial(build_resnet, 8, "conv"), original_lr, weights, recipe=recipe, key=key
    )


def digits_mlp(
    weights: str | None = None, original_lr: Positive = 0.1, epochs: Count = 30, key: str | None = None
) -> ModelSource:
    """Three linear layers, for the digits."""
    recipe = Recipe(epochs=epochs, lr=original_lr)
    return ModelSource("digits_mlp", _build_mlp, original_lr, weights, recipe=recipe, key=key)


def digits_vit(
    weights: str | None = None, original_lr: Positive = 0.03, epochs: Count = 80, key: str | None = None
) -> ModelSource:
    """A vision transformer for the digits: patches of 2 x 2, three blocks, four heads, width 48."""
    recipe = Recipe(epochs=epochs, lr=original_lr, batch_size=32, weight_decay=2e-3, warmup_epochs=10)
    build = partial(build_vit, 2, 3, 48, 4, 2)
    return ModelSource("digits_vit", build, original_lr, weights, recipe=recipe, key=key)


def _build_mlp(shape: tuple[int, int, int], classes: int) -> nn.Module:
    channels, height, width = shape
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * height * width, 128),
        nn.ReLU(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )
