"""Networks of torchvision, an optional package that is imported here only."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from amc_env.errors import missing_package
from amc_env.validation import Positive
from search import files
from search.models.source import ModelSource, unknown_name


def torchvision_model(
    name: str | None = None,
    weights: str | None = None,
    key: str | None = None,
    original_lr: Positive = 0.1,
    arguments: Mapping[str, Any] | None = None,
) -> ModelSource:
    """A classifier of torchvision, with its default weights.

    Args:
        name: Like ``resnet50``; `torchvision.models.list_models` lists them.
        weights: See `ModelSource`.
        key: See `ModelSource`.
        original_lr: See `ModelSource`.
        arguments: Further ones for the network's constructor.

    Raises:
        UserError: torchvision is missing, or has no such classifier.
    """
    models = _library()
    known = models.list_models(module=models)
    if name is None or name not in known:
        raise unknown_name("torchvision", name, known)
    more = dict(arguments or {})
    published = models.get_model_weights(name).DEFAULT
    return ModelSource(
        name,
        partial(_build, name, more),
        original_lr,
        weights,
        key=key,
        pretrained=partial(_pretrained, name, more),
        data_settings=_data_settings(published.transforms()),
        class_names=tuple(published.meta["categories"]),
    )


def _library() -> Any:
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:  # one that does not fit torch raises the latter
        raise missing_package("model", "torchvision", "vision", error) from error
    return models


def _build(name: str, more: Mapping[str, Any], shape: tuple[int, int, int], classes: int) -> nn.Module:
    model: nn.Module = _library().get_model(name, weights=None, num_classes=classes, **more)
    return model


def _pretrained(name: str, more: Mapping[str, Any], shape: tuple[int, int, int], classes: int) -> nn.Module:
    with files.reading(f"the weights of model.name={name}", "give a local copy with model.weights=FILE"):
        model: nn.Module = _library().get_model(name, weights="DEFAULT", progress=False, **more)
    return model


def _data_settings(transforms: Any) -> dict[str, Any]:
    """Of `torchvision.transforms._presets.ImageClassification`."""
    return {
        "size": transforms.crop_size[0],
        "crop": transforms.crop_size[0] / transforms.resize_size[0],
        "squash": False,
        "interpolation": transforms.interpolation.value,
        "mean": tuple(transforms.mean),
        "std": tuple(transforms.std),
    }
