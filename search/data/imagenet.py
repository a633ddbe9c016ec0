"""ImageNet (ILSVRC 2012): 1.28 million training images that stay encoded on the disk.

Images for scoring and calibration are decoded once and mapped from the cache folder; fine-tuning reads the training
images as a stream. The validation images, whose labels are published, are the test split.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from amc_env.validation import Count, Share, SplitSeed
from search.data.base import Data
from search.data.labelled import image_data, labelled
from search.data.look import MEAN, STD, Interpolation, Look
from search.data.rows import Sizes
from search.data.tables import read_hub, read_local

HUB = "ILSVRC/imagenet-1k"
DEFAULT_SEARCH = 3000
CROP = 224 / 256
SIZE = 224
INPUT = ((3, SIZE, SIZE), 1000)
"""Shape of an image, [C, H, W], and the number of classes."""
_FILES = {"train": "**/train-*.parquet", "validation": "**/validation-*.parquet"}
_WAY_OUT = (
    "data.path=DIR with train-*.parquet and validation-*.parquet (columns image, label), or with train/ and val/ of one "
    "folder per class, needs no hub"
)


def imagenet(
    path: str | None = None,
    search_images: Count | None = None,
    split_seed: SplitSeed = 0,
    calibration_images: Count = 4096,
    test_images: Count | None = None,
    classes: Count = 1000,
    size: Count | None = None,
    crop: Share | None = None,
    squash: bool | None = None,
    interpolation: Interpolation | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Data:
    """ImageNet from local files, or from the dataset hub where no path is given.

    Args:
        path: Folder with train-*.parquet and validation-*.parquet (columns ``image`` and ``label``), or with train/
            and val/ of one folder per class, whose sorted names are the labels.
        search_images: Size of the search split; 3,000 where None (AMC).
        split_seed: Which training images it consists of. Not the run's seed: runs must be comparable.
        calibration_images: Size of ``train``, a fixed part of the training images beside the search split.
        test_images: How many of the validation images are the test split, every class in its share; None for all.
        classes: Labels are 0..classes-1; another number for a part of ImageNet.
        size: Of images that are not trained on, see `Look`; 224 where None.
        crop: See `Look`; 224 / 256 where None.
        squash: See `Look`.
        interpolation: See `Look`.
        mean: See `Look`.
        std: See `Look`.

    Raises:
        UserError: Files or columns missing, undecodable images, labels outside the classes, hub out of reach or
            access not granted, splits out of reach, no room for the decoded images.
    """
    look = Look(
        size or SIZE, crop or CROP, bool(squash), interpolation or "bilinear", mean or MEAN, std or STD
    )
    tables = (
        read_local(Path(path), _WAY_OUT, ("parquet",), needed=("train", "validation"))
        if path
        else read_hub(HUB, _WAY_OUT, data_files=_FILES)
    )
    names = tuple(map(str, range(classes)))
    source = labelled(tables, "image", "label", held_out="validation", classes=names)
    searched = DEFAULT_SEARCH if search_images is None else search_images
    return image_data("imagenet", source, look, Sizes(searched, split_seed, calibration_images, test_images))
