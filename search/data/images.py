"""Labelled images that stay encoded on the disk until they are read, and are decoded once into the cache folder."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from amc_env.errors import UserError, first_line
from search import files
from search.data.library import datasets
from search.data.look import Look

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # without EPS, for which Pillow starts Ghostscript
_SMALL = 2**29  # bytes of pixels that are copied from the cache instead of mapped
_AT_ONCE = 256  # encoded images in memory while they are decoded


class Images:
    """One part of a dataset; images stay encoded on the disk until they are read.

    Attributes:
        labels: int64 [N], in 0..classes-1.

    Args:
        name: Named in errors.
        table: The rows.
        image: The image column.
        labels: Of the rows, int64 [N].
        by_path: Whether rows may name an image file. True for class folders only: a dataset file of somebody else's
            must not choose which files are opened.

    Raises:
        UserError: The column is missing or holds no images.
    """

    def __init__(
        self, name: str, table: datasets.Dataset, image: str, labels: Tensor, *, by_path: bool = False
    ):
        if image not in table.column_names:
            found = ", ".join(table.column_names)
            raise UserError(f"{name}: no column {image}; found {found}", code="missing_column")
        self.name = name
        self.labels = labels
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

    def pixels(self, rows: Tensor, look: Look) -> Tensor:
        """The images at `rows` in one size, uint8 [N, 3, size, size], from the cache folder.

        Small datasets are decoded as a whole, so that other rows of them are there already; of large ones the rows alone,
        which are mapped.

        Raises:
            UserError: An image that cannot be decoded or has another size; no room in the cache folder, which
                PRUNING_CACHE moves.
        """
        if len(rows) < len(self) and len(self) * 3 * look.size**2 <= _SMALL:
            return self.pixels(torch.arange(len(self)), look)[rows]
        key = hashlib.sha256(f"{self._key} {look.key}".encode() + rows.numpy().tobytes())
        file = files.cache_folder() / "data" / f"pixels-{key.hexdigest()[:32]}.npy"
        shape = (len(rows), 3, look.size, look.size)
        write = partial(self._write, rows.tolist(), look)
        return files.cached(file, write, lambda path: _mapped(path, shape))

    def _write(self, rows: list[int], look: Look, file: Path) -> None:
        size = look.size
        with file.open("wb") as out:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(rows), 3, size, size)}
            np.lib.format.write_array_header_1_0(out, header)
            for start in range(0, len(rows), _AT_ONCE):
                some = rows[start : start + _AT_ONCE]
                for row, picture in zip(some, self.decoded(some), strict=True):
                    ready = look(picture)
                    if ready.size != (size, size):
                        raise UserError(
                            f"{self.name}: the image of row {row} has {ready.size} pixels, needed are {(size, size)}; "
                            "data=hub and data=folder bring images to data.size",
                            code="image_size",
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
