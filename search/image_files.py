"""Encoded images in parquet files, too many to hold in memory: read a few rows at a time.

The layout is that of the dataset hub: a column `image`, struct with bytes, and an integer column `label`. Rows of
several files are counted on, in the order of the files' names.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from amc_env.errors import UserError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image

COLUMNS = ("image", "label")
_TAIL = 8  # bytes at the end of a parquet file: length of the footer, and PAR1


@dataclass(frozen=True)
class EncodedImage:
    """One row.

    Attributes:
        content: The image file's bytes; None where the row has none.
        row: Of all files together.
        place: File and row in it, for messages.
    """

    content: bytes | None
    row: int
    place: str


@dataclass(frozen=True)
class RowGroup:
    """What a parquet file gives at once.

    Attributes:
        file: The file.
        number: Of the group in its file.
        start: Its first row, of all files together.
        offset: Its first row in its file.
        rows: How many it has.
    """

    file: Path
    number: int
    start: int
    offset: int
    rows: int


class ImageFiles:
    """The images of one part of a dataset. Only labels are held; images are read when asked for.

    Args:
        name: What the images are, for messages.
        files: At least one.
        classes: Labels are 0..classes-1.

    Attributes:
        labels: int64 [N].
        groups: The row groups, in order.
        key: SHA-256 of the labels and of the files' footers, which hold the sizes of all their chunks: other
            images have another key, without their being read.

    Raises:
        UserError: Files that are not parquet, lack a column or hold no images; labels that are no classes.
    """

    def __init__(self, name: str, files: Sequence[Path], classes: int):
        groups: list[RowGroup] = []
        labels: list[np.ndarray] = []
        digest = hashlib.sha256()
        for file in files:
            with _opened(file) as opened:
                own = _labels(file, opened, classes)
                groups += _groups_of(file, opened, start=sum(map(len, labels)))
            labels.append(own)
            digest.update(_footer(file) + own.tobytes())
        self.groups = tuple(groups)
        self.labels = torch.from_numpy(np.concatenate(labels))
        self.key = digest.hexdigest()
        if not len(self.labels):
            raise UserError(
                f"{name}: no rows in {len(files)} files, {files[0]} and on; at least one is needed"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def of_group(self, group: RowGroup, rows: Sequence[int] | None = None) -> list[EncodedImage]:
        """Images of one row group: all, or those at ``rows`` of all files together."""
        from pyarrow import parquet

        with parquet.ParquetFile(group.file) as opened:
            table = opened.read_row_group(group.number, columns=["image"], use_threads=False)
        contents = [item for chunk in table.column("image").chunks for item in chunk.field("bytes")]
        return [
            EncodedImage(
                contents[row - group.start].as_py(),
                row,
                f"{group.file.name}, row {group.offset + row - group.start}",
            )
            for row in (range(group.start, group.start + group.rows) if rows is None else rows)
        ]

    def at(self, rows: Tensor) -> Iterator[EncodedImage]:
        """The images at ``rows`` (int64, each once), in rising order; row groups without any are not read."""
        wanted = rows.sort().values
        for group in self.groups:
            first, after = torch.searchsorted(wanted, torch.tensor([group.start, group.start + group.rows]))
            if first < after:
                yield from self.of_group(group, wanted[first:after].tolist())


def decoded(image: EncodedImage) -> Image:
    """The image in red, green and blue.

    Raises:
        UserError: It cannot be decoded.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(image.content or b"")) as opened:
            return opened.convert("RGB")
    except Exception as error:  # Pillow's decoders raise what they like on a broken file
        raise UserError(f"{image.place}: the image cannot be decoded: {first_line(error)}") from error


def _opened(file: Path) -> Any:
    """The file as pyarrow's ParquetFile, with the columns that are needed."""
    import pyarrow as arrow
    from pyarrow import parquet

    try:
        opened = parquet.ParquetFile(file)
    except (OSError, arrow.ArrowException) as error:
        raise UserError(f"{file} is not a parquet file: {first_line(error)}") from error
    schema = opened.schema_arrow
    missing = [name for name in COLUMNS if name not in schema.names]
    if missing:
        raise UserError(
            f"{file}: no column {', '.join(missing)}; needed are {', '.join(COLUMNS)}; "
            f"found {', '.join(schema.names)}"
        )
    kind = schema.field("image").type
    if not arrow.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise UserError(f"{file}: column image is {kind}, not a struct with bytes")
    return opened


def _footer(file: Path) -> bytes:
    with file.open("rb") as raw:
        raw.seek(-_TAIL, io.SEEK_END)
        length = int.from_bytes(raw.read(4), "little")
        raw.seek(-_TAIL - length, io.SEEK_END)
        return raw.read(length)


def _groups_of(file: Path, opened: Any, start: int) -> list[RowGroup]:
    sizes = [opened.metadata.row_group(number).num_rows for number in range(opened.num_row_groups)]
    offsets = [0, *accumulate(sizes)]
    return [
        RowGroup(file, number, start + offsets[number], offsets[number], rows)
        for number, rows in enumerate(sizes)
    ]


def _labels(file: Path, opened: Any, classes: int) -> np.ndarray:
    """Int64 [rows of the file]."""
    column = opened.read(columns=["label"]).column("label")
    if column.null_count:
        raise UserError(f"{file}: {column.null_count} rows of column label have no value")
    values = column.to_numpy()
    if not np.issubdtype(values.dtype, np.integer):
        raise UserError(f"{file}: column label holds {column.type}, not integers")
    outside = np.flatnonzero((values < 0) | (values >= classes))
    if len(outside):
        raise UserError(
            f"{file}: {len(outside)} labels outside 0..{classes - 1}, "
            f"the first is {values[outside[0]]} at row {outside[0]}"
        )
    return values.astype(np.int64)
