"""Small parquet files of encoded images in tests, with the columns of the published ImageNet."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

IMAGES = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def encoded(pixels: np.ndarray, format: str = "PNG") -> bytes:
    """An image file of uint8 [H, W] or [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def grey(value: int, height: int = 30, width: int = 40) -> bytes:
    """An image of one shade, which every crop leaves as it is."""
    return encoded(np.full((height, width, 3), value, dtype=np.uint8))


def photos(count: int, seed: int = 0) -> list[bytes]:
    """Random JPEGs of varying sizes."""
    random = np.random.default_rng(seed)
    sizes = random.integers(20, 60, (count, 2))
    return [encoded(random.integers(0, 256, (*size, 3), dtype=np.uint8), "JPEG") for size in sizes]


def write_part(
    folder: Path,
    images: Sequence[bytes | None],
    labels: Sequence[Any],
    part: str = "train",
    shard: int = 0,
    row_group: int = 5,
) -> Path:
    """One file of a part; a row group of it has `row_group` rows."""
    column = pa.array([{"bytes": image, "path": "x.JPEG"} for image in images], IMAGES)
    file = folder / f"{part}-{shard:05d}-of-00002.parquet"
    parquet.write_table(
        pa.table({"image": column, "label": pa.array(labels)}), file, row_group_size=row_group
    )
    return file
