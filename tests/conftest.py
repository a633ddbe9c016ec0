"""What several test files share: where real data lies, a cache of the tests' own, and small random data."""

import os
from pathlib import Path

# One thread, here and in the commands that tests start: networks are tiny, and threads that wait for each other on a
# busy machine cost tenfold. It must be said before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from search.data.base import Data, Split, fingerprint

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Keep what tests decode or train in pytest's cache: not in the user's, and there for the next run."""
    if "PRUNING_CACHE" not in os.environ and hasattr(config, "cache"):
        os.environ["PRUNING_CACHE"] = str(config.cache.mkdir("pruning"))


def find_shared_data() -> Path | None:
    """The folder with real data (cifar10/, weights/): PRUNING_SHARED_DATA, else beside the repository."""
    named = os.environ.get("PRUNING_SHARED_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real data; a test that asks for it is skipped where there is none."""
    folder = find_shared_data()
    if folder is None:
        pytest.skip("no real data: point PRUNING_SHARED_DATA at a folder with cifar10/ and weights/")
    return folder


def make_data(
    channels: int = 3, size: int = 8, classes: int = 4, count: int = 64, augment: bool = False
) -> Data:
    """Random uint8 images whose label is the quarter of the image that is bright: easy to learn."""
    generator = torch.Generator().manual_seed(7)

    def split(number: int) -> Split:
        images = torch.randint(0, 120, (number, channels, size, size), generator=generator, dtype=torch.uint8)
        labels = torch.arange(number) % classes
        for image, label in zip(images, labels.tolist(), strict=True):
            row, column = divmod(label % 4, 2)
            half = size // 2
            image[:, row * half : (row + 1) * half, column * half : (column + 1) * half] += 130
        return Split(images, labels)

    train, search, test = split(count), split(count // 2), split(count // 2)
    return Data(
        name="random",
        train=train,
        search=search,
        test=test,
        classes=tuple(f"class {label}" for label in range(classes)),
        mean=(0.4,) * channels,
        std=(0.25,) * channels,
        augment=augment,
        fingerprint=fingerprint(train, search, test),
    )


@pytest.fixture
def small_data() -> Data:
    """64 training, 32 search and 32 test images of 3 x 8 x 8 in four classes."""
    return make_data()
