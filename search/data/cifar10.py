"""CIFAR-10, from the dataset hub or from local parquet files."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from amc_env.validation import Count, SplitSeed
from search.data.base import Data, Split, check_scaling, fingerprint, split_off
from search.data.hub import read

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
HUB = "uoft-cs/cifar10"
SIZE = 32
INPUT = ((3, SIZE, SIZE), len(CLASSES))
"""Shape of an image, [C, H, W], and the number of classes."""
DEFAULT_SEARCH = 5000


def cifar10(
    path: str | None = None,
    search_images: Count | None = None,
    split_seed: SplitSeed = 0,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
) -> Data:
    """CIFAR-10 from local parquet files, or from the dataset hub where no path is given.

    Args:
        path: folder with train-*.parquet and test-*.parquet (columns `img` and `label`).
        search_images: size of the search split; 5,000 where None.
        split_seed: which training images it consists of. Not the run's seed: runs must be comparable.
        mean, std: per channel, of pixels in [0, 1]: what the pretrained weights were trained with.

    Raises:
        UserError: files or columns missing, undecodable or wrong images, labels outside the classes,
            hub out of reach, `search_images` out of reach.
    """
    check_scaling(mean, std)
    train, test = (
        Split(part.pixels(torch.arange(len(part)), SIZE, unchanged), part.labels)
        for part in read(HUB, path, held_out="test", image="img", classes=len(CLASSES))
    )
    searched = DEFAULT_SEARCH if search_images is None else search_images
    train, search = split_off("cifar10", train, searched, split_seed)
    return Data(
        name="cifar10",
        train=train,
        search=search,
        test=test,
        classes=CLASSES,
        mean=tuple(mean),
        std=tuple(std),
        augment=True,
        fingerprint=fingerprint(train, search, test),
    )


def unchanged(picture: Image.Image) -> Image.Image:
    """The image itself: CIFAR-10's are used at their own size."""
    return picture
