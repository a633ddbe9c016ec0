"""ImageNet's splits are disjoint and fixed; its training images are streamed, cropped and flipped by a seed."""

import io
import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from image_parquets import grey, photos, write_part
from omegaconf import OmegaConf
from PIL import Image
from refusals import refused

from amc_env.errors import UserError
from search.data.base import Data, Split
from search.data.crops import _part, random_crop
from search.data.imagenet import CROP, SIZE, imagenet
from search.data.look import Look

CONF = Path(__file__).parents[3] / "conf" / "data" / "imagenet.yaml"
IMAGES = [grey(6 * row) for row in range(40)]  # the shade tells the row
LABELS = [row % 10 for row in range(40)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forty training images of one shade each in two files, twenty photos for validation, and an empty cache."""
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source"
    source.mkdir()
    write_part(source, IMAGES[:20], LABELS[:20])
    write_part(source, IMAGES[20:], LABELS[20:], shard=1)
    write_part(source, photos(20), LABELS[:20], part="validation")
    return source


def read(folder: Path, search: int = 10, calibration: int = 20, **options: Any) -> Data:
    options = {"classes": 10, **options}
    return imagenet(str(folder), search_images=search, calibration_images=calibration, **options)


def rows(split: Split) -> list[int]:
    return (split.inputs[:, 0, 0, 0] // 6).tolist()


def epoch(batches: Any) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_splits_are_disjoint_fixed_and_have_their_labels(folder: Path) -> None:
    data, again, other = read(folder), read(folder), read(folder, split_seed=1)
    assert len({*rows(data.search), *rows(data.train)}) == 30
    for split in (data.search, data.train):
        assert split.targets.tolist() == [LABELS[row] for row in rows(split)]
        assert len(set(split.targets.bincount().tolist())) == 1
    assert data.image_shape == (3, SIZE, SIZE)
    assert data.fingerprint == again.fingerprint != other.fingerprint
    smaller = read(folder, search=5)
    assert set(rows(smaller.search)) < set(rows(data.search))
    assert rows(smaller.train) == rows(data.train)


def test_the_validation_images_are_the_test_split(folder: Path) -> None:
    data, half = read(folder), read(folder, test_images=10)
    assert data.test is not None
    assert half.test is not None
    assert data.test.targets.tolist() == LABELS[:20]
    for image, content in zip(data.test.inputs, photos(20), strict=True):
        expected = np.asarray(Look(SIZE, CROP)(Image.open(io.BytesIO(content))))
        assert np.array_equal(image.numpy(), expected.transpose(2, 0, 1))
    assert half.test.targets.bincount().tolist() == [1] * 10


def test_one_folder_per_class_is_read_with_its_labels(folder: Path, tmp_path: Path) -> None:
    for part, images in (("train", IMAGES), ("val", photos(20))):
        for row, content in enumerate(images):
            file = tmp_path / "folders" / part / f"n{row % 10}" / f"{row:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    found = read(tmp_path / "folders")
    assert found.search.targets.tolist() == [row % 10 for row in rows(found.search)]
    assert found.test is not None
    assert len(found.test) == 20


def test_an_epoch_has_every_image_once_but_the_search_split(folder: Path) -> None:
    data = read(folder)
    assert data.stream is not None
    images, labels = epoch(data.stream(6, 0))
    assert images.shape == (30, 3, SIZE, SIZE)
    found = ((images[:, 0, 0, 0] * data.std[0] + data.mean[0]) * 255 / 6).round().to(torch.int64).tolist()
    assert sorted(found) == sorted(set(range(40)) - set(rows(data.search)))
    assert labels.tolist() == [LABELS[row] for row in found]
    assert len(data.stream(8, 0)) == 3  # type: ignore[arg-type]
    assert len(data.stream(64, 0)) == 1  # type: ignore[arg-type]
    with refused("out_of_range", "batch_size"):
        data.stream(0, 0)


def test_a_seed_fixes_the_order_and_the_crops(folder: Path) -> None:
    write_part(folder, photos(20, seed=5), LABELS[:20])
    stream = read(folder).stream
    assert stream is not None
    before = torch.get_rng_state()
    first, again = stream(8, 3), stream(8, 3)
    epochs = [epoch(first), epoch(first)]
    for images, labels in epochs:
        repeated = epoch(again)
        assert torch.equal(labels, repeated[1])
        assert torch.equal(images, repeated[0])
    assert not torch.equal(epochs[0][0], epochs[1][0])
    assert not torch.equal(epochs[0][0], epoch(stream(8, 4))[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_option_gives_it(folder: Path) -> None:
    option = OmegaConf.load(CONF)
    option.path, option.classes, option.calibration_images = str(folder), 10, 20
    assert instantiate(option, search_images=10).fingerprint == read(folder).fingerprint


def eps() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "EPS")
    return buffer.getvalue()


@pytest.mark.parametrize("content", [b"not an image", photos(1)[0][:200], None, eps()])
def test_what_is_no_image_of_the_allowed_formats_is_refused(folder: Path, content: bytes | None) -> None:
    write_part(folder, [content, *photos(19)], LABELS[:20], part="validation")
    with pytest.raises(UserError, match="row 0 cannot be decoded") as caught:
        read(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"classes": 9},
        {"search": 0},
        {"calibration": 0},
        {"search": 20, "calibration": 21},
        {"test_images": 0},
        {"test_images": 21},
        {"std": (0.2, 0.0, 0.2)},
    ],
)
def test_options_out_of_reach_are_refused(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        read(folder, **options)


def test_without_the_hub_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**_: Any) -> None:
        raise ConnectionError("no route\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", refused)
    with pytest.raises(UserError, match=r"imagenet-1k.*no route.*data.path=DIR") as caught:
        imagenet()
    assert "\n" not in str(caught.value)


def test_the_middle_is_cut_out_after_resizing_the_shorter_side() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (256, 512, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(Look(SIZE, CROP)(Image.fromarray(pixels))), pixels[16:240, 144:368])
    assert Look(SIZE, CROP)(Image.fromarray(pixels[:100, :130])).size == (SIZE, SIZE)


def test_crops_have_areas_and_ratios_of_the_allowed_range() -> None:
    generator = random.Random(0)
    left, top, width, height = np.array([_part(500, 375, generator) for _ in range(2000)]).T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left + width <= 500).all()
    assert (top + height <= 375).all()
    shares, ratios = width * height / (500 * 375), width / height
    assert 0.078 < shares.min() < 0.1
    assert 0.95 < shares.max() <= 1.0
    assert 0.74 < ratios.min() < 0.76
    assert 1.32 < ratios.max() < 1.35
    assert _part(10, 400, generator) == (0, 193, 10, 13)
    assert random_crop(Image.fromarray(np.zeros((3, 2, 3), np.uint8)), SIZE, generator).shape == (
        3,
        SIZE,
        SIZE,
    )
