"""Labelled images read with the `datasets` library: from the hub, from parquet files or from one folder per class."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from amc_env.errors import UserError, first_line
from search import files

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # without EPS, for which Pillow starts Ghostscript
_AT_ONCE = 256  # encoded images in memory while they are decoded

datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs errors that it raises as well
datasets.disable_progress_bars()  # the terminal belongs to the display of the run


class Images:
    """One part of a dataset; images stay encoded on the disk until they are read.

    Attributes:
        labels: int64 [N], in 0..classes-1.

    Args:
        name: Named in errors.
        table: The rows.
        image: The image column.
        classes: Number of classes.
        by_path: Whether rows may name an image file. True for class folders only: a dataset file of somebody else's
            must not choose which files are opened.

    Raises:
        UserError: Columns missing or of another type, no rows, labels outside the classes.
    """

    def __init__(
        self, name: str, table: datasets.Dataset, image: str, classes: int, *, by_path: bool = False
    ):
        missing = [column for column in (image, "label") if column not in table.column_names]
        if missing:
            found = ", ".join(table.column_names)
            raise UserError(
                f"{name}: no column {', '.join(missing)}; needed are {image}, label; found {found}"
            )
        self.name = name
        self.labels = _labels(name, table, classes)
        with files.reading(f"{name}: column {image}", "it must hold images"):
            self._table = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        self._column = image
        self._by_path = by_path
        self._key = table._fingerprint

    def __len__(self) -> int:
        return len(self.labels)

    def decoded(self, rows: Sequence[int]) -> list[Image.Image]:
        """The images at `rows` in RGB, decoded by several threads.

        Raises:
            UserError: An image that cannot be decoded.
        """
        with ThreadPoolExecutor() as threads:
            return list(threads.map(self._decode, rows, self._table[rows][self._column]))

    def pixels(self, rows: Tensor, size: int, prepare: Callable[[Image.Image], Image.Image]) -> Tensor:
        """The images at `rows` after `prepare`, uint8 [N, 3, size, size], mapped from the cache folder.

        Raises:
            UserError: An image that cannot be decoded or has another size; no room in the cache folder, which
                PRUNING_CACHE moves.
        """
        key = hashlib.sha256(f"{self._key} {prepare.__qualname__} {size}".encode() + rows.numpy().tobytes())
        file = files.cache_folder() / "data" / f"pixels-{key.hexdigest()[:32]}.npy"
        shape = (len(rows), 3, size, size)
        write = partial(self._write, rows.tolist(), size, prepare)
        return files.cached(file, write, lambda path: _mapped(path, shape))

    def _write(self, rows: list[int], size: int, prepare: Callable[..., Any], file: Path) -> None:
        with file.open("wb") as out:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(rows), 3, size, size)}
            np.lib.format.write_array_header_1_0(out, header)
            for start in range(0, len(rows), _AT_ONCE):
                some = rows[start : start + _AT_ONCE]
                for row, picture in zip(some, self.decoded(some), strict=True):
                    ready = prepare(picture)
                    if ready.size != (size, size):
                        raise UserError(
                            f"{self.name}: the image of row {row} has {ready.size} pixels, needed are {(size, size)}"
                        )
                    out.write(np.asarray(ready).transpose(2, 0, 1).tobytes())

    def _decode(self, row: int, item: dict[str, Any]) -> Image.Image:
        try:
            if item["bytes"] is None and not self._by_path:
                raise ValueError("the row has no bytes")
            source = item["path"] if item["bytes"] is None else io.BytesIO(item["bytes"])
            with Image.open(source, formats=FORMATS) as opened:
                return opened.convert("RGB")
        except Exception as error:  # Pillow's decoders raise many types on a broken file
            raise UserError(
                f"{self.name}: the image of row {row} cannot be decoded: {first_line(error)}",
                code="unreadable",
            ) from error


def _mapped(path: Path, shape: tuple[int, ...]) -> Tensor:
    """The uint8 pixels of a cached file."""
    pixels = np.load(path, mmap_mode="c")
    if pixels.shape != shape or pixels.dtype != np.uint8:
        raise ValueError(f"it holds {pixels.dtype} {pixels.shape}, not uint8 {shape}")
    return torch.from_numpy(pixels)


def read(hub: str, path: str | None, held_out: str, image: str, classes: int) -> tuple[Images, Images]:
    """(training, held-out) images of a hub dataset or of a local folder.

    Args:
        hub: The dataset's name on the hub, read where `path` is None.
        path: Folder with train-*.parquet and `held_out`-*.parquet, or with train/ and val/ of one folder per class.
        held_out: The name of the held-out part.
        image: The name of the image column.
        classes: Labels are 0..classes-1.

    Raises:
        UserError: Hub out of reach, files missing or of another kind, and as `Images`.
    """
    way_out = (
        f"data.path=DIR with train-*.parquet and {held_out}-*.parquet (columns {image}, label) needs no hub"
    )
    data_files = {"train": "**/train-*.parquet", "test": f"**/{held_out}-*.parquet"}
    options: dict[str, Any] = {"path": hub, "data_files": data_files}
    if path is not None:
        options = _local(Path(path), data_files, way_out)
    with files.reading(path or hub, way_out):
        parts = datasets.load_dataset(**options)
    folders = options["path"] == "imagefolder"
    column = "image" if folders else image
    train, test = (
        Images(f"{path or hub} {part}", parts[part], column, classes, by_path=folders) for part in data_files
    )
    return train, test


def _local(folder: Path, patterns: dict[str, str], way_out: str) -> dict[str, Any]:
    """What `load_dataset` needs for a local folder; its copies go to our cache folder."""
    if not folder.is_dir():
        raise UserError(f"data.path={folder}: no such folder; {way_out}")
    kind = "parquet"
    data_files = {part: sorted(map(str, folder.glob(pattern))) for part, pattern in patterns.items()}
    if (folder / "train").is_dir() and (folder / "val").is_dir() and not any(data_files.values()):
        kind, data_files = "imagefolder", {"train": [f"{folder}/train/**"], "test": [f"{folder}/val/**"]}
    missing = [patterns[part] for part, found in data_files.items() if not found]
    if missing:
        raise UserError(f"data.path={folder}: no {', '.join(missing)} in it; {way_out}")
    return {"path": kind, "data_files": data_files, "cache_dir": str(files.cache_folder() / "datasets")}


def _labels(name: str, table: datasets.Dataset, classes: int) -> Tensor:
    if not len(table):
        raise UserError(f"{name} is empty: at least one image is needed")
    column = table.select_columns(["label"]).with_format("arrow")[:]["label"]
    if column.null_count:
        raise UserError(f"{name}: {column.null_count} rows of column label have no value")
    values = column.to_numpy()
    if not np.issubdtype(values.dtype, np.integer):
        raise UserError(f"{name}: column label holds {column.type}, not integers")
    outside = np.flatnonzero((values < 0) | (values >= classes))
    if len(outside):
        raise UserError(
            f"{name}: {len(outside)} labels outside 0..{classes - 1}, "
            f"the first is {values[outside[0]]} at row {outside[0]}"
        )
    return torch.from_numpy(values.astype(np.int64))
