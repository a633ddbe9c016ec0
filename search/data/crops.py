"""Training images as a stream of random crops, where they do not fit in memory."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from PIL.Image import Resampling, Transpose
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from amc_env.errors import UserError, out_of_range
from search.data.base import scaled
from search.data.images import Images
from search.data.look import Look

AREAS = (0.08, 1.0)
RATIOS = (3 / 4, 4 / 3)
_ATTEMPTS = 10


def training_loader(
    images: Images, rows: Tensor, look: Look, batch_size: int, seed: int
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Shuffled batches of the images at `rows`, cropped and flipped at random by `seed`; an iteration is an epoch.

    A batch is float32 [B, 3, size, size] and int64 [B]. The incomplete last batch is left out; fewer images than a
    batch are one batch.

    Raises:
        UserError: A batch size below 1, or no rows; when iterated, an image that cannot be decoded.
    """
    if batch_size < 1:
        raise out_of_range("batch_size", batch_size, "at least 1")
    if not len(rows):
        raise UserError(
            f"all {len(images)} training images are split off: none is left to fine-tune on",
            code="empty",
            field="search.images",
        )

    def collate(batch: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        pixels, labels = default_collate(batch)
        return scaled(pixels, look.mean, look.std), labels

    return DataLoader(
        cast(Any, _Crops(images, look.size)),
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

    def __init__(self, images: Images, size: int):
        self._images, self._size = images, size

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[tuple[Tensor, int]]:
        pictures = self._images.decoded([row for row, _ in keys])
        return [
            (
                torch.from_numpy(random_crop(picture, self._size, random.Random(seed))),
                int(self._images.labels[row]),
            )
            for picture, (row, seed) in zip(pictures, keys, strict=True)
        ]


def random_crop(picture: Image.Image, size: int, generator: random.Random) -> np.ndarray:
    """Uint8 [3, size, size]: a random part of an image, resized, and mirrored with probability 1/2.

    The part has 8% to 100% of the area and an aspect ratio of 3/4 to 4/3 (Szegedy et al., arXiv 1409.4842), sampled
    as in torchvision's RandomResizedCrop.
    """
    left, top, width, height = _part(*picture.size, generator)
    box = (left, top, left + width, top + height)
    part = picture.crop(box).resize((size, size), Resampling.BILINEAR)
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
