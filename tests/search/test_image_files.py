"""Rows of several files are read by their number, a row group at a time; what is wrong with a file is said."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from image_parquets import encoded, grey, photos, write_part
from pyarrow import parquet

from amc_env.errors import UserError
from search.image_files import EncodedImage, ImageFiles, decoded

FIRST, SECOND = photos(12, seed=0), photos(7, seed=1)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Twelve images in groups of 5, 5 and 2, and seven in groups of 5 and 2; labels 0 to 18."""
    return [write_part(tmp_path, FIRST, range(12)), write_part(tmp_path, SECOND, range(12, 19), shard=1)]


@pytest.fixture
def files(paths: list[Path]) -> ImageFiles:
    return ImageFiles("these", paths, classes=19)


def test_rows_are_counted_through_all_files(files: ImageFiles) -> None:
    assert len(files) == 19
    assert files.labels.tolist() == list(range(19))
    assert [(group.start, group.offset, group.rows) for group in files.groups] == [
        (0, 0, 5),
        (5, 5, 5),
        (10, 10, 2),
        (12, 0, 5),
        (17, 5, 2),
    ]


def test_images_are_given_in_rising_order_with_their_place(files: ImageFiles) -> None:
    found = list(files.at(torch.tensor([18, 3, 12, 4])))
    assert [image.row for image in found] == [3, 4, 12, 18]
    assert [image.content for image in found] == [FIRST[3], FIRST[4], SECOND[0], SECOND[6]]
    assert found[3].place == "train-00001-of-00002.parquet, row 6"


def test_only_groups_that_are_needed_are_read(files: ImageFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    of_group = files.of_group

    def watched(group: Any, rows: Any = None) -> list[EncodedImage]:
        read.append(group.start)
        return of_group(group, rows)

    monkeypatch.setattr(files, "of_group", watched)
    assert [image.row for image in files.at(torch.tensor([17, 9, 5]))] == [5, 9, 17]
    assert read == [5, 17]


def test_the_key_is_that_of_the_content(files: ImageFiles, tmp_path: Path) -> None:
    def key(images: list[bytes], labels: list[int]) -> str:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        whole = [write_part(folder, images, labels), write_part(folder, SECOND, range(12, 19), shard=1)]
        return ImageFiles("these", whole, classes=19).key

    labels = list(range(12))
    assert key(FIRST, labels) == files.key
    assert key([*FIRST[:11], grey(3)], labels) != files.key
    assert key(FIRST, [*labels[:11], 3]) != files.key


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            [0, 1000, -1],
            r"train-00000-of-00002.parquet: 2 labels outside 0..999, the first is 1000 at row 1",
        ),
        ([0, None, 1], "1 rows of column label have no value"),
        (["a", "b", "c"], "column label holds string, not integers"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path: Path, labels: list[Any], message: str) -> None:
    file = write_part(tmp_path, photos(3), labels)
    with pytest.raises(UserError, match=message):
        ImageFiles("these", [file], classes=1000)


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "train-0.parquet"
    cases = {
        "no column image; needed are image, label; found img, label": pa.table({"img": [1], "label": [1]}),
        "column image is binary, not a struct with bytes": pa.table({"image": [b"x"], "label": [1]}),
        "these: no rows in 1 files": pa.table(
            {"image": pa.array([], pa.struct([("bytes", pa.binary())])), "label": pa.array([], pa.int64())}
        ),
    }
    for message, table in cases.items():
        parquet.write_table(table, file)
        with pytest.raises(UserError, match=message):
            ImageFiles("these", [file], classes=10)
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"train-0.parquet is not a parquet file"):
        ImageFiles("these", [file], classes=10)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF"])
def test_grey_images_are_decoded_to_three_channels(format: str) -> None:
    image = decoded(EncodedImage(encoded(np.full((4, 6), 77, dtype=np.uint8), format), 0, "here"))
    assert np.array_equal(np.asarray(image), np.full((4, 6, 3), 77))


@pytest.mark.parametrize("content", [b"not an image", FIRST[0][:200], None])
def test_an_image_that_cannot_be_decoded_is_named(content: bytes | None) -> None:
    with pytest.raises(UserError, match="train-3.parquet, row 8: the image cannot be decoded: ."):
        decoded(EncodedImage(content, 0, "train-3.parquet, row 8"))
