"""Images by the name of their dataset: columns, classes and parts are found; sizes are those that are asked for."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hydra.utils import instantiate
from image_parquets import IMAGES, grey
from omegaconf import OmegaConf
from PIL import Image
from pyarrow import parquet
from refusals import refused

from search.data.base import Data, Split
from search.data.hub import images
from search.data.look import Look

CONF = Path(__file__).parents[3] / "conf" / "data"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path / "cache"))


def write(
    folder: Path, name: str, rows: range, side: int = 4, labels: str = "kind", **more: list[Any]
) -> None:
    """A parquet file with an image of one shade for each row, that tells the row, and texts of three classes."""
    folder.mkdir(exist_ok=True)
    pictures = [{"bytes": grey(6 * row, side, side), "path": None} for row in rows]
    columns = {"photo": pa.array(pictures, IMAGES), labels: [f"class {row % 3}" for row in rows], **more}
    parquet.write_table(pa.table(columns), folder / f"{name}.parquet")


def rows(split: Split | None) -> list[int]:
    assert split is not None
    return sorted((split.inputs[:, 0, 0, 0] // 6).tolist())


def check_labels(data: Data) -> None:
    for split in (data.train, data.search, data.test):
        assert (split.inputs[:, 0, 0, 0] // 6 % 3).tolist() == split.targets.tolist()


def test_columns_classes_and_parts_are_found(tmp_path: Path) -> None:
    write(tmp_path / "x", "train-0", range(12))
    write(tmp_path / "x", "validation-0", range(12, 18))
    data = images(str(tmp_path / "x"), search_images=3)
    assert data.classes == ("class 0", "class 1", "class 2")
    assert data.image_shape == (3, 4, 4)
    assert (rows(data.test), len(data.search), len(data.train)) == (list(range(12, 18)), 3, 9)
    check_labels(data)
    assert images(str(tmp_path / "x")).search.targets.shape == (1,)  # a tenth


def test_of_one_part_a_fifth_is_split_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "x", "all", range(15))
    with caplog.at_level("INFO"):
        data = images(str(tmp_path / "x"), search_images=3, split_seed=4)
    assert "one part" in caplog.text
    assert sorted(rows(data.train) + rows(data.search) + rows(data.test)) == list(range(15))
    assert data.test is not None
    assert data.test.targets.bincount().tolist() == [1, 1, 1]
    assert rows(images(str(tmp_path / "x"), search_images=6).test) == rows(data.test)
    check_labels(data)


def test_class_features_name_the_classes_and_hidden_labels_are_no_test_split(tmp_path: Path) -> None:
    kind = datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features({"image": datasets.Image(), "fine": kind, "number": datasets.Value("int64")})
    for part, label in (("train", 1), ("test", -1), ("validation", 0)):
        pictures = [{"bytes": grey(9, 4, 4), "path": None}] * 5
        columns = {"image": pictures, "fine": [label] * 5, "number": [7] * 5}
        table = datasets.Dataset.from_dict(columns, features=features)
        (tmp_path / "x").mkdir(exist_ok=True)
        table.to_parquet(tmp_path / "x" / f"{part}.parquet")
    data = images(str(tmp_path / "x"), search_images=1)
    assert data.classes == ("cat", "dog")
    assert data.test is not None
    assert data.test.targets.tolist() == [0] * 5
    with refused("labels", ""):
        images(str(tmp_path / "x"), test="test")
    with refused("column", "data.label"):
        images(str(tmp_path / "x"), label="coarse")


def test_a_choice_that_is_not_clear_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "x", "train", range(6), other=["a"] * 6)
    with refused("column", "data.label"):
        images(str(tmp_path / "x"))
    assert images(str(tmp_path / "x"), label="other").classes == ("a",)
    with refused("column", "data.image"):
        images(str(tmp_path / "x"), image="picture", label="kind")
    with refused("column", "data.test"):
        images(str(tmp_path / "x"), label="kind", test="dev")
    with refused("missing", "data"):
        images()
    for name in (str(tmp_path / "nothing"), str(tmp_path)):
        with refused("unreadable", "data.name"):
            images(name if name != str(tmp_path) else str(tmp_path / "x" / "train.txt"))


def test_a_name_that_is_no_path_is_one_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def load_dataset(**options: Any) -> dict[str, datasets.Dataset]:
        asked.append(options)
        columns = {"image": [{"bytes": grey(9, 4, 4), "path": None}] * 10, "label": [0, 1] * 5}
        return {"full": datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert images("someone/pets", "small").name == "someone/pets"
    assert asked == [{"path": "someone/pets", "name": "small"}]


def test_images_are_brought_to_a_size_and_others_refused(tmp_path: Path) -> None:
    write(tmp_path / "x", "train-0", range(6), side=4)
    write(tmp_path / "x", "train-1", range(6, 12), side=6)
    with refused("image_size", ""):
        images(str(tmp_path / "x"), search_images=2)
    data = images(str(tmp_path / "x"), search_images=2, size=5, mean=(0.5,) * 3)
    assert data.image_shape == (3, 5, 5)
    assert data.mean == (0.5, 0.5, 0.5)
    check_labels(data)
    with refused("out_of_range", "data.mean"):
        images(str(tmp_path / "x"), size=5, std=(0.1, 0.0, 0.1))


def test_the_training_images_can_be_a_stream(tmp_path: Path) -> None:
    write(tmp_path / "x", "train", range(12))
    write(tmp_path / "x", "test", range(12, 18))
    data = images(str(tmp_path / "x"), search_images=3, calibration_images=4, size=8)
    assert len(data.train) == 4
    assert data.stream is not None
    batches = list(data.stream(3, 0))
    assert [tuple(pixels.shape) for pixels, _ in batches] == [(3, 3, 8, 8)] * 3


@pytest.mark.parametrize("parts", [(), ("train", "val"), ("training", "test")])
def test_class_folders_are_read_with_or_without_parts(parts: tuple[str, ...], tmp_path: Path) -> None:
    for row in range(18):
        part = parts[row // 12] if parts else "."
        file = tmp_path / "x" / part / f"class {row % 3}" / f"{row}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(grey(6 * row, 4, 4))
    data = images(path=str(tmp_path / "x"), search_images=3)
    assert data.classes == ("class 0", "class 1", "class 2")
    check_labels(data)
    if parts:
        assert rows(data.test) == list(range(12, 18))
    option = OmegaConf.load(CONF / "folder.yaml")
    option.path = str(tmp_path / "x")
    assert instantiate(option, search_images=3).fingerprint == data.fingerprint


def test_a_class_may_be_called_like_a_part(tmp_path: Path) -> None:
    for row in range(20):
        file = tmp_path / "x" / ("bus", "train")[row % 2] / f"{row}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(grey(6 * row, 4, 4))
    assert images(path=str(tmp_path / "x")).classes == ("bus", "train")


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with refused("unreadable", "data.path"):
            images(path=str(path))


def test_a_look_keeps_or_changes_proportions() -> None:
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 4:12] = 255  # the middle
    picture = Image.fromarray(pixels)
    assert Look(16)(picture) is picture
    assert np.asarray(Look(8, crop=1.0)(picture)).min() == 255
    squashed = np.asarray(Look(8, crop=1.0, squash=True)(picture))
    assert squashed[:, 0].max() < 20
    assert squashed[:, 4].min() > 235
    assert Look(6, crop=0.75)(picture).size == (6, 6)
    assert (
        len({Look(8).key, Look(8, 0.9).key, Look(8, 0.9, True).key, Look(8, 0.9, True, "bicubic").key}) == 4
    )


def test_a_wanted_size_is_what_the_library_resizes_to() -> None:
    """224 / (224 / 232) is a little less than 232."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (232, 232, 3), dtype=np.uint8))
    cut = np.asarray(picture)[4:228, 4:228]
    assert np.array_equal(np.asarray(Look(224, 224 / 232)(picture)), cut)
