"""Training batches of images that do not fit in memory: read, shuffled, decoded and cropped while training runs."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from amc_env.errors import UserError
from search.data import scaled
from search.image_files import EncodedImage, ImageFiles, RowGroup, decoded

if TYPE_CHECKING:
    from PIL.Image import Image

AREAS = (0.08, 1.0)
RATIOS = (3 / 4, 4 / 3)
SHUFFLED = 4096
"""Images that are shuffled together; twice as many are in memory, encoded (for ImageNet about 1 GB)."""
SIZE = 224
_ATTEMPTS = 10
_AHEAD = 3  # batches that are decoded while one is trained on
_PIECE = 8  # images that a thread decodes at a time


class ImageStream:
    """Shuffled batches (images, labels) on the CPU, each image cropped and flipped at random; an iteration is an epoch.

    Row groups come in random order; the images of some of them, 4,096 or more, are shuffled together: files need not
    be read in full for one image. Every draw comes from generators of its own, whatever the number of threads. The
    incomplete last batch of an epoch is left out; fewer images than a batch are one batch.

    Args:
        files: Where the images are.
        left_out: Rows that are not trained on, int64.
        mean: As for `scaled`.
        std: As for `scaled`.
        batch_size: Images of a batch.
        seed: Of the order, the crops and the flips; each iteration draws anew.
        shuffled: How many images are shuffled together, at least.

    Raises:
        UserError: A batch size below 1, or nothing is left; when iterated, an image that cannot be decoded.
    """

    def __init__(
        self,
        files: ImageFiles,
        left_out: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        seed: int,
        *,
        shuffled: int = SHUFFLED,
    ):
        if batch_size < 1:
            raise UserError(f"finetune.batch_size={batch_size}: at least 1 is needed")
        self._files = files
        self._stays = torch.ones(len(files), dtype=torch.bool)
        self._stays[left_out] = False
        count = int(self._stays.sum())
        if not count:
            raise UserError(f"all {len(files)} training images are split off: none is left to fine-tune on")
        self._mean, self._std = mean, std
        self._batch_size = min(batch_size, count)
        self._steps = count // self._batch_size
        self._seed = seed
        self._epoch = 0
        self._shuffled = shuffled

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self._steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch: normalised float32 [B, 3, 224, 224] and int64 [B]."""
        mixed = np.random.SeedSequence((self._seed, self._epoch)).generate_state(1, np.uint64)
        draws = torch.Generator().manual_seed(int(mixed[0]))
        self._epoch += 1
        threads = ThreadPoolExecutor()
        pending: deque[_Batch] = deque()
        try:
            images = chain.from_iterable(self._pools(threads, draws))
            for _ in range(self._steps):
                pending.append(self._begun(threads, list(islice(images, self._batch_size)), draws))
                if len(pending) > _AHEAD:
                    yield self._finished(pending.popleft())
            while pending:
                yield self._finished(pending.popleft())
        finally:
            threads.shutdown(cancel_futures=True)

    def _pools(self, threads: ThreadPoolExecutor, draws: torch.Generator) -> Iterator[list[EncodedImage]]:
        """Images that are shuffled together, in their order; the next are read while these are used."""
        order = torch.randperm(len(self._files.groups), generator=draws).tolist()
        coming: deque[Future[list[EncodedImage]]] = deque()
        for part in self._parts([self._files.groups[number] for number in order]):
            coming.append(threads.submit(self._read, part))
            if len(coming) > 1:
                yield _in_random_order(coming.popleft().result(), draws)
        while coming:
            yield _in_random_order(coming.popleft().result(), draws)

    def _parts(self, groups: Sequence[RowGroup]) -> Iterator[list[RowGroup]]:
        part: list[RowGroup] = []
        for group in groups:
            part.append(group)
            if sum(each.rows for each in part) >= self._shuffled:
                yield part
                part = []
        if part:
            yield part

    def _read(self, groups: Sequence[RowGroup]) -> list[EncodedImage]:
        images: list[EncodedImage] = []
        for group in groups:
            stays = self._stays[group.start : group.start + group.rows]
            images += self._files.of_group(group, (stays.nonzero().flatten() + group.start).tolist())
        return images

    def _begun(
        self, threads: ThreadPoolExecutor, images: Sequence[EncodedImage], draws: torch.Generator
    ) -> _Batch:
        pixels = torch.empty(len(images), 3, SIZE, SIZE, dtype=torch.uint8)
        seeds = torch.randint(2**62, (len(images),), generator=draws).tolist()
        pieces = [slice(start, start + _PIECE) for start in range(0, len(images), _PIECE)]
        work = [threads.submit(_crop_all, images[p], seeds[p], pixels[p].numpy()) for p in pieces]
        return _Batch(pixels, self._files.labels[[image.row for image in images]], work)

    def _finished(self, batch: _Batch) -> tuple[Tensor, Tensor]:
        for piece in batch.work:
            piece.result()
        return scaled(batch.pixels, self._mean, self._std), batch.labels


@dataclass(frozen=True, eq=False)
class _Batch:
    """A batch whose pixels are there when all the work is done."""

    pixels: Tensor
    labels: Tensor
    work: Sequence[Future[None]]


def _in_random_order(images: Sequence[EncodedImage], draws: torch.Generator) -> list[EncodedImage]:
    return [images[number] for number in torch.randperm(len(images), generator=draws).tolist()]


def _crop_all(images: Sequence[EncodedImage], seeds: Sequence[int], pixels: np.ndarray) -> None:
    for number, (image, seed) in enumerate(zip(images, seeds, strict=True)):
        pixels[number] = random_crop(decoded(image), random.Random(seed))


def random_crop(picture: Image, draw: random.Random) -> np.ndarray:
    """Uint8 [3, 224, 224]: a random part of an image, resized, and mirrored with probability 1/2.

    The part has 8% to 100% of the area and an aspect ratio of 3/4 to 4/3 (Szegedy et al., arXiv 1409.4842), as
    torchvision's RandomResizedCrop draws it.
    """
    from PIL.Image import Resampling, Transpose

    left, top, width, height = _part(*picture.size, draw)
    part = picture.crop((left, top, left + width, top + height))
    part = part.resize((SIZE, SIZE), Resampling.BILINEAR)
    if draw.random() < 0.5:
        part = part.transpose(Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(part).transpose(2, 0, 1)


def _part(width: int, height: int, draw: random.Random) -> tuple[int, int, int, int]:
    """Left, top, width and height of a random part; the largest in the middle where none is found soon."""
    for _ in range(_ATTEMPTS):
        area = width * height * draw.uniform(*AREAS)
        ratio = math.exp(draw.uniform(math.log(RATIOS[0]), math.log(RATIOS[1])))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            return draw.randint(0, width - wide), draw.randint(0, height - high), wide, high
    wide = min(width, round(height * RATIOS[1]))
    high = min(height, round(width / RATIOS[0]))
    return (width - wide) // 2, (height - high) // 2, wide, high
