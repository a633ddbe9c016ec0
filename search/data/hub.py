"""Images and labels of any dataset on the hub, of a local folder of parquet files, or of class folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from amc_env.errors import UserError
from amc_env.validation import Count, Share, SplitSeed
from search.data.base import Data
from search.data.labelled import Labelled, image_data, labelled
from search.data.look import MEAN, STD, Interpolation, Look
from search.data.rows import Sizes
from search.data.tables import Tables, read, read_local

_WAY_OUT = "give the name of a dataset on the hub, or a folder of parquet files with a column of images and one of labels"
_FOLDERS = (
    "give a folder with one folder of images for each class, or with train and test folders of such folders"
)


def images(
    name: str | None = None,
    subset: str | None = None,
    path: str | None = None,
    image: str | None = None,
    label: str | None = None,
    test: str | None = None,
    search_images: Count | None = None,
    split_seed: SplitSeed = 0,
    calibration_images: Count | None = None,
    test_images: Count | None = None,
    size: Count | None = None,
    crop: Share | None = None,
    squash: bool | None = None,
    interpolation: Interpolation | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Data:
    """Labelled images by the name of their dataset, or of class folders.

    Args:
        name: On the hub, or a folder or file of parquet.
        subset: The configuration of a dataset on the hub that has several.
        path: A folder with one folder of images for each class, or with train and test (or val) folders of such folders.
        image: The column of images; the only one where None.
        label: The column of labels; the only one where None.
        test: The part that is the test split; ``test``, else ``validation`` where None.
        search_images: Size of the search split; a tenth of the training images, at most 5,000, where None.
        split_seed: Which training images it consists of. Not the run's seed: runs must be comparable.
        calibration_images: Size of ``train``, where fine-tuning is to read the training images as a stream of random
            crops; None: all training images are decoded into the cache folder.
        test_images: Size of the test split, every class in its share; None for all.
        size: See `Look`; None: images have one size, and keep it.
        crop: See `Look`.
        squash: See `Look`.
        interpolation: See `Look`.
        mean: See `Look`.
        std: See `Look`.

    Raises:
        UserError: Files or columns are missing or several are meant, images cannot be decoded or are of several sizes,
            the hub is out of reach, splits are out of reach, or there is no room for the decoded images.
    """
    source = labelled(_tables(name, path, subset), image, label, test)
    look = _look(source, size, crop, squash, interpolation, mean, std)
    return image_data(
        path or name or "", source, look, Sizes(search_images, split_seed, calibration_images, test_images)
    )


def _tables(name: str | None, path: str | None, subset: str | None) -> Tables:
    if path is not None:
        return read_local(Path(path).expanduser(), _FOLDERS)
    if name is not None:
        return read(name, _WAY_OUT, ("parquet",), subset)
    raise UserError(
        f"data.name or data.path is needed. data=hub: {_WAY_OUT}. data=folder: {_FOLDERS}",
        code="missing",
        field="data",
    )


def _look(
    source: Labelled,
    size: int | None,
    crop: float | None,
    squash: bool | None,
    interpolation: Interpolation | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Look:
    """How the images are prepared; without a size, they keep that of the first one."""
    if size is None:
        (first,) = source.training.decoded([0])
        if first.width != first.height:
            raise UserError(
                f"{{field}} is needed: the images are no squares, the first has {first.width} x {first.height} pixels",
                code="missing",
                field="data.size",
            )
        return Look(first.width, mean=mean or MEAN, std=std or STD)
    return Look(size, crop or 1.0, bool(squash), interpolation or "bilinear", mean or MEAN, std or STD)
