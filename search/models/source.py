"""The networks on offer, and how each comes by its weights.

Networks:
    digits_cnn, digits_mlp, digits_vit: small ones for scikit-learn's digits, trained once and kept in the cache folder.
    resnet20..110: CIFAR ResNets (He et al., arXiv 1512.03385) in the layout of
        akamaster/pytorch_resnet_cifar10, whose published weights they load. plain20: without shortcuts.
    mobilenet: MobileNet-V1 (Howard et al., arXiv 1704.04861), for 32 x 32 images or, with stride=2, ImageNet.
    mobilenet_v2 (Sandler et al., arXiv 1801.04381), vgg16 (Simonyan and Zisserman, arXiv 1409.1556):
        for 32 x 32 images, with batch norm; their weights are the user's.
    resnet50: for ImageNet (He et al., arXiv 1512.03385), with the layer names of torchvision, whose
        published weights it loads.
    vit_cifar10: a small vision transformer (Dosovitskiy et al., arXiv 2010.11929) for 32 x 32 images, with weights
        that scripts/train_vit.py trained.
    torchvision, timm, hf: any classifier of these libraries by its name, with the library's weights.
    module: what a function of the user's own makes.

An option `model=x` is a file conf/model/x.yaml whose `_target_` is a function here, giving a ModelSource.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from amc_env.errors import UserError, first_line
from amc_env.inputs import call, described, output_of, take
from search import files
from search.data.base import Data
from search.data.loaders import seeded
from search.models.checkpoint import listed, read_checkpoint, state_dict, unwrapped
from search.training.finetune import Recipe, train

# Part of the key of a network trained here: raise it when a change of the training makes older weights wrong.
TRAINED_VERSION = 1
Build = Callable[[tuple[int, int, int], int], nn.Module]
_CLOSE = 8  # names that are shown where one is wrong
PRETRAINED, RANDOM = "pretrained", "random"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSource:
    """A network and where its weights come from: a file, else a published address, else its own training.

    Attributes:
        build: makes the network with random weights, from (channels, height, width) and class count.
        original_lr: peak learning rate it was trained with; fine-tuning takes a fraction of it. None: not known.
        weights: the user's file; None or PRETRAINED for weights that come with the network; RANDOM.
        url: published weights; the file's name ends with its SHA-256 prefix. None where there are none.
        recipe: how it is trained once where there are neither; None where that is too expensive.
        key: the entry of the user's file that holds the state dict, see `read_checkpoint`.
        pretrained: like `build`, with the weights of the library that it is from, for whose classes it is then made.
        class_names: of the outputs of `pretrained`; empty where they are not known.
        needs_shape: whether it is built for images of a shape; else `build` is given zeros, and inputs may be any.
        data_settings: how these weights want their inputs, by the names of settings of the data, for those left null.
    """

    name: str
    build: Build
    original_lr: float | None
    weights: str | None = None
    url: str | None = None
    recipe: Recipe | None = None
    key: str | None = None
    pretrained: Build | None = None
    data_settings: Mapping[str, Any] = field(default_factory=dict)
    needs_shape: bool = True
    class_names: tuple[str, ...] = ()

    @property
    def file(self) -> Path | None:
        """The user's checkpoint."""
        return None if self.weights in (None, PRETRAINED, RANDOM) else Path(str(self.weights))

    @property
    def origin(self) -> str:
        """Where the weights come from, in words."""
        if self.weights not in (None, PRETRAINED):
            return str(self.weights)
        if self.pretrained is not None:
            return PRETRAINED
        trained = "trained here once, in seconds, and kept in the cache" if self.recipe else "no weights"
        return self.url or trained

    def check(self) -> None:
        """Finds out, before any data is read, that there are no weights.

        Raises:
            UserError: There is neither a file, nor a library's weights, nor an address, nor a recipe.
        """
        if self.weights in (None, PRETRAINED) and not (self.pretrained or self.url or self.recipe):
            raise UserError(
                f"model={self.name} has no published weights; give {{field}}=FILE, or random to search without any",
                code="no_weights",
                field="model.weights",
            )

    def load(self, data: Data) -> nn.Module:
        """The network with its weights, in eval mode on the CPU; the global random state stays as it was.

        Raises:
            UserError: weights missing, unreadable, not finite, or of another network; the network does not run on the
                data or has outputs for another number of classes.
        """
        self.check()
        kind = (data.image_shape if self.needs_shape else (0, 0, 0)), len(data.classes)
        build = partial(self.build, *kind)
        with seeded(0):
            if self.weights == RANDOM:
                log.warning("model.weights=random: %s is not trained, and scores mean nothing", self.name)
                model = build()
            elif self.file is not None:
                model = build()
                load_weights(model, self.weights, None, self.name, _described(data), self.key)
            elif self.pretrained is not None:
                _check_order(self.class_names, data)
                model = self.pretrained(*kind)
            elif self.url is not None:
                model = build()
                load_weights(model, None, self.url, self.name, _described(data))
            else:
                assert self.recipe is not None
                return trained_once(self.name, build, data, self.recipe)
        _check_outputs(model.eval(), data, self.name)
        return model


def _check_order(outputs: tuple[str, ...], data: Data) -> None:
    """Refuse outputs for the classes of the data in another order, for which all scores would be wrong.

    Raises:
        UserError: They are.
    """
    ours, theirs = ([name.lower() for name in names] for names in (data.classes, outputs))
    if ours != theirs and sorted(ours) == sorted(theirs):
        raise UserError(
            f"the network's outputs are {listed([*outputs])}, and the labels of data={data.name} are the same classes in "
            f"another order, {listed([*data.classes])}; number the labels as the network does",
            code="class_order",
            field="data",
        )


