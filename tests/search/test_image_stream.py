"""The stream gives every image once an epoch, in an order and in crops that its seed fixes."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from image_parquets import grey, photos, write_part
from PIL import Image

from amc_env.errors import UserError
from search import image_stream
from search.image_files import ImageFiles
from search.image_stream import SIZE, ImageStream, _part, random_crop

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
LEFT_OUT = torch.tensor([0, 7, 39])


@pytest.fixture
def files(tmp_path: Path) -> ImageFiles:
    """Forty images in eight groups of two files; an image's label is its row."""
    paths = [
        write_part(tmp_path, photos(20, seed=shard), range(20 * shard, 20 * shard + 20), shard=shard)
        for shard in (0, 1)
    ]
    return ImageFiles("these", paths, classes=40)


def stream(files: ImageFiles, batch_size: int = 8, seed: int = 0, **options: int) -> ImageStream:
    return ImageStream(files, LEFT_OUT, MEAN, STD, batch_size, seed, **options)


def epoch(batches: ImageStream) -> tuple[torch.Tensor, torch.Tensor]:
    """All images and labels of one."""
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("shuffled", [1, 12, 4096])
def test_an_epoch_has_every_image_once_but_those_left_out(files: ImageFiles, shuffled: int) -> None:
    _, labels = epoch(stream(files, batch_size=1, shuffled=shuffled))
    assert sorted(labels.tolist()) == sorted(set(range(40)) - {0, 7, 39})


def test_the_incomplete_last_batch_is_left_out(files: ImageFiles) -> None:
    batches = stream(files, batch_size=8)
    shapes = [(images.shape, images.dtype, labels.shape, labels.dtype) for images, labels in batches]
    assert shapes == [((8, 3, 224, 224), torch.float32, (8,), torch.int64)] * 4
    assert len(batches) == 4


def test_fewer_images_than_a_batch_are_one_batch(files: ImageFiles) -> None:
    batches = stream(files, batch_size=64)
    assert len(batches) == 1
    assert [len(labels) for _, labels in batches] == [37]


def test_a_seed_gives_the_same_epochs_and_each_is_another(files: ImageFiles) -> None:
    before = torch.get_rng_state()
    first, again = stream(files, seed=3), stream(files, seed=3)
    epochs = [epoch(first), epoch(first)]
    for images, labels in epochs:
        repeated = epoch(again)
        assert torch.equal(labels, repeated[1])
        assert torch.equal(images, repeated[0])
    assert not torch.equal(epochs[0][1], epochs[1][1])
    assert not torch.equal(epochs[0][1], epoch(stream(files, seed=4))[1])
    assert torch.equal(torch.get_rng_state(), before)


def test_an_image_is_cropped_anew_in_every_epoch(files: ImageFiles) -> None:
    batches = stream(files, batch_size=37)
    crops = [images[labels == 5] for images, labels in (epoch(batches), epoch(batches))]
    assert not torch.equal(*crops)


def test_the_number_of_threads_changes_nothing(files: ImageFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    many = epoch(stream(files))
    monkeypatch.setattr(image_stream, "ThreadPoolExecutor", lambda: ThreadPoolExecutor(1))
    assert all(torch.equal(a, b) for a, b in zip(many, epoch(stream(files)), strict=True))


def test_images_of_a_part_of_the_files_are_shuffled_together(files: ImageFiles) -> None:
    _, labels = epoch(stream(files, batch_size=1, shuffled=1))
    groups = torch.div(labels, 5, rounding_mode="floor").tolist()
    runs = [group for place, group in enumerate(groups) if place == 0 or groups[place - 1] != group]
    assert sorted(runs) == list(range(8))  # one group after the other,
    assert runs != list(range(8))  # in random order,
    assert labels.tolist() != sorted(labels.tolist(), key=lambda label: (runs.index(label // 5), label))


def test_pixels_are_normalised(tmp_path: Path) -> None:
    shades = [0, 51, 255, 102]
    files = ImageFiles("these", [write_part(tmp_path, [grey(s) for s in shades], range(4))], classes=4)
    images, labels = epoch(ImageStream(files, torch.tensor([], dtype=torch.int64), MEAN, STD, 2, 0))
    for image, label in zip(images, labels.tolist(), strict=True):
        expected = (shades[label] / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
        assert torch.allclose(image, expected.view(3, 1, 1).expand(3, SIZE, SIZE), atol=1e-6)


def test_an_image_that_cannot_be_decoded_ends_the_epoch(tmp_path: Path) -> None:
    images = [*photos(8), b"nothing of the kind"]
    files = ImageFiles("these", [write_part(tmp_path, images, range(9))], classes=9)
    with pytest.raises(UserError, match=r"train-00000-of-00002.parquet, row 8: the image cannot be decoded"):
        epoch(ImageStream(files, torch.tensor([0]), MEAN, STD, 4, 0))


def test_an_epoch_that_is_left_early_leaves_no_threads(files: ImageFiles) -> None:
    before = threading.active_count()
    batches = iter(stream(files, batch_size=2))
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


def test_batches_that_cannot_be_are_refused(files: ImageFiles) -> None:
    with pytest.raises(UserError, match="finetune.batch_size=0: at least 1"):
        stream(files, batch_size=0)
    with pytest.raises(UserError, match="all 40 training images are split off"):
        ImageStream(files, torch.arange(40), MEAN, STD, 8, 0)


# ----------------------------------------------------------------------------------------------------- crops


class Fixed(random.Random):
    """Draws the whole of an image, and the given number for the flip."""

    def __init__(self, flip: float) -> None:
        super().__init__(0)
        self.flip = flip

    def uniform(self, a: float, b: float) -> float:
        return b if b == 1.0 else 0.0  # of the area all, of the ratio's logarithm none

    def random(self) -> float:
        return self.flip


@pytest.mark.parametrize(("flip", "step"), [(0.49, -1), (0.5, 1)])
def test_a_crop_of_the_whole_image_is_the_image_or_its_mirror_image(flip: float, step: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    found = random_crop(Image.fromarray(pixels), Fixed(flip))
    assert np.array_equal(found, pixels.transpose(2, 0, 1)[:, :, ::step])


def test_crops_have_areas_and_ratios_of_the_allowed_range() -> None:
    draw = random.Random(0)
    parts = np.array([_part(500, 375, draw) for _ in range(2000)])
    left, top, width, height = parts.T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left + width <= 500).all()
    assert (top + height <= 375).all()
    shares, ratios = width * height / (500 * 375), width / height
    assert 0.078 < shares.min() < 0.1
    assert 0.95 < shares.max() <= 1.0
    assert 0.74 < ratios.min() < 0.76
    assert 1.32 < ratios.max() < 1.35
    assert left.max() > 250
    assert top.max() > 200


@pytest.mark.parametrize(("size", "expected"), [((10, 400), (0, 193, 10, 13)), ((400, 12), (192, 0, 16, 12))])
def test_of_a_very_long_image_the_middle_is_taken(
    size: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    assert _part(*size, random.Random(0)) == expected


def test_images_of_any_size_fill_the_crop() -> None:
    image = Image.fromarray(np.zeros((3, 2, 3), dtype=np.uint8))
    assert random_crop(image, random.Random(1)).shape == (3, SIZE, SIZE)
