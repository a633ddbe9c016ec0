"""Training batches: augmented images of a split, or the user's own loader."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from amc_env.errors import UserError, out_of_range
from amc_env.inputs import Inputs, count, device_of, each, take, to_device
from search.data.base import Data, Split
from search.data.loaders import MOST_BATCHES, Reseeded, endless, one_pass
from search.data.reading import Reader, batches_from

log = logging.getLogger(__name__)

CROP_PADDING = 4


Pair = tuple[Inputs, Inputs]
"""Inputs and targets of a batch."""


class Batches(Protocol):
    """Epochs of (inputs, targets) on the device that trains; one iteration is one epoch.

    Attributes:
        example: two network inputs, on the device: what the memory layout is tried out with.
    """

    example: Inputs

    def __iter__(self) -> Iterator[Pair]: ...

    def __len__(self) -> int:
        """Steps of one epoch."""
        ...


class AugmentedBatches:
    """Shuffled batches of a split; each image cropped (4 zero pixels around it) and flipped at random.

    Every draw comes from a generator of its own on the CPU: a seed gives the same images on every device;
    each iteration is the next epoch, with a new order. The incomplete last batch of an epoch is left out, as
    its batch-norm statistics would weigh like those of a whole one; a split below one batch is one batch.
    """

    def __init__(
        self, split: Split, data: Data, batch_size: int, seed: int, device: str | torch.device
    ) -> None:
        """Take the examples to the device once; `data` says how to normalise and whether to augment.

        Raises:
            UserError: a batch size below 1.
        """
        if batch_size < 1:
            raise out_of_range("batch_size", batch_size, "at least 1")
        self.split = Split(to_device(split.inputs, device), to_device(split.targets, device))
        self.data = data
        self.example = data.normalise(take(self.split.inputs, slice(2)))
        self.batch_size = min(batch_size, len(split))
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.split) // self.batch_size

    def __iter__(self) -> Iterator[Pair]:
        device = device_of(self.split.inputs)
        order = torch.randperm(len(self.split), generator=self.generator).to(device)
        for step in range(len(self)):
            batch = self.split.take(order[step * self.batch_size : (step + 1) * self.batch_size])
            inputs = each(batch.inputs, self._augmented) if self.data.augment else batch.inputs
            yield self.data.normalise(inputs), batch.targets

    def _augmented(self, images: Tensor) -> Tensor:
        return crop_and_flip(images, self.generator)


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image of [N, C, H, W] shifted by -4..4 pixels (zeros come in) and mirrored with probability 1/2.

    Args:
        generator: on the CPU; 3 draws an image are taken.
    """
    count, channels, height, width = images.shape
    span = 2 * CROP_PADDING + 1
    draws = [
        torch.randint(high, (count, 1), generator=generator).to(images.device) for high in (span, span, 2)
    ]
    top, left, flipped = draws
    rows = top + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    columns = left + torch.where(flipped.bool(), columns.flip(0), columns)
    padded = F.pad(images, (CROP_PADDING,) * 4)
    # Crop and mirror in one gather: the flat position of each pixel in its padded image.
    flat = (rows[:, :, None] * padded.shape[3] + columns[:, None, :]).view(count, 1, -1)
    return padded.flatten(2).gather(2, flat.expand(-1, channels, -1)).view_as(images)


class LoaderBatches:
    """The user's own training loader, with its own order and augmentation, brought to the device.

    What it draws at random comes from a seed, whoever used it before, and whatever the training draws meanwhile. A last
    batch of one example is left out.
    """

    def __init__(self, data: Data, device: str | torch.device, seed: int) -> None:
        """Take the loader that `data` came with.

        Raises:
            UserError: as `batches_of`.
        """
        loader: Any = data.loader
        self._read = data.reader or Reader()
        self._length = batches_of(loader)
        self.device = torch.device(device)
        self.example = data.normalise(to_device(take(data.train.inputs, slice(2)), device))
        self._batches = Reseeded(loader, seed)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Pair]:
        largest = 0
        for batch in batches_from("train_loader", self._batches):
            inputs, targets = self._read("train_loader", batch)
            largest = max(largest, count(inputs))
            if count(inputs) == 1 < largest:  # an incomplete last batch, in which batch norm has no variance
                continue
            yield to_device(inputs, self.device), to_device(targets, self.device)


_counted: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


def batches_of(loader: Any) -> int:
    """How many batches a loader gives; they are counted once where it has no length, like that of an iterable dataset.

    Raises:
        UserError: The loader can be read once only, or seems to have no end.
    """
    with suppress(TypeError):
        return len(loader)
    if isinstance(loader, Iterator):
        raise one_pass("train_loader")
    if loader not in _counted:
        log.info("train_loader has no length: its batches are counted")
        _counted[loader] = sum(1 for _ in islice(Reseeded(loader, 0), MOST_BATCHES + 1))
    if _counted[loader] > MOST_BATCHES:
        raise endless("train_loader")
    return _counted[loader]


class FirstBatches:
    """So many batches as one epoch, however many epochs of the data they take."""

    def __init__(self, batches: Batches, steps: int):
        self._batches, self._steps = batches, steps
        self.example = batches.example

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Pair]:
        done = 0
        while done < self._steps:
            before = done
            for batch in islice(self._batches, self._steps - done):
                done += 1
                yield batch
            if done == before:
                raise UserError(
                    f"the training data gave no batch after {done} of {self._steps} steps: its loader must start "
                    "again each time",
                    code="one_pass",
                )


def training_batches(data: Data, batch_size: int, seed: int, device: str | torch.device) -> Batches:
    """What to fine-tune on: the stream or the user's loader where `data` has one, else augmented `data.train`."""
    if data.stream is not None:
        data = replace(data, loader=data.stream(batch_size, seed))
    if data.loader is not None:
        return LoaderBatches(data, device, seed)
    return AugmentedBatches(data.train, data, batch_size, seed, device)
