"""ImageNet's splits are disjoint, fixed and decoded once; the rest of it is streamed."""

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from hydra.utils import instantiate
from image_parquets import encoded, grey, photos, write_part
from omegaconf import OmegaConf
from PIL import Image

from amc_env.errors import UserError
from search import imagenet as module
from search.data import Data, Split
from search.imagenet import centre_crop, imagenet
from search.training.batches import training_batches

CONF = Path(__file__).parents[2] / "conf" / "data" / "imagenet.yaml"
SHADES = range(0, 240, 6)  # of 40 training images: a row's shade is six times its number
LABELS = [row % 10 for row in range(40)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forty training images of one shade each in two files, twenty photos for validation, and an empty cache."""
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source"
    source.mkdir()
    images = [grey(shade) for shade in SHADES]
    for shard in (0, 1):
        half = slice(20 * shard, 20 * shard + 20)
        write_part(source, images[half], LABELS[half], shard=shard)
    write_part(source, photos(20), LABELS[:20], part="validation")
    return source


def read(folder: Path, search: int = 10, calibration: int = 20, **options: Any) -> Data:
    options = {"classes": 10, **options}
    return imagenet(str(folder), search_images=search, calibration_images=calibration, **options)


def rows(split: Split) -> list[int]:
    """Which training images a split has; each is of one shade."""
    shades = split.images.flatten(1)
    assert torch.equal(shades.amin(1), shades.amax(1))
    return (shades[:, 0] // 6).tolist()


def pairs(split: Split) -> Iterator[tuple[torch.Tensor, int]]:
    return zip(split.images, split.labels.tolist(), strict=True)


# --------------------------------------------------------------------------------------------------- splits


def test_splits_are_disjoint_and_have_their_labels(folder: Path) -> None:
    data = read(folder)
    search, train = rows(data.search), rows(data.train)
    assert (len(search), len(train)) == (10, 20)
    assert len({*search, *train}) == 30
    for split, found in ((data.search, search), (data.train, train)):
        assert split.labels.tolist() == [LABELS[row] for row in found]
        assert split.labels.bincount().tolist() == [len(found) // 10] * 10
    assert data.image_shape == (3, 224, 224)
    assert len(data.classes) == 10


def test_splits_are_fixed_by_their_seed_alone(folder: Path) -> None:
    first, again, other = read(folder), read(folder), read(folder, split_seed=1)
    assert rows(first.search) == rows(again.search)
    assert first.fingerprint == again.fingerprint
    assert rows(first.search) != rows(other.search)
    assert first.fingerprint != other.fingerprint
    smaller = read(folder, search=5)
    assert set(rows(smaller.search)) < set(rows(first.search))
    assert rows(smaller.train) == rows(first.train)
    assert smaller.fingerprint != first.fingerprint


def test_the_validation_images_are_the_test_split(folder: Path) -> None:
    data = read(folder)
    assert data.test is not None
    assert data.test.labels.tolist() == LABELS[:20]
    for image, content in zip(data.test.images, photos(20), strict=True):
        expected = centre_crop(Image.open(io.BytesIO(content)))
        assert np.array_equal(image.numpy(), expected)


def test_fewer_test_images_keep_the_classes_shares(folder: Path) -> None:
    data, whole = read(folder, test_images=10), read(folder)
    assert data.test is not None
    assert whole.test is not None
    assert data.test.labels.bincount().tolist() == [1] * 10
    known = {image.numpy().tobytes(): label for image, label in pairs(whole.test)}
    assert [known[image.numpy().tobytes()] for image, _ in pairs(data.test)] == data.test.labels.tolist()


def test_fine_tuning_reads_all_training_images_but_the_search_split(folder: Path) -> None:
    data = read(folder)
    batches = training_batches(data, 6, seed=0, device="cpu")
    assert len(batches) == 5
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    scaled = images[:, 0, 0, 0] * data.std[0] + data.mean[0]
    found = (scaled * 255 / 6).round().to(torch.int64).tolist()
    assert sorted(found) == sorted(set(range(40)) - set(rows(data.search)))
    assert labels.tolist() == [LABELS[row] for row in found]
    assert torch.equal(batches.example, data.normalise(data.train.images[:2]))


def test_the_option_gives_it(folder: Path) -> None:
    option = OmegaConf.load(CONF)
    option.path, option.classes, option.calibration_images = str(folder), 10, 20
    data = instantiate(option, search_images=10)
    assert data.fingerprint == read(folder).fingerprint


# --------------------------------------------------------------------------------------------- centre crops


def test_the_middle_is_cut_out() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (256, 512, 3), dtype=np.uint8)
    expected = pixels[16:240, 144:368].transpose(2, 0, 1)
    assert np.array_equal(centre_crop(Image.fromarray(pixels)), expected)


@pytest.mark.parametrize(("height", "width"), [(512, 1024), (700, 512), (200, 310)])
def test_the_shorter_side_is_resized_to_256(height: int, width: int) -> None:
    """Shades that rise from left to right and from top to bottom: the crop's differences tell its scale."""
    across, down = np.linspace(0, 240, width), np.linspace(0, 240, height)
    pixels = np.stack(np.broadcast_arrays(across, down[:, None], np.zeros((height, width))), axis=2)
    crop = centre_crop(Image.fromarray(pixels.round().astype(np.uint8))).astype(float)
    scale = 256 / min(height, width)
    for shades, side in ((crop[0, 112], width), (crop[1, :, 112], height)):
        seen = 240 * 224 / int(scale * side)
        assert shades[-1] - shades[0] == pytest.approx(seen, abs=3)
        assert (shades[-1] + shades[0]) / 2 == pytest.approx(120, abs=3)


# ---------------------------------------------------------------------------------------------------- cache


def test_images_are_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read(folder)
    first.train.images.zero_()  # the file is not written to
    monkeypatch.setattr(module, "_decode", lambda *_: pytest.fail("decoded again"))
    moved = folder.rename(folder.parent / "moved")
    second = read(moved)
    assert second.fingerprint == first.fingerprint
    assert len(set(rows(second.train))) == 20


def test_changed_files_are_decoded_anew(folder: Path) -> None:
    before = read(folder)
    changed = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    write_part(folder, [*photos(20)[:19], encoded(changed)], LABELS[:20], part="validation")
    after = read(folder)
    assert before.test is not None
    assert after.test is not None
    assert not torch.equal(before.test.images[19], after.test.images[19])
    assert torch.equal(before.test.images[:19], after.test.images[:19])
    assert before.fingerprint != after.fingerprint


def test_images_that_do_not_fit_on_the_disk_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    with pytest.raises(UserError, match="30 decoded training images need 0.0 GB.*PRUNING_CACHE"):
        read(folder)


def test_an_image_that_cannot_be_decoded_leaves_no_file(folder: Path, tmp_path: Path) -> None:
    write_part(folder, [*photos(20)[:19], b"broken"], LABELS[:20], part="validation")
    with pytest.raises(UserError, match=r"validation-00000-of-00002.parquet, row 19: the image cannot"):
        read(folder)
    assert len(list((tmp_path / "cache" / "data").iterdir())) == 1  # the training images


# -------------------------------------------------------------------------------------------------- sources


def test_a_missing_folder_or_part_names_the_way_out(folder: Path) -> None:
    with pytest.raises(UserError, match="no such folder; data.path=DIR"):
        read(folder / "nowhere")
    next(folder.glob("validation-*")).unlink()
    with pytest.raises(UserError, match="no validation-.*parquet in it; data.path=DIR"):
        read(folder)


def test_a_copy_of_the_repository_will_do(folder: Path) -> None:
    inside = folder.parent / "repository" / "data"
    shutil.copytree(folder, inside)
    assert read(inside.parent).fingerprint == read(folder).fingerprint


def test_labels_outside_the_classes_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"train-00000.*labels outside 0..8, the first is 9 at row 9"):
        read(folder, classes=9)


