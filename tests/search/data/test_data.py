"""Splits are disjoint, balanced and fixed; what is wrong with a source is said in one line."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from pyarrow import parquet
from refusals import refused
from torch.utils.data import DataLoader, TensorDataset

from amc_env.errors import UserError
from amc_env.inputs import Inputs
from search.data.base import Data, Split, check_split, fingerprint, split_off
from search.data.cifar10 import cifar10
from search.data.digits import digits
from search.data.loaders import from_loaders, seeded

CONF = Path(__file__).parents[3] / "conf" / "data"


def encoded(pixels: np.ndarray, format: str = "PNG") -> bytes:
    """An image file of uint8 [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def random_pixels(count: int, size: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def write_cifar(
    folder: Path, pixels: np.ndarray, labels: list[Any], part: str = "train", shard: int = 0
) -> None:
    """A parquet file with the columns of the published dataset."""
    images = [{"bytes": encoded(image), "path": None} for image in pixels]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"img": pa.array(images, kind), "label": pa.array(labels)})
    parquet.write_table(table, folder / f"{part}-{shard:05d}-of-00002.parquet")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with 20 + 20 training images in two files and 10 test images, and an empty cache."""
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source"
    source.mkdir()
    for shard in (0, 1):
        write_cifar(source, random_pixels(20, seed=shard), list(range(10)) * 2, shard=shard)
    write_cifar(source, random_pixels(10, seed=2), list(range(10)), part="test")
    return source


def rows(split: Split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.inputs}


# --------------------------------------------------------------------------------------------------- splits


def test_the_search_split_is_taken_off_the_training_images() -> None:
    everything = Split(torch.arange(100).view(-1, 1, 1, 1).float(), torch.arange(100) % 10)
    train, search = split_off("x", everything, 30, seed=0)
    assert sorted(torch.cat([train.inputs, search.inputs]).flatten().tolist()) == list(range(100))
    assert search.targets.bincount().tolist() == [3] * 10
    assert torch.equal(search.inputs.flatten() % 10, search.targets.float())


def test_splits_of_one_seed_are_fixed_and_nested() -> None:
    everything = Split(torch.arange(100).view(-1, 1, 1, 1).float(), torch.arange(100) % 7)
    chosen = {
        size: set(split_off("x", everything, size, 3)[1].inputs.flatten().tolist()) for size in (10, 40)
    }
    assert chosen[10] < chosen[40]
    assert chosen[40] == set(split_off("x", everything, 40, 3)[1].inputs.flatten().tolist())
    assert chosen[40] != set(split_off("x", everything, 40, 4)[1].inputs.flatten().tolist())


@pytest.mark.parametrize("size", [0, -5, 10, 11])
def test_a_search_split_out_of_reach_is_refused(size: int) -> None:
    everything = Split(torch.zeros(10, 1, 1, 1), torch.zeros(10, dtype=torch.int64))
    with pytest.raises(UserError, match=f"search.images={size}: x has 10 training images, from 1 to 9"):
        split_off("x", everything, size, 0)


def test_digits_are_split_by_class_with_a_fixed_test_split() -> None:
    first, second = digits(), digits(search_images=100, split_seed=5)
    assert (len(first.train), len(first.search), len(first.test)) == (1138, 300, 359)
    assert len(second.search) == 100
    assert torch.equal(first.test.inputs, second.test.inputs)
    assert first.test.targets.bincount().min() >= 34
    assert first.fingerprint != second.fingerprint
    assert first.fingerprint == digits().fingerprint
    assert first.image_shape == (1, 8, 8)
    assert not first.augment


def test_digits_are_normalised() -> None:
    images = digits().normalise(digits().train.inputs)
    assert images.dtype == torch.float32
    assert abs(images.mean()) < 0.01
    assert abs(images.std() - 1) < 0.01


def test_normalise_scales_pixels_and_leaves_floats_alone(small_data: Data) -> None:
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    expected = torch.tensor([(0 - 0.4) / 0.25, (1 - 0.4) / 0.25]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    assert torch.allclose(small_data.normalise(pixels), expected, atol=1e-6)
    floats = torch.randn(2, 3, 4, 4)
    assert small_data.normalise(floats) is floats


def test_the_fingerprint_sees_every_pixel_label_and_border() -> None:
    images, labels = torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    pixel, label = images.clone(), labels.clone()
    pixel[3, 0, 1, 1] = 1
    label[2] = 1
    halves = [Split(images[:2], labels[:2]), Split(images[2:], labels[2:])]
    found = {
        fingerprint(Split(images, labels), None),
        fingerprint(None, Split(images, labels)),
        fingerprint(Split(pixel, labels), None),
        fingerprint(Split(images, label), None),
        fingerprint(*halves),
    }
    assert len(found) == 5
    assert all(len(text) == 16 for text in found)


def test_seeded_leaves_the_global_state_as_it_was() -> None:
    before = torch.get_rng_state()
    with seeded(3):
        first = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)
    with seeded(3):
        assert torch.equal(torch.rand(4), first)


# ------------------------------------------------------------------------------------------------ bad splits


@pytest.mark.parametrize(
    ("inputs", "targets", "code"),
    [
        (torch.zeros(0, 1, 2, 2), torch.zeros(0), "empty"),
        (torch.zeros(3, 2, 2), torch.zeros(4), "batch"),
        ({"a": torch.zeros(3, 2), "b": torch.zeros(4)}, torch.zeros(3), "batch"),
        (torch.tensor([0, torch.nan]).view(2, 1, 1, 1), torch.zeros(2), "not_finite"),
        ((torch.zeros(2), torch.tensor([torch.inf, 0])), torch.zeros(2), "not_finite"),
    ],
)
def test_bad_splits_are_refused(inputs: Inputs, targets: torch.Tensor, code: str) -> None:
    with refused(code, "val"):
        check_split("val", Split(inputs, targets))


# --------------------------------------------------------------------------------------------------- cifar10


def test_cifar10_is_decoded_exactly(folder: Path) -> None:
    found = cifar10(str(folder), search_images=10)
    assert (len(found.train), len(found.search), len(found.test)) == (30, 10, 10)
    assert torch.equal(
        found.test.inputs, torch.from_numpy(random_pixels(10, seed=2).transpose(0, 3, 1, 2).copy())
    )
    everything = np.concatenate([random_pixels(20, seed=0), random_pixels(20, seed=1)]).transpose(0, 3, 1, 2)
    assert rows(found.train) | rows(found.search) == {image.tobytes() for image in everything}
    assert found.search.targets.bincount().tolist() == [1] * 10


def test_changed_files_are_decoded_anew(folder: Path) -> None:
    before = cifar10(str(folder), search_images=10)
    write_cifar(folder, random_pixels(10, seed=9), list(range(10)), part="test")
    after = cifar10(str(folder), search_images=10)
    assert not torch.equal(after.test.inputs, before.test.inputs)
    assert after.fingerprint != before.fingerprint


def test_the_published_files_decode_to_cifar10(shared_data: Path, tmp_path: Path) -> None:
    table = parquet.read_table(shared_data / "cifar10" / "test-00000-of-00001.parquet")[:50]
    for part in ("train", "test"):
        parquet.write_table(table, tmp_path / f"{part}-0.parquet")
    found = cifar10(str(tmp_path), search_images=20)
    image = np.asarray(Image.open(io.BytesIO(table["img"][7].as_py()["bytes"])))
    assert np.array_equal(found.test.inputs[7].numpy(), image.transpose(2, 0, 1))
    assert found.test.targets.tolist() == table["label"].to_pylist()


def test_a_missing_folder_or_part_names_the_way_out(folder: Path) -> None:
    with refused("unreadable", "data.path"):
        cifar10(str(folder / "nowhere"))
    next(folder.glob("test-*")).unlink()
    with refused("unreadable", "data.path"):
        cifar10(str(folder))


def test_a_file_that_is_not_parquet_is_named(folder: Path) -> None:
    (folder / "train-00000-of-00002.parquet").write_bytes(b"nothing of the kind")
    with refused("unreadable", ""):
        cifar10(str(folder))


def test_missing_columns_are_named_with_what_was_found(folder: Path) -> None:
    parquet.write_table(pa.table({"image": [1], "fine_label": [2]}), folder / "test-00000-of-00002.parquet")
    with refused("unreadable", ""):
        cifar10(str(folder))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 10], "1 labels outside 0..9, the first is 10 at row 1"),
        ([0, None], "1 rows of column label have no value"),
        (["kitten", "dog"], "labels outside the classes airplane"),
        ([], "cannot be read"),
    ],
)
def test_bad_labels_are_refused(folder: Path, labels: list[Any], message: str) -> None:
    write_cifar(folder, random_pixels(len(labels)), labels, part="test")
    with pytest.raises(UserError, match=message):
        cifar10(str(folder), search_images=10)


def test_an_image_of_another_size_is_refused(folder: Path) -> None:
    write_cifar(folder, random_pixels(2, size=28), [0, 1], part="test")
    with refused("image_size", ""):
        cifar10(str(folder), search_images=10)


@pytest.mark.parametrize("content", [b"not an image", None])
def test_an_image_that_cannot_be_decoded_is_refused(folder: Path, content: bytes | None) -> None:
    """Also one that names a file instead of holding bytes: a dataset must not choose which files are opened."""
    other = folder / "other.png"
    other.write_bytes(encoded(random_pixels(1)[0]))
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"img": pa.array([{"bytes": content, "path": str(other)}], kind), "label": [1]})
    parquet.write_table(table, folder / "test-00000-of-00002.parquet")
    with refused("unreadable", ""):
        cifar10(str(folder), search_images=10)


def test_scaling_that_cannot_be_is_refused(folder: Path) -> None:
    with refused("out_of_range", "data.mean"):
        cifar10(str(folder), std=(0.2, 0.0, 0.2))


# --------------------------------------------------------------------------------------------------- loaders


def loader(
    count: int, labels: torch.Tensor | None = None, size: int = 4, shuffle: bool = False
) -> DataLoader:
    images = torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, size, size)
    return DataLoader(
        TensorDataset(images, torch.arange(count) % 5 if labels is None else labels), 8, shuffle
    )


def test_loaders_are_gathered_and_the_training_one_kept() -> None:
    training = loader(40)
    found = from_loaders(training, loader(20), loader(10), calibration_images=12, outputs=torch.zeros(1, 5))
    assert (len(found.train), len(found.search), len(found.test)) == (12, 20, 10)
    assert found.loader is training
    assert found.search.inputs[:, 0, 0, 0].tolist() == list(range(20))
    assert found.classes == ("0", "1", "2", "3", "4")
    assert found.normalise(found.search.inputs) is found.search.inputs
    assert from_loaders(training, loader(20)).test is None


def test_shuffling_loaders_give_one_order_and_leave_the_global_state() -> None:
    before = torch.get_rng_state()
    found = [
        from_loaders(loader(40, shuffle=True), loader(20), calibration_images=16).fingerprint for _ in "ab"
    ]
    assert found[0] == found[1]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loader_with_a_generator_gives_the_same_data_each_time() -> None:
    images = TensorDataset(torch.randn(40, 3, 4, 4), torch.arange(40) % 5)
    own = DataLoader(images, 8, shuffle=True, generator=torch.Generator().manual_seed(3))
    found = [from_loaders(own, loader(20), calibration_images=16).fingerprint for _ in "ab"]
    assert found[0] == found[1]


def test_bad_loaders_are_refused() -> None:
    good = loader(20)
    nan = DataLoader(TensorDataset(torch.full((4, 3, 4, 4), torch.nan), torch.zeros(4, dtype=torch.int64)))
    cases: list[tuple[str, str, tuple[object, ...]]] = [
        ("empty", "val_loader", (good, [])),
        ("empty", "train_loader", ([], good)),
        ("not_finite", "val_loader", (good, nan)),
        ("labels", "test_loader", (good, good, loader(1, torch.tensor([7])))),
        ("batch", "train_loader", (torch.zeros(2, 3), good)),
        ("batch", "train_loader", (loader(20, size=6), good)),
        ("batch", "val_loader", (good, [*loader(8), *loader(8, size=6)])),
    ]
    for code, field, loaders in cases:
        with refused(code, field):
            from_loaders(*loaders, outputs=torch.zeros(1, 5))
    with refused("out_of_range", "calibration_images"):
        from_loaders(good, good, calibration_images=0)


# ------------------------------------------------------------------------------------------- options, cache


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_options_take_the_size_of_the_search_split(name: str, folder: Path) -> None:
    option = OmegaConf.load(CONF / f"{name}.yaml")
    if name == "cifar10":
        option.path = str(folder)
    found = instantiate(option, search_images=20)
    assert found.name == name
    assert len(found.search) == 20
