"""Batches as loaders give them, made into inputs and targets."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from refusals import refused
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from amc_env.tasks import OwnTask, Regression
from search.data.loaders import as_loader, from_loaders
from search.data.reading import Reader, Signature, batches_from

X, Y = torch.ones(4, 3), torch.arange(4)
IDS = torch.ones(4, 7, dtype=torch.int64)


class One(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Option(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x


class Two(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a


class Named(nn.Module):
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Any = None, **more: Any
    ) -> Any:
        return input_ids


class Anything(nn.Module):
    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        return args


def read(network: nn.Module, batch: Any) -> tuple[Any, Any]:
    return Reader(signature=Signature.of(network))("train_loader", batch)


@pytest.mark.parametrize(
    ("network", "batch", "inputs"),
    [
        (One(), (X, Y), X),
        (One(), [X.double(), Y[:, None]], X),
        (One(), (X.half(), Y.numpy()), X),
        (One(), (X.numpy(), Y.tolist()), X),
        (One(), ([X], Y), X),
        (One(), (X, Y, torch.arange(4), ["a"] * 4), X),
        (One(), {"image": X, "label": Y}, X),
        (One(), {"x": X, "label": Y, "id": torch.arange(4)}, X),
        (Two(), (X, IDS, Y), (X, IDS)),
        (Two(), ((X, IDS), Y), (X, IDS)),
        (Two(), ({"a": X, "b": IDS}, Y), {"a": X, "b": IDS}),
        (Option(), ((X, IDS), Y), (X, IDS)),
        (Anything(), (X, IDS, Y), (X, IDS)),
        (Anything(), {"p": X, "q": IDS, "labels": Y}, {"p": X, "q": IDS}),
        (Named(), {"input_ids": IDS, "attention_mask": IDS, "labels": Y}, {"input_ids": IDS, "attention_mask": IDS}),
        (Named(), {"input_ids": IDS, "labels": Y, "text": ["a"] * 4}, IDS),
    ],
)  # fmt: skip
def test_forms_of_batches(network: nn.Module, batch: Any, inputs: Any) -> None:
    found, targets = read(network, batch)
    assert targets.dtype == torch.int64
    assert torch.equal(targets, Y)
    assert type(found) is type(inputs)
    pairs = zip(_all(found), _all(inputs), strict=True)
    assert all(one.dtype == other.dtype and torch.equal(one, other) for one, other in pairs)
    assert not isinstance(found, dict) or list(found) == list(inputs)


class Image(Tensor):
    """As fastai and torchvision have them: results of its operations are images, too."""


@pytest.mark.parametrize(
    "batch",
    [
        (X.as_subclass(Image), Y.as_subclass(Image)),
        {"x": X.as_subclass(Image), "label": Y.as_subclass(Image)},
    ],
)
def test_tensors_of_other_classes_become_plain_ones(batch: Any) -> None:
    found, targets = read(One(), batch)
    assert [type(found), type(targets)] == [Tensor, Tensor]
    assert torch.equal(found, X)
    assert torch.equal(targets, Y)


def _all(inputs: Any) -> list[Tensor]:
    several = inputs.values() if isinstance(inputs, Mapping) else inputs
    return [inputs] if isinstance(inputs, Tensor) else list(several)


@pytest.mark.parametrize(
    ("network", "batch", "code"),
    [
        (One(), X, "batch"),
        (One(), (X,), "batch"),
        (One(), (X[0], 1), "batch"),
        (One(), (X, ["a"] * 4), "batch"),
        (One(), (["a"] * 4, Y), "batch"),
        (One(), ([X[0], X[1, :2]], Y), "batch"),  # of different sizes
        (One(), {"image": X, "class": Y}, "batch"),
        (One(), {"p": X, "q": X, "labels": Y}, "batch"),
        (One(), {"x": [1, 2], "labels": [1, 2]}, "batch"),
        (One(), (X.to(torch.uint8), Y), "uint8"),
        (One(), (X.to(torch.complex64), Y), "batch"),
        (One(), (X.to_sparse(), Y), "batch"),
        (One(), (X.to("meta"), Y), "batch"),
        (Option(), (X, IDS, Y), "batch"),  # is the second one the mask, or the target?
        (Two(), (X, X, X, X), "labels"),
        (One(), (X, X), "labels"),
    ],
)
def test_batches_that_are_not_understood_are_refused(network: nn.Module, batch: Any, code: str) -> None:
    with refused(code, "train_loader"):
        read(network, batch)


def test_entries_that_are_ignored_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    reader = Reader(signature=Signature.of(One()))
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            reader("train_loader", {"x": X, "labels": Y, "idx": Y})
    assert [record.getMessage() for record in caplog.records if "idx" in record.getMessage()] == [
        caplog.messages[0]
    ]


def test_targets_of_a_task_of_one_s_own_may_be_several() -> None:
    reader = Reader(OwnTask(lambda *_: 0.0, lambda outputs, _: outputs))
    assert reader("x", (X, [Y, Y]))[1] == (Y, Y)
    assert reader("x", (X, {"a": Y}))[1] == {"a": Y}


class Sizes(Dataset[tuple[Tensor, int]]):
    """Images of different sizes."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.ones(1, 2 + index), index


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([(X, Y)] * 2)


def test_examples_of_different_sizes_are_refused() -> None:
    with refused("batch", "val_loader"):
        list(batches_from("val_loader", DataLoader(Sizes(), 2)))


@pytest.mark.parametrize("given", [TensorDataset(X, Y), (X, Y), [X.numpy(), Y.numpy()]])
def test_datasets_and_pairs_of_tensors_become_loaders(given: Any) -> None:
    (batch,) = as_loader("val_loader", given, 8)
    assert torch.equal(batch[0], X)


@pytest.mark.parametrize(("given", "code"), [(3, "wrong_type"), ((X, Y[:3]), "batch"), ((X, Y[0]), "batch")])
def test_what_is_no_loader_is_refused(given: Any, code: str) -> None:
    with refused(code, "val_loader"):
        as_loader("val_loader", given, 8)


def test_what_can_be_read_once_or_has_no_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with refused("one_pass", "val_loader"):
        as_loader("val_loader", iter([(X, Y)]), 8)
    monkeypatch.setattr("search.data.loaders.MOST_BATCHES", 1)
    with refused("endless", "val_loader"):
        from_loaders([(X, Y)], Stream())


def test_tables_tokens_and_several_inputs_are_gathered() -> None:
    batches = [((X, IDS), np.linspace(0, 1, 4))] * 3
    data = from_loaders(
        batches, batches, calibration_images=6, reader=Reader(Regression(), Signature.of(Two()))
    )
    assert [tensor.dtype for tensor in data.train.inputs] == [torch.float32, torch.int64]
    assert (len(data.train), len(data.search), data.search.targets.dtype) == (6, 12, torch.float32)
    assert data.normalise(data.train.inputs) is data.train.inputs
    named = [{"a": X, "b": IDS, "labels": Y}]
    assert len(from_loaders(named, named, reader=Reader(signature=Signature.of(Two()))).train) == 4
