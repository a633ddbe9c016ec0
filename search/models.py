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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from amc_env.errors import UserError
from search import files
from search.data import Data, seeded
from search.training import Recipe, train

SHORTCUTS = ("pad", "selection", "conv", "none")
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


# ---------------------------------------------------------------------------------------------------- sources


def resnet(
    depth: int,
    shortcut: str = "pad",
    weights: str | None = None,
    url: str | None = None,
    original_lr: float = 0.1,
) -> ModelSource:
    """A CIFAR ResNet; `depth` is 6n + 2. See ResNet for `shortcut`."""
    name = f"plain{depth}" if shortcut == "none" else f"resnet{depth}"
    if depth < 8 or (depth - 2) % 6:
        raise UserError(f"model.depth={depth}: a CIFAR ResNet has 6n + 2 layers (20, 32, 44, 56, 110)")
    if shortcut not in SHORTCUTS:
        raise UserError(f"model.shortcut={shortcut}: one of {', '.join(SHORTCUTS)} is needed")
    return ModelSource(name, partial(_build_resnet, depth, shortcut), original_lr, weights, url)


def digits_cnn(weights: str | None = None, original_lr: float = 0.1, epochs: int = 30) -> ModelSource:
    """ResNet-8 with convolutions in its shortcuts (9 convolutions), for the digits."""
    recipe = Recipe(epochs=epochs, lr=original_lr)
    return ModelSource("digits_cnn", partial(_build_resnet, 8, "conv"), original_lr, weights, recipe=recipe)


def digits_mlp(weights: str | None = None, original_lr: float = 0.1, epochs: int = 30) -> ModelSource:
    """Three linear layers, for the digits."""
    recipe = Recipe(epochs=epochs, lr=original_lr)
    return ModelSource("digits_mlp", _build_mlp, original_lr, weights, recipe=recipe)


def mobilenet(weights: str | None = None, url: str | None = None, original_lr: float = 0.1) -> ModelSource:
    """MobileNet-V1 for 32 x 32 images."""
    return ModelSource("mobilenet", partial(_build_for_images, MobileNet), original_lr, weights, url)


def mobilenet_v2(weights: str | None = None, url: str | None = None, original_lr: float = 0.1) -> ModelSource:
    """MobileNet-V2 for 32 x 32 images."""
    return ModelSource("mobilenet_v2", partial(_build_for_images, MobileNetV2), original_lr, weights, url)


def vgg16(weights: str | None = None, url: str | None = None, original_lr: float = 0.1) -> ModelSource:
    """VGG-16 with batch norm for 32 x 32 images."""
    return ModelSource("vgg16", partial(_build_for_images, VGG16), original_lr, weights, url)


def resnet50(weights: str | None = None, url: str | None = None, original_lr: float = 0.1) -> ModelSource:
    """ResNet-50 for ImageNet."""
    return ModelSource("resnet50", partial(_build_for_images, ResNet50), original_lr, weights, url)


def _build_resnet(depth: int, shortcut: str, shape: tuple[int, int, int], classes: int) -> nn.Module:
    return ResNet(depth, shortcut, shape[0], classes)


def _build_for_images(
    network: Callable[[int, int], nn.Module], shape: tuple[int, int, int], classes: int
) -> nn.Module:
    return network(shape[0], classes)


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


# --------------------------------------------------------------------------------------------------- networks


class FixedSelection(nn.Conv2d):
    """A 1x1 convolution that copies input channels to output positions and gives 0 elsewhere.

    It says a zero-padded shortcut in a form that a tracer of coupled channels can follow. Its weight holds
    0 and 1 only and is a buffer: no optimiser sees it and it is no parameter. Weights without it load.

    Attributes:
        free: True: no MACs are charged for it, and no repair or training touches it.
    """

    free = True

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
        _kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


def _stage(in_planes: int, planes: int, blocks: int, stride: int, shortcut: str) -> nn.Sequential:
    first = BasicBlock(in_planes, planes, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(planes, planes, 1, shortcut) for _ in range(blocks - 1)))


def _kaiming(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not isinstance(module, FixedSelection):
            nn.init.kaiming_normal_(module.weight)


class MobileNet(nn.Module):
    """MobileNet-V1 with stride 1 in its first convolution; strides as published after it."""

    def __init__(self, in_channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        widths = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
        # Where the width doubles the image is halved, the first block excepted.
        strides = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
        blocks = zip(widths[:-1], widths[1:], strides, strict=True)
        self.conv1 = _conv_bn(in_channels, 32, 3)
        self.features = nn.Sequential(*(_separable(*block) for block in blocks))
        self.classifier = nn.Sequential(nn.Linear(widths[-1], classes))

    def forward(self, x: Tensor) -> Tensor:
        out = F.adaptive_avg_pool2d(self.features(self.conv1(x)), 1)
        return self.classifier(out.flatten(1))


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
        return x + self.conv(x) if self.residual else self.conv(x)


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
        _kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


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
        _kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


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
        for number, (planes, count, stride) in enumerate(self.STAGES, start=1):
            blocks = [Bottleneck(width, planes, stride)]
            width = planes * Bottleneck.EXPANSION
            blocks += [Bottleneck(width, planes, 1) for _ in range(count - 1)]
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.fc = nn.Linear(width, classes)
        _kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        out = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.fc(F.adaptive_avg_pool2d(out, 1).flatten(1))


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
    if not file.exists():
        state = {key: value.contiguous() for key, value in train(build, data, recipe).state_dict().items()}
        files.write(file, lambda unfinished: save_file(state, unfinished))
    load_weights(model, str(file), None, name=name)
    return model.eval()
