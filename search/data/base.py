"""Images and labels: where they come from, how they are split, and what is wrong with them if anything is.

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


@dataclass(frozen=True)
class Split:
    """Images of one use.

    Attributes:
        images: [N, C, H, W]; uint8 pixels 0..255, or float32 that is normalised already.
        labels: int64 [N].
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> "Split":
        """The images and labels at `indices` (int64), in that order, as a copy."""
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class Data:
    """All that a search reads of a dataset.

    Attributes:
        classes: names, in the order of the labels.
        mean, std: per channel, of pixels scaled to [0, 1]; empty where the images are normalised already.
        augment: whether fine-tuning may crop and flip the images.
        fingerprint: short SHA-256 of all pixels, labels and the split.
        loader: the user's own training batches (images, labels), used for fine-tuning in place of `train`.
        stream: makes such batches of a batch size and a seed, where the training images do not fit in memory.
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

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def normalise(self, images: Tensor) -> Tensor:
        """Float32 network input from uint8 pixels [N, C, H, W]; float images pass as they are."""
        return images if images.is_floating_point() else scaled(images, self.mean, self.std)


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
            f"from 1 to {len(split) - 1} can be split off for the search"
        )
    order = stratified(split.labels, seed)
    chosen, rest = order[:search_images].sort().values, order[search_images:].sort().values
    return split.take(rest), split.take(chosen)


def check_scaling(mean: Sequence[float], std: Sequence[float]) -> None:
    """Refuse what pixels of three channels cannot be scaled with.

    Raises:
        UserError: not three numbers each, or a deviation that is not above 0.
    """
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise UserError(f"data.mean={list(mean)}, data.std={list(std)}: needs 3 numbers each, std above 0")


def check_split(name: str, split: Split, classes: int) -> None:
    """Refuse a split that is empty, not [N, C, H, W], not finite, or labelled outside 0..classes-1.

    Raises:
        UserError: with the split's name, the value found and what is allowed.
    """
    if len(split) == 0:
        raise UserError(f"{name} is empty: at least one image is needed")
    if split.images.dim() != 4 or split.labels.dim() != 1 or len(split.images) != len(split.labels):
        raise UserError(
            f"{name} has images {tuple(split.images.shape)} and labels {tuple(split.labels.shape)}: "
            f"[N, C, H, W] and [N] are needed"
        )
    if split.images.is_floating_point() and not bool(split.images.isfinite().all()):
        broken = (~split.images.isfinite().flatten(1).all(1)).nonzero().flatten()
        raise UserError(
            f"{name}: NaN or infinite pixels in {len(broken)} images, the first at {int(broken[0])}"
        )
    outside = ((split.labels < 0) | (split.labels >= classes)).nonzero().flatten()
    if len(outside):
        first = int(outside[0])
        raise UserError(
            f"{name}: {len(outside)} labels outside 0..{classes - 1}, "
            f"the first is {int(split.labels[first])} at row {first}"
        )


def fingerprint(*splits: Split | None) -> str:
    """First 16 hex digits of the SHA-256 of all pixels and labels, in order, with their shapes and types."""
    digest = hashlib.sha256()
    for split in splits:
        for tensor in () if split is None else (split.images, split.labels):
            digest.update(f"{tuple(tensor.shape)} {tensor.dtype};".encode())
            digest.update(np.ascontiguousarray(tensor.numpy()).data)
        digest.update(b"|")
    return digest.hexdigest()[:16]


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
