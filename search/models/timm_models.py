"""Networks of timm (PyTorch Image Models), an optional package that is imported here only."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from amc_env.errors import missing_package
from amc_env.validation import Positive
from search import files
from search.models.source import ModelSource, unknown_name


def timm_model(
    name: str | None = None,
    weights: str | None = None,
    key: str | None = None,
    original_lr: Positive = 0.03,
    arguments: Mapping[str, Any] | None = None,
) -> ModelSource:
    """A classifier of timm, with its default weights or those of a tag (``NAME.TAG``).

    Args:
        name: Like ``vit_tiny_patch16_224``; `timm.list_models` lists them.
        weights: See `ModelSource`.
        key: See `ModelSource`.
        original_lr: See `ModelSource`.
        arguments: Further ones for `timm.create_model`, like ``{img_size: 32}``.

    Raises:
        UserError: timm is missing, or has no such network.
    """
    timm = _library()
    published = timm.get_pretrained_cfg(name) if name and timm.is_model(name) else None
    if name is None or published is None:
        raise unknown_name("timm", name, timm.list_models())
    more = dict(arguments or {})
    return ModelSource(
        name,
        partial(_build, name, more),
        original_lr,
        weights,
        key=key,
        pretrained=partial(_pretrained, name, more) if published.has_weights else None,
        data_settings=_data_settings(published, more),
    )


def _library() -> Any:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch raises the latter
        raise missing_package("model", "timm", "timm", error) from error
    return timm


def _build(name: str, more: Mapping[str, Any], shape: tuple[int, int, int], classes: int) -> nn.Module:
    model: nn.Module = _library().create_model(name, num_classes=classes, in_chans=shape[0], **more)
    return model


def _pretrained(name: str, more: Mapping[str, Any], shape: tuple[int, int, int], classes: int) -> nn.Module:
    with files.reading(f"the weights of model.name={name}", "give a local copy with model.weights=FILE"):
        model: nn.Module = _library().create_model(name, pretrained=True, **more)
    return model


def _data_settings(published: Any, more: Mapping[str, Any]) -> dict[str, Any]:
    """Of `timm.models.PretrainedCfg`."""
    return {
        "size": more.get("img_size", published.input_size[-1]),
        "crop": published.crop_pct,
        "squash": published.crop_mode == "squash",
        "interpolation": published.interpolation,
        "mean": tuple(published.mean),
        "std": tuple(published.std),
    }
