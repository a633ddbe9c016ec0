"""ImageNet (ILSVRC 2012): 1.28 million training images that stay on the disk, encoded.

What is scored or calibrated on is decoded once and mapped from the cache folder; fine-tuning reads the training images
as a stream. The validation images, whose labels are published, are the test split.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from amc_env.errors import UserError, first_line
from search.data import Data, Split, check_scaling, stratified
from search.files import cache_folder, write
from search.image_files import EncodedImage, ImageFiles, decoded
from search.image_stream import SIZE, ImageStream

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

HUB = "ILSVRC/imagenet-1k"
DEFAULT_SEARCH = 3000
RESIZED = 256
_IMAGE_BYTES = 3 * SIZE * SIZE
_AT_ONCE = 256  # images that are in memory, encoded, while they are decoded
# The way out that every message about the source ends with.
_LOCAL_FILES = "data.path=DIR with train-*.parquet and validation-*.parquet (columns image, label) is the way without the hub"


def imagenet(
    path: str | None = None,
    search_images: int | None = None,
    split_seed: int = 0,
    calibration_images: int = 4096,
    test_images: int | None = None,
    classes: int = 1000,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
) -> Data:
    """ImageNet from local parquet files, or from the dataset hub where no path is given.

    Images that are not trained on have their shorter side resized to 256 pixels and 224 x 224 cut from the middle.

    Args:
        path: Folder with train-*.parquet and validation-*.parquet (columns ``image``: struct with bytes, and
            ``label``), or with a folder ``data`` that has them.
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
    folder = _hub_folder() if path is None else _local_folder(Path(path))
    training, validation = (
        ImageFiles(f"imagenet {part}", _files(folder, part), classes) for part in ("train", "validation")
    )
    log.info(
        "imagenet: %s training and %s validation images in %s",
        f"{len(training):,}",
        f"{len(validation):,}",
        folder,
    )
    searched = DEFAULT_SEARCH if search_images is None else search_images
    _check_sizes(len(training), len(validation), searched, calibration_images, test_images)
    order = stratified(training.labels, split_seed)
    # From both ends: another size of one leaves the other as it is.
    search, calibration = order[:searched].sort().values, order[-calibration_images:].sort().values
    test = stratified(validation.labels, 0)[:test_images].sort().values
    pixels = _pixels("training", training, torch.cat([calibration, search]))
    return Data(
        name="imagenet",
        train=Split(pixels[:calibration_images], training.labels[calibration]),
        search=Split(pixels[calibration_images:], training.labels[search]),
        test=Split(_pixels("validation", validation, test), validation.labels[test]),
        classes=tuple(str(label) for label in range(classes)),
        mean=tuple(mean),
        std=tuple(std),
        augment=True,
        fingerprint=_key(training, calibration, training, search, validation, test)[:16],
        stream=partial(ImageStream, training, search, mean, std),
    )


def centre_crop(picture: Image) -> np.ndarray:
    """Uint8 [3, 224, 224]: the shorter side resized to 256 pixels, then the middle."""
    from PIL.Image import Resampling

    short = min(picture.size)
    size = tuple(RESIZED * side // short for side in picture.size)
    left, top = (round((side - SIZE) / 2) for side in size)
    resized = picture.resize(size, Resampling.BILINEAR)
    return np.asarray(resized.crop((left, top, left + SIZE, top + SIZE))).transpose(2, 0, 1)


def _local_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"data.path={folder}: no such folder; {_LOCAL_FILES}")
    within = folder / "data"  # of a copy of the hub's repository
    return within if within.is_dir() and not any(folder.glob("train-*.parquet")) else folder


def _hub_folder() -> Path:
    """The published files, downloaded once into the hub's own cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    log.info("imagenet: %s is downloaded where it is not there yet: some 160 GB", HUB)
    patterns = [f"data/{part}-*.parquet" for part in ("train", "validation")]
    try:
        return Path(snapshot_download(HUB, repo_type="dataset", allow_patterns=patterns)) / "data"
    except GatedRepoError as error:
        raise UserError(
            f"{HUB} is given out to those who agree to ImageNet's terms: do so at "
            f"https://huggingface.co/datasets/{HUB}, and log in with `hf auth login` or HF_TOKEN; {_LOCAL_FILES}"
        ) from error
    except Exception as error:  # the hub's client raises its own, the network's and the file system's errors
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"the dataset hub did not give {HUB} ({reason}); {_LOCAL_FILES}") from error


def _files(folder: Path, part: str) -> list[Path]:
    files = sorted(folder.glob(f"{part}-*.parquet"))
    if not files:
        raise UserError(f"data.path={folder}: no {part}-*.parquet in it; {_LOCAL_FILES}")
    return files


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


def _key(*parts: ImageFiles | Tensor) -> str:
    """Hex digits that stand for the pixels of rows of files."""
    digest = hashlib.sha256(f"{RESIZED} {SIZE};".encode())
    for part in parts:
        digest.update(part.key.encode() if isinstance(part, ImageFiles) else part.numpy().tobytes() + b"|")
    return digest.hexdigest()


def _pixels(name: str, files: ImageFiles, rows: Tensor) -> Tensor:
    """Centre crops of the images at ``rows``, uint8 [N, 3, 224, 224], mapped from a file: they need no memory.

    The file is made where there is none.
    """
    file = cache_folder() / "data" / f"imagenet-{_key(files, rows)[:32]}.npy"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        size, free = len(rows) * _IMAGE_BYTES, shutil.disk_usage(file.parent).free
        if size > free:
            raise UserError(
                f"the {len(rows)} decoded {name} images need {size / 1e9:.1f} GB in {file.parent}, where "
                f"{free / 1e9:.1f} GB are free: point PRUNING_CACHE at another folder, or lower data.test_images"
            )
        log.info("decoding %s %s images, once: %.1f GB in %s", f"{len(rows):,}", name, size / 1e9, file)
        write(file, partial(_decode, files, rows))
    return torch.from_numpy(np.load(file, mmap_mode="c"))


def _decode(files: ImageFiles, rows: Tensor, path: Path) -> None:
    """Write a file of the images at ``rows``, in that order."""
    pixels = np.lib.format.open_memmap(path, "w+", np.uint8, (len(rows), 3, SIZE, SIZE))
    images = zip(files.at(rows), rows.argsort().tolist(), strict=True)

    def decode(image: EncodedImage, place: int) -> None:
        pixels[place] = centre_crop(decoded(image))

    with ThreadPoolExecutor() as threads:
        while some := list(islice(images, _AT_ONCE)):
            for _ in threads.map(decode, *zip(*some, strict=True)):
                pass
    pixels.flush()
