"""CIFAR-10, from the dataset hub or from local parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from amc_env.validation import Count, SplitSeed
from search.data.base import Data
from search.data.labelled import image_data, labelled
from search.data.look import MEAN, STD, Look
from search.data.rows import Sizes
from search.data.tables import read_hub, read_local

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
HUB = "uoft-cs/cifar10"
SIZE = 32
INPUT = ((3, SIZE, SIZE), len(CLASSES))
"""Shape of an image, [C, H, W], and the number of classes."""
DEFAULT_SEARCH = 5000
_FILES = {"train": "**/train-*.parquet", "test": "**/test-*.parquet"}
_WAY_OUT = "data.path=DIR with train-*.parquet and test-*.parquet (columns img, label) needs no hub"


def cifar10(
    path: str | None = None,
    search_images: Count | None = None,
    split_seed: SplitSeed = 0,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
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
    look = Look(SIZE, mean=mean, std=std)
    tables = (
        read_local(Path(path), _WAY_OUT, ("parquet",), needed=("train", "test"))
        if path
        else read_hub(HUB, _WAY_OUT, data_files=_FILES)
    )
    source = labelled(tables, "img", "label", held_out="test", classes=CLASSES)
    searched = DEFAULT_SEARCH if search_images is None else search_images
    return image_data("cifar10", source, look, Sizes(searched, split_seed))