def _check_outputs(model: nn.Module, data: Data, name: str) -> None:
    """Run the network on one example.

    Raises:
        UserError: It fails, or has another number of outputs than the data has classes.
    """
    example = data.normalise(take(data.train.inputs, slice(1)))
    try:
        with torch.no_grad():
            outputs = output_of(call(model, example))
    except Exception as error:  # anything that a network of somebody else's raises
        raise UserError(
            f"model={name} does not run{_described(data)}: {first_line(error)}; where the images are of the wrong size, "
            "data=hub and data=folder have data.size",
            code="does_not_run",
            field="model",
        ) from error
    if outputs.ndim == 2 and data.classes and outputs.shape[1] != len(data.classes):
        raise UserError(
            f"model={name} has {outputs.shape[1]} outputs, and data={data.name} has {len(data.classes)} classes; train the "
            "network on these and give its checkpoint with {field}=FILE: it is then built with as many outputs",
            code="wrong_classes",
            field="model.weights",
        )


def unknown_name(library: str, name: str | None, known: list[str]) -> UserError:
    """The error for a network that a library does not have, with names that are close."""
    close = get_close_matches(name or "", known, _CLOSE, 0.3)
    there = ", ".join([*close, f"and {len(known) - len(close)} more"])
    return UserError(
        f"{{field}}={name} is no classifier of {library}; there are {there}",
        code="unknown_name",
        field="model.name",
    )


def _described(data: Data) -> str:
    """What a network is built for, in messages; the digits are the default, and few weights are made for them."""
    inputs = data.train.inputs
    is_image = isinstance(inputs, Tensor) and inputs.ndim == 4
    shape = " x ".join(map(str, data.image_shape)) if is_image else described(take(inputs, slice(1)))
    hint = "; weights for colour images go with data=cifar10" if data.name == "digits" else ""
    return f" on data={data.name} ({shape}{hint})"


# ---------------------------------------------------------------------------------------------------- weights


def load_weights(
    model: nn.Module,
    path: str | None,
    url: str | None,
    name: str = "model",
    images: str = "",
    key: str | None = None,
) -> None:
    """Fill `model` from the user's file, or from the published address where no file is given.

    Args:
        path: the user's file, see `read_checkpoint`.
        url: its file's name ends with `-` and 8 or more leading hex digits of the SHA-256, which are checked.
        name: of the network, for messages.
        images: what it was built for, for messages.
        key: the entry of the user's file that holds the state dict.

    Raises:
        UserError: names or shapes that do not fit (listed), and as `read_checkpoint`.
    """
    if path is not None:
        source, state = path, read_checkpoint(Path(path), key)
    elif url is not None:
        source, state = url, _download(url)
    else:
        raise ValueError("neither a file nor an address of weights")
    _fit(model, unwrapped(state, model.state_dict()), f"{source} does not fit model={name}{images}")


def _download(url: str) -> dict[str, Tensor]:
    """The published state dict, from torch.hub's cache where it is there already."""
    if not re.fullmatch(r"\w+://\S+-[0-9a-f]{8,64}\.[a-z]+", url):
        raise UserError(
            f"{{field}}={url}: needed is an address without blanks, its file named NAME-SHA256PREFIX.th",
            field="model.url",
            code="wrong_type",
        )
    load = partial(
        torch.hub.load_state_dict_from_url,
        *(url, None, "cpu"),
        progress=False,
        check_hash=True,
        weights_only=True,
    )
    kept = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    with files.reading(url, "give a local copy with model.weights=FILE"):
        try:
            content = load()
        except Exception as error:  # a damaged file may raise anything
            if not kept.exists():
                raise
            log.warning("%s is damaged and is fetched again: %s", kept, first_line(error))
            kept.unlink()
            content = load()
    return state_dict(content, url)


def _fit(model: nn.Module, state: Mapping[str, Tensor], complaint: str) -> None:
    """Load `state` strictly, or say in one error all that does not fit."""
    own = model.state_dict()
    wrong = [key for key in state if key in own and state[key].shape != own[key].shape]
    fitting = {key: value for key, value in state.items() if key not in wrong}
    # PyTorch decides what may be absent: a batch norm's counter, the fixed weight of a FixedSelection.
    missing, unexpected = model.load_state_dict(fitting, strict=False)
    missing = [key for key in missing if key not in wrong]
    shapes = [f"{key} {list(state[key].shape)} instead of {list(own[key].shape)}" for key in wrong]
    problems = {
        "missing": [f"{key} {list(own[key].shape)}" for key in missing],
        "unexpected": [f"{key} {list(state[key].shape)}" for key in unexpected],
        "wrong shape": shapes,
    }
    if any(problems.values()):
        parts = [f"{kind}: {listed(names)}" for kind, names in problems.items() if names]
        raise UserError(f"{complaint}; {'; '.join(parts)}", code="does_not_fit")


def trained_once(name: str, build: Callable[[], nn.Module], data: Data, recipe: Recipe) -> nn.Module:
    """The network trained on `data.train` by `recipe`, in eval mode; read from the cache from then on."""
    with seeded(recipe.seed):
        model = build()
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    identity = f"{TRAINED_VERSION} {name} {shapes} {recipe} {data.fingerprint}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    file = files.cache_folder() / "models" / f"{name}-{key}.safetensors"

    def trained(path: Path) -> None:
        state = train(build, data, recipe).state_dict()
        path.write_bytes(save({key: value.contiguous() for key, value in state.items()}))

    files.cached(file, trained, lambda path: load_weights(model, str(path), None, name=name))
    return model.eval()
