"""ImageNet (ILSVRC 2012): 1.28 million training images that stay encoded on the disk.

Images for scoring and calibration are decoded once and mapped from the cache folder; fine-tuning reads the training
images as a stream. The validation images, whose labels are published, are the test split.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from PIL.Image import Resampling, Transpose
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from amc_env.errors import UserError, out_of_range
from amc_env.validation import Count, SplitSeed
from search.data.base import Data, Split, check_scaling, fingerprint, scaled, stratified
from search.data.hub import Images, read

HUB = "ILSVRC/imagenet-1k"
DEFAULT_SEARCH = 3000
RESIZED = 256
SIZE = 224
INPUT = ((3, SIZE, SIZE), 1000)
"""Shape of an image, [C, H, W], and the number of classes."""
AREAS = (0.08, 1.0)
RATIOS = (3 / 4, 4 / 3)
_ATTEMPTS = 10


def imagenet(
    path: str | None = None,
    search_images: Count | None = None,
    split_seed: SplitSeed = 0,
    calibration_images: Count = 4096,
    test_images: Count | None = None,
    classes: Count = 1000,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
) -> Data:
    """ImageNet from local files, or from the dataset hub where no path is given.

    Images that are not trained on have their shorter side resized to 256 pixels and 224 x 224 cut from the middle.

    Args:
        path: Folder with train-*.parquet and validation-*.parquet (columns ``image`` and ``label``), or with train/
            and val/ of one folder per class, whose sorted names are the labels.
        search_images: Size of the search split; 3,000 where None (AMC).
        split_seed: Which training images it consists of. Not the run's seed: runs must be comparable.
        calibration_images: Size of ``train``, a fixed part of the training images beside the search split.
        test_images: How many of the validation images are the test split, every class in its share; None for all.
        classes: Labels are 0..classes-1; another number for a part of ImageNet.
        mean: Per channel, of pixels in [0, 1]: what the pretrained weights were trained with.
        std: The same.

    Raises:
        UserError: Files or columns missing, undecodable images, labels outside the classes, hub out of reach or
            access not granted, splits out of reach, no room for the decoded images.
    """
    check_scaling(mean, std)
    training, validation = read(HUB, path, held_out="validation", image="image", classes=classes)
    searched = DEFAULT_SEARCH if search_images is None else search_images
    _check_sizes(len(training), len(validation), searched, calibration_images, test_images)
    order = stratified(training.labels, split_seed)
    # From both ends: another size of one leaves the other as it is.
    search, calibration = order[:searched].sort().values, order[-calibration_images:].sort().values
    test = stratified(validation.labels, 0)[:test_images].sort().values
    train_split, search_split, test_split = (
        Split(images.pixels(rows, SIZE, centre_crop), images.labels[rows])
        for images, rows in ((training, calibration), (training, search), (validation, test))
    )
    return Data(
        name="imagenet",
        train=train_split,
        search=search_split,
        test=test_split,
        classes=tuple(str(label) for label in range(classes)),
        mean=tuple(mean),
        std=tuple(std),
        augment=True,
        fingerprint=fingerprint(train_split, search_split, test_split),
        stream=partial(training_loader, training, order[searched:].sort().values, mean, std),
    )


def training_loader(
    images: Images, rows: Tensor, mean: Sequence[float], std: Sequence[float], batch_size: int, seed: int
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Shuffled batches of the images at `rows`, cropped and flipped at random by `seed`; an iteration is an epoch.

    A batch is float32 [B, 3, 224, 224] and int64 [B]. The incomplete last batch is left out; fewer images than a
    batch are one batch.

    Raises:
        UserError: A batch size below 1, or no rows; when iterated, an image that cannot be decoded.
    """
    if batch_size < 1:
        raise out_of_range("batch_size", batch_size, "at least 1")
    if not len(rows):
        raise UserError(f"all {len(images)} training images are split off: none is left to fine-tune on")

    def collate(batch: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        pixels, labels = default_collate(batch)
        return scaled(pixels, mean, std), labels

    return DataLoader(
        cast(Any, _Crops(images)),
        batch_size=min(batch_size, len(rows)),
        sampler=_SeededRows(rows, seed),
        drop_last=True,
        generator=torch.Generator(),  # else each epoch takes a number from the global one
        collate_fn=collate,
    )


class _SeededRows(Sampler[tuple[int, int]]):
    """(row, seed of its crop) in random order, another one each epoch."""

    def __init__(self, rows: Tensor, seed: int):
        self._rows = rows
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.randperm(len(self._rows), generator=self.generator)
        seeds = torch.randint(2**62, (len(self._rows),), generator=self.generator)
        return zip(self._rows[order].tolist(), seeds.tolist(), strict=True)


class _Crops(Dataset[tuple[Tensor, int]]):
    """Random crops, a batch at a time: its images are decoded by several threads."""

    def __init__(self, images: Images):
        self._images = images

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[tuple[Tensor, int]]:
        pictures = self._images.decoded([row for row, _ in keys])
        return [
            (torch.from_numpy(random_crop(picture, random.Random(seed))), int(self._images.labels[row]))
            for picture, (row, seed) in zip(pictures, keys, strict=True)
        ]


def random_crop(picture: Image.Image, generator: random.Random) -> np.ndarray:
    """Uint8 [3, 224, 224]: a random part of an image, resized, and mirrored with probability 1/2.

    The part has 8% to 100% of the area and an aspect ratio of 3/4 to 4/3 (Szegedy et al., arXiv 1409.4842), sampled
    as in torchvision's RandomResizedCrop.
    """
    left, top, width, height = _part(*picture.size, generator)
    box = (left, top, left + width, top + height)
    part = picture.crop(box).resize((SIZE, SIZE), Resampling.BILINEAR)
    if generator.random() < 0.5:
        part = part.transpose(Transpose.FLIP_LEFT_RIGHT)
    return np.array(part).transpose(2, 0, 1)


def _part(width: int, height: int, generator: random.Random) -> tuple[int, int, int, int]:
    """Left, top, width and height of a random part; the largest in the middle where none is found soon."""
    for _ in range(_ATTEMPTS):
        area = width * height * generator.uniform(*AREAS)
        ratio = math.exp(generator.uniform(math.log(RATIOS[0]), math.log(RATIOS[1])))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            return generator.randint(0, width - wide), generator.randint(0, height - high), wide, high
    wide = min(width, round(height * RATIOS[1]))
    high = min(height, round(width / RATIOS[0]))
    return (width - wide) // 2, (height - high) // 2, wide, high


def centre_crop(picture: Image.Image) -> Image.Image:
    """The middle 224 x 224 pixels after the shorter side is resized to 256."""
    short = min(picture.size)
    width, height = (RESIZED * side // short for side in picture.size)
    left, top = round((width - SIZE) / 2), round((height - SIZE) / 2)
    resized = picture.resize((width, height), Resampling.BILINEAR)
    return resized.crop((left, top, left + SIZE, top + SIZE))


def _check_sizes(training: int, validation: int, search: int, calibration: int, test: int | None) -> None:
    problems = []
    if search < 1 or calibration < 1 or search + calibration > training:
        problems.append(
            f"search.images={search}, data.calibration_images={calibration}: each at least 1, and together at most "
            f"the {training} training images"
        )
    if test is not None and not 1 <= test <= validation:
        problems.append(
            f"data.test_images={test}: from 1 to the {validation} validation images, or null for all"
        )
    if problems:
        raise UserError("; ".join(problems))
