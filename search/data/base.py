"""Inputs and targets: where they come from, how they are split, and what is wrong with them if anything is.

Three splits with three uses. `train`: calibration and fine-tuning. `search`: split off the training images,
judges candidates and nothing else. `test`: read once, for the final figures.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amc_env.errors import UserError
from amc_env.inputs import Inputs, count, described, take, tensors_of
from search.data.reading import Reader


@dataclass(frozen=True)
class Split:
    """Examples of one use.

    Attributes:
        inputs: of the network; of images uint8 pixels 0..255 [N, C, H, W], or float32 that is normalised already.
        targets: what the task wants of them; of a classifier labels, int64 [N].
    """

    inputs: Inputs
    targets: Inputs

    def __len__(self) -> int:
        return count(self.targets)

    def take(self, indices: Tensor) -> "Split":
        """The examples at `indices` (int64), in that order, as a copy."""
        return Split(take(self.inputs, indices), take(self.targets, indices))


@dataclass(frozen=True)
class Data:
    """All that a search reads of a dataset.

    Attributes:
        classes: names, in the order of the labels; empty where targets are no classes.
        mean, std: per channel, of pixels scaled to [0, 1]; empty where inputs are what the network takes.
        augment: whether fine-tuning may crop and flip the images.
        fingerprint: short SHA-256 of all inputs, targets and the split.
        loader: the user's own training batches, used for fine-tuning in place of `train`.
        stream: makes such batches of a batch size and a seed, where the training images do not fit in memory.
        reader: makes inputs and targets of a batch of `loader` or `stream`; None: one for the run's task and network.
    """

    name: str
    train: Split
    search: Split
    test: Split | None
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: bool
    fingerprint: str
    loader: Iterable[Any] | None = None
    stream: Callable[[int, int], Iterable[Any]] | None = None
    reader: Reader | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image.

        Raises:
            UserError: The inputs are no images.
        """
        inputs = self.train.inputs
        if not isinstance(inputs, Tensor) or inputs.ndim != 4:
            raise UserError(
                f"{self.name} gives inputs {described(inputs)}, and images [N, C, H, W] are needed here",
                code="wrong_shape",
            )
        channels, height, width = inputs.shape[1:]
        return channels, height, width

    def normalise(self, inputs: Inputs) -> Inputs:
        """What the network takes: float32 of uint8 pixels [N, C, H, W]; other inputs pass as they are."""
        if self.mean and isinstance(inputs, Tensor) and not inputs.is_floating_point():
            return scaled(inputs, self.mean, self.std)
        return inputs


def scaled(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Float32 [N, C, H, W] from uint8 pixels: scaled to [0, 1], less the mean, by the standard deviation."""
    means = torch.tensor(mean, device=images.device).view(-1, 1, 1)
    deviations = torch.tensor(std, device=images.device).view(-1, 1, 1)
    return images.to(torch.float32).mul_(1 / (255 * deviations)).sub_(means / deviations)


def split_off(name: str, split: Split, search_images: int, seed: int) -> tuple[Split, Split]:
    """(what remains, the search split): `search_images` images, every class in its share, drawn by `seed`.

    Splits of one seed are nested: the images of a smaller one are in every larger one.

    Raises:
        UserError: `search_images` below 1, or none left for training.
    """
    if not 1 <= search_images < len(split):
        raise UserError(
            f"search.images={search_images}: {name} has {len(split)} training images, "
            f"from 1 to {len(split) - 1} can be split off for the search",
            code="out_of_range",
            field="search.images",
        )
    order = stratified(_classes(split.targets), seed)
    chosen, rest = order[:search_images].sort().values, order[search_images:].sort().values
    return split.take(rest), split.take(chosen)


def check_scaling(mean: Sequence[float], std: Sequence[float]) -> None:
    """Refuse what pixels of three channels cannot be scaled with.

    Raises:
        UserError: not three numbers each, or a deviation that is not above 0.
    """
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise UserError(
            f"data.mean={list(mean)}, data.std={list(std)}: needs 3 numbers each, std above 0",
            code="out_of_range",
            field="data.mean",
        )


def _classes(targets: Inputs) -> Tensor:
    """Labels to draw in their shares; of targets that are no classes, all alike."""
    if isinstance(targets, Tensor) and targets.ndim == 1 and not targets.is_floating_point():
        return targets
    return torch.zeros(count(targets), dtype=torch.int64)


def check_split(name: str, split: Split) -> None:
    """Refuse a split that is empty, or whose inputs are not finite or of another number than its targets.

    Raises:
        UserError: with the split's name, the value found and what is allowed.
    """
    tensors = (*tensors_of(split.inputs), *tensors_of(split.targets))
    if len(split) == 0:
        raise UserError(f"{name} is empty: at least one example is needed", code="empty", field=name)
    if len({len(tensor) for tensor in tensors}) > 1:
        raise UserError(
            f"{name} has inputs {described(split.inputs)} and targets {described(split.targets)}: the first dimension of "
            "each must count the examples",
            code="batch",
            field=name,
        )
    for tensor in tensors_of(split.inputs):
        broken = (~tensor.isfinite().reshape(len(tensor), -1).all(1)).nonzero().flatten()
        if len(broken):
            raise UserError(
                f"{name}: NaN or infinite values in {len(broken)} examples, the first at {int(broken[0])}",
                code="not_finite",
                field=name,
            )


def fingerprint(*splits: Split | None) -> str:
    """First 16 hex digits of the SHA-256 of all inputs and targets, in order, with their shapes and types."""
    digest = hashlib.sha256()
    for split in splits:
        for name, tensor in () if split is None else (*_named(split.inputs), *_named(split.targets)):
            digest.update(f"{name}{tuple(tensor.shape)} {tensor.dtype};".encode())
            digest.update(np.ascontiguousarray(tensor.numpy()).data)
        digest.update(b"|")
    return digest.hexdigest()[:16]


def _named(inputs: Inputs) -> list[tuple[str, Tensor]]:
    names = list(inputs) if isinstance(inputs, dict) else [""] * len(tensors_of(inputs))
    return list(zip(names, tensors_of(inputs), strict=True))


def stratified(labels: Tensor, seed: int) -> Tensor:
    """A random order of all images, by `seed`; every part of it in a row holds the classes in their shares."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    _, classes, counts = torch.unique(labels[shuffled], return_inverse=True, return_counts=True)
    by_class = classes.argsort(stable=True)
    number = torch.empty_like(by_class)  # of each image among those of its class, in the random order
    number[by_class] = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    # Spread over [0, 1): sorting all classes by it interleaves them evenly.
    position = (number.to(torch.float64) + 0.5) / counts[classes]
    return shuffled[position.argsort(stable=True)]
