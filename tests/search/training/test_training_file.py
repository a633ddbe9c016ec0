"""A training that is stopped and continued ends at the same bits, with every source of randomness."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from search.data.base import Data
from search.data.loaders import from_loaders
from search.training.batches import Batches, training_batches
from search.training.finetune import finetune
from search.training.training_file import TrainingFile


class Stopped(Exception):  # noqa: N818 -- nothing is wrong
    """The training was stopped."""


def make_network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )


def trained(batches: Batches, file: TrainingFile | None, stop_at: int | None = None) -> dict[str, Tensor]:
    model, epochs = make_network(), []

    def on_epoch(epoch: int, *_: float) -> None:
        if epoch == stop_at:
            raise Stopped
        epochs.append(epoch)

    finetune(model, batches, epochs=4, lr=0.05, seed=1, warmup_epochs=0.5, on_epoch=on_epoch, file=file)
    return model.state_dict() | {"epochs": torch.tensor(epochs)}


def loaders(data: Data) -> Data:
    batches = DataLoader(
        TensorDataset(data.normalise(data.train.inputs), data.train.targets), 16, shuffle=True
    )
    return from_loaders(batches, batches)


@pytest.mark.parametrize("own_loader", [False, True])
def test_a_stopped_training_continues_to_the_same_bits(
    small_data: Data, tmp_path: Path, own_loader: bool
) -> None:
    data = loaders(small_data) if own_loader else small_data
    once = trained(training_batches(data, 16, 5, "cpu"), None)
    file = tmp_path / "training.pt"
    with pytest.raises(Stopped):
        trained(training_batches(data, 16, 5, "cpu"), TrainingFile(file, "a"), stop_at=3)
    again = trained(training_batches(data, 16, 5, "cpu"), TrainingFile(file, "a"))
    assert again.pop("epochs").tolist() == [3, 4]
    once.pop("epochs")
    assert all(torch.equal(value, again[name]) for name, value in once.items())


@pytest.mark.parametrize("content", [None, b"", b"damaged"])
def test_a_training_of_another_kind_and_a_damaged_file_start_again(
    small_data: Data, tmp_path: Path, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "training.pt"
    with pytest.raises(Stopped):
        trained(training_batches(small_data, 16, 5, "cpu"), TrainingFile(file, "a"), stop_at=3)
    if content is not None:
        file.write_bytes(content)
    key = "b" if content is None else "a"
    again = trained(training_batches(small_data, 16, 5, "cpu"), TrainingFile(file, key))
    assert again["epochs"].tolist() == [1, 2, 3, 4]
    assert ("the training starts again" in caplog.text) is (content is not None)


@pytest.mark.parametrize(
    "change", [{"optimizer": {}}, {"random": 3}, {"epoch": None}], ids=lambda change: next(iter(change))
)
def test_a_state_whose_later_parts_are_damaged_changes_nothing(
    small_data: Data, tmp_path: Path, change: dict[str, Any]
) -> None:
    file = tmp_path / "training.pt"
    with pytest.raises(Stopped):
        trained(training_batches(small_data, 16, 5, "cpu"), TrainingFile(file, "a"), stop_at=3)
    torch.save(torch.load(file, weights_only=True) | change, file)
    again = trained(training_batches(small_data, 16, 5, "cpu"), TrainingFile(file, "a"))
    once = trained(training_batches(small_data, 16, 5, "cpu"), None)
    assert all(torch.equal(value, again[name]) for name, value in once.items())
