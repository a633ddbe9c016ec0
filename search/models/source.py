"""The networks on offer, and how each comes by its weights.

Networks:
    digits_cnn, digits_mlp: small ones for scikit-learn's digits, trained once and kept in the cache folder.
    resnet20..110: CIFAR ResNets (He et al., arXiv 1512.03385) in the layout of
        akamaster/pytorch_resnet_cifar10, whose published weights they load. plain20: without shortcuts.
    mobilenet: MobileNet-V1 (Howard et al., arXiv 1704.04861) with stride 1 in its first convolution.
    mobilenet_v2 (Sandler et al., arXiv 1801.04381), vgg16 (Simonyan and Zisserman, arXiv 1409.1556):
        for 32 x 32 images, with batch norm; their weights are the user's.
    resnet50: for ImageNet (He et al., arXiv 1512.03385), with the layer names of torchvision, whose
        published weights it loads.

An option `model=x` is a file conf/model/x.yaml whose `_target_` is a function here, giving a ModelSource.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import urllib.error
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from amc_env.errors import UserError
from search import files
from search.data.base import Data
from search.data.loaders import seeded
from search.training.finetune import Recipe, train

PICKLES = (".th", ".pt", ".pth")


LISTED_NAMES = 8


# Part of the key of a network trained here: raise it when a change of the training makes older weights wrong.
TRAINED_VERSION = 1


@dataclass(frozen=True)
class ModelSource:
    """A network and where its weights come from: a file, else a published address, else its own training.

    Attributes:
        build: makes the network with random weights, from (channels, height, width) and class count.
        original_lr: peak learning rate it was trained with; fine-tuning takes a fraction of it.
        weights: the user's file, or None.
        url: published weights; the file's name ends with its SHA-256 prefix. None where there are none.
        recipe: how it is trained once where there are neither; None where that is too expensive.
    """

    name: str
    build: Callable[[tuple[int, int, int], int], nn.Module]
    original_lr: float
    weights: str | None = None
    url: str | None = None
    recipe: Recipe | None = None

    def check(self) -> None:
        """Finds out, before any data is read, that there are no weights.

        Raises:
            UserError: There is neither a file, nor an address, nor a recipe.
        """
        if self.weights is None and self.url is None and self.recipe is None:
            raise UserError(f"model={self.name} has no published weights; give model.weights=FILE")

    def load(self, data: Data) -> nn.Module:
        """The network with its weights, in eval mode on the CPU; the global random state stays as it was.

        Raises:
            UserError: weights missing, unreadable, not finite, or of another network.
        """
        build = partial(self.build, data.image_shape, len(data.classes))
        if self.weights is None and self.url is None and self.recipe is not None:
            return trained_once(self.name, build, data, self.recipe)
        with seeded(0):
            model = build()
        load_weights(model, self.weights, self.url, name=self.name, images=_described(data))
        return model.eval()


def _described(data: Data) -> str:
    """What a network is built for, in messages; the digits are the default, and few weights are made for them."""
    channels, height, width = data.image_shape
    hint = "; weights for colour images go with data=cifar10" if data.name == "digits" else ""
    return f" on data={data.name} ({channels} x {height} x {width}{hint})"


# ---------------------------------------------------------------------------------------------------- weights


def load_weights(
    model: nn.Module, path: str | None, url: str | None, name: str = "model", images: str = ""
) -> None:
    """Fill `model` from the user's file, or from the published address where no file is given.

    Args:
        path: .safetensors, or a pickle (.th, .pt, .pth) of a state dict, read with `weights_only=True`.
        url: its file's name ends with `-` and 8 or more leading hex digits of the SHA-256, which are checked.
        name: of the network, for messages.
        images: what it was built for, for messages.

    Raises:
        UserError: neither given, unreadable, names or shapes that do not fit (listed), NaN or infinity.
    """
    if path is not None:
        source, state = path, read_checkpoint(Path(path))
    elif url is not None:
        source, state = url, _download(url)
    else:
        raise UserError(f"model={name} has no published weights: give a checkpoint with model.weights=FILE")
    broken = [
        key for key, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())
    ]
    if broken:
        raise UserError(
            f"{source}: NaN or infinite values in {_listed(broken)}; the checkpoint cannot be used"
        )
    _fit(model, state, f"{source} does not fit model={name}{images}")


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict in a file; a `state_dict` entry is unwrapped and `module.` prefixes are taken off.

    Raises:
        UserError: no such file, another kind of file, or a pickle that needs more than `weights_only`.
    """
    if not path.is_file():
        raise UserError(f"model.weights={path}: no such file")
    if path.suffix not in (".safetensors", *PICKLES):
        raise UserError(
            f"model.weights={path}: .safetensors, {', '.join(PICKLES)} are read, not '{path.suffix}'"
        )
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _unpickled(path)
    except (
        Exception
    ) as error:  # both readers raise errors of many kinds on a file that is not what its name says
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"model.weights={path} cannot be read: {reason}{_conversion(path)}") from error
    return _state_dict(content, str(path))


def _unpickled(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _conversion(path: Path) -> str:
    """For a pickle: how to make a file of tensors only out of it, if its source is trusted."""
    if path.suffix not in PICKLES:
        return ""
    return (
        ". Pickles are read with weights_only=True, as others may run code. If you trust it, convert it: "
        f"torch.save(torch.load('{path.name}', weights_only=False).state_dict(), 'weights.pt') "
        "where it holds a whole module, or save its dict of tensors alone"
    )


def _state_dict(content: Any, source: str) -> dict[str, Tensor]:
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    entries = content.items() if isinstance(content, Mapping) else [(None, content)]
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in entries):
        found = sorted(map(str, content)) if isinstance(content, Mapping) else [type(content).__name__]
        raise UserError(
            f"{source} holds no state dict (names to tensors, or under `state_dict`): {_listed(found)}"
        )
    wrapped = all(key.startswith("module.") for key in content)
    return {key.removeprefix("module.") if wrapped else key: value for key, value in content.items()}


def _download(url: str) -> dict[str, Tensor]:
    """The published state dict, from torch.hub's cache where it is there already."""
    if not re.search(r"-[0-9a-f]{8,64}\.[a-z]+$", url):
        raise UserError(
            f"model.url={url}: its file must be named NAME-SHA256PREFIX.th, so that it can be checked"
        )
    try:
        content = torch.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except (urllib.error.URLError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]  # a RuntimeError says that the hash does not agree
        raise UserError(
            f"{url} could not be fetched ({reason}): give a local copy with model.weights=FILE"
        ) from error
    return _state_dict(content, url)


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
        parts = [f"{kind}: {_listed(names)}" for kind, names in problems.items() if names]
        raise UserError(f"{complaint}; {'; '.join(parts)}")


def _listed(names: list[str]) -> str:
    rest = len(names) - LISTED_NAMES
    return ", ".join(names[:LISTED_NAMES]) + (f" and {rest} more" if rest > 0 else "")


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