@pytest.mark.parametrize(
    ("search", "calibration", "test", "message"),
    [
        (0, 20, None, "search.images=0, data.calibration_images=20: each at least 1"),
        (10, 0, None, "data.calibration_images=0: each at least 1"),
        (20, 21, None, "together at most the 40 training images"),
        (20, 21, 0, "40 training images; data.test_images=0: from 1 to the 20 validation images"),
        (10, 20, 21, "data.test_images=21: from 1 to the 20"),
    ],
)
def test_splits_out_of_reach_are_refused(
    folder: Path, search: int, calibration: int, test: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read(folder, search=search, calibration=calibration, test_images=test)


def test_scaling_that_cannot_be_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="data.mean=.*3 numbers each, std above 0"):
        read(folder, std=(0.2, 0.0, 0.2))


def test_the_hub_gives_the_same_data_as_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        shutil.copytree(folder, folder.parent / "hub" / "data")
        return str(folder.parent / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    found = imagenet(search_images=10, calibration_images=20, classes=10)
    assert found.fingerprint == read(folder).fingerprint
    assert asked == {
        "name": "ILSVRC/imagenet-1k",
        "repo_type": "dataset",
        "allow_patterns": ["data/train-*.parquet", "data/validation-*.parquet"],
    }


def test_without_access_or_the_hub_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = SimpleNamespace(headers={}, request=None)
    cases = {
        r"agree to ImageNet's terms.*huggingface.co/datasets/ILSVRC/imagenet-1k.*hf auth login.*data.path=DIR": (
            GatedRepoError("403 Client Error\nmore", response=nothing)  # type: ignore[arg-type]
        ),
        r"did not give ILSVRC/imagenet-1k \(ConnectionError: no route\); data.path=DIR": ConnectionError(
            "no route\nsecond line"
        ),
    }
    for message, error in cases.items():

        def refused(*_: Any, error: Exception = error, **__: Any) -> str:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
        with pytest.raises(UserError, match=message) as caught:
            imagenet()
        assert "\n" not in str(caught.value)
