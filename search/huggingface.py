"""What is used of Hugging Face's transformers, an optional package that is imported here only.

A name is that of a repository on the hub, or of a local folder as ``save_pretrained`` leaves it. No code that comes with
a repository is run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from amc_env.errors import UserError, missing_package
from search import files

IMAGE, SEQUENCE = "image", "sequence"
_CLASSES = {IMAGE: "AutoModelForImageClassification", SEQUENCE: "AutoModelForSequenceClassification"}
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}
"""Of Pillow's numbers."""


def library(wanted: str) -> Any:
    """The package transformers, silenced.

    Args:
        wanted: The setting that needs it.

    Raises:
        UserError: It cannot be imported.
    """
    try:
        import transformers
        from transformers import AutoModelForImageClassification  # noqa: F401 -- all is imported on demand
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch raises the latter
        raise missing_package(wanted, "transformers", "hf", error) from error
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)  # it logs errors that it raises as well
    transformers.utils.logging.disable_progress_bar()
    return transformers


def configuration(name: str) -> Any:
    """The configuration of a network; its ``num_labels`` is the number of outputs.

    Raises:
        UserError: It cannot be read, or needs code that comes with it.
    """
    with _reading("model.name", name):
        return library("model").AutoConfig.from_pretrained(name)


def kind_of(configuration: Any) -> str:
    """What a network classifies: IMAGE or SEQUENCE.

    Raises:
        UserError: transformers has no classifier of this kind of network.
    """
    auto = library("model").models.auto.modeling_auto
    kinds = {
        IMAGE: auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        SEQUENCE: auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    }
    found = [kind for kind, names in kinds.items() if configuration.model_type in names]
    if not found:
        raise UserError(
            f"{{field}} is a {configuration.model_type}, of which transformers has neither an image nor a sequence "
            "classifier",
            code="no_classifier",
            field="model.name",
        )
    return found[0]


def pretrained(name: str, configuration: Any) -> nn.Module:
    """A classifier with its weights.

    Raises:
        UserError: They cannot be read, or leave out some of the network, like the classifying layer.
    """
    kind = getattr(library("model"), _CLASSES[kind_of(configuration)])
    with _reading("model.name", name):
        model, loaded = kind.from_pretrained(
            name, config=configuration, dtype=torch.float32, output_loading_info=True
        )
    if loaded["missing_keys"]:
        raise UserError(
            f"{{field}}={name} has no weights for {', '.join(sorted(loaded['missing_keys'])[:4])}: it is not trained to "
            "classify; name a fine-tuned network, or give your own with model.weights=FILE",
            code="no_head",
            field="model.name",
        )
    return cast(nn.Module, model)


def untrained(configuration: Any, classes: int) -> nn.Module:
    """A classifier with random weights."""
    own = copy.deepcopy(configuration)
    own.num_labels = classes
    kind = getattr(library("model"), _CLASSES[kind_of(configuration)])
    return cast(nn.Module, kind.from_config(own, dtype=torch.float32))


def image_settings(name: str) -> dict[str, Any]:
    """How a network's images are prepared, by the names of the settings of ``data``; see `search.data.look.Look`.

    Raises:
        UserError: There is no image processor, or it prepares images in a way that is not known here.
    """
    with _reading("model.name", name):
        processor = library("model").AutoImageProcessor.from_pretrained(name).to_dict()
        size, cut = processor["size"], processor.get("crop_size") or {}
        resized = size.get("shortest_edge") or size["height"]
        cropped = cut.get("height", resized) if processor.get("do_center_crop") else resized
        if len({cropped, *cut.values()} if cut else {size.get("width", resized), resized}) > 1:
            raise ValueError(f"its images are no squares: size {size}, crop_size {cut}")
    scaled = processor.get("do_normalize", True)
    return {
        "size": cropped,
        "crop": cropped / resized,
        "squash": "shortest_edge" not in size,
        "interpolation": _INTERPOLATIONS.get(processor.get("resample"), "bilinear"),
        "mean": tuple(processor["image_mean"]) if scaled else (0.0, 0.0, 0.0),
        "std": tuple(processor["image_std"]) if scaled else (1.0, 1.0, 1.0),
    }


def tokenizer(name: str) -> Any:
    """A tokenizer.

    Raises:
        UserError: It cannot be read.
    """
    with _reading("data.tokenizer", name):
        return library("data.tokenizer").AutoTokenizer.from_pretrained(name)


@contextmanager
def _reading(field: str, name: str) -> Iterator[None]:
    """Report whatever goes wrong while transformers reads a repository or folder as one UserError of a setting."""
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(
            f"{{field}}={name}: no such folder, and no name on the hub", code="unreadable", field=field
        )
    try:
        with files.reading(
            f"{field}={name}", "give a name on the hub, or a folder that save_pretrained wrote"
        ):
            yield
    except UserError as error:
        if error.code != "unreadable":
            raise
        raise UserError(str(error), code="unreadable", field=field) from error
