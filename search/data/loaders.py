"""The user's own DataLoaders, and random numbers from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amc_env.errors import UserError
from search.data.base import Data, Split, check_split, fingerprint


def from_loaders(
    train_loader: Iterable[Any],
    val_loader: Iterable[Any],
    test_loader: Iterable[Any] | None = None,
    calibration_images: int = 2000,
    classes: int | None = None,
) -> Data:
    """Data from the user's own loaders of (images, labels) batches, normalised as the network wants them.

    Args:
        train_loader: kept for fine-tuning as it is; its first `calibration_images` become the train split.
        val_loader: judges candidates; read whole, once.
        test_loader: for the final figures; None leaves them on the validation images.
        classes: number of the network's outputs; the largest label plus one where None.

    Raises:
        UserError: an empty loader, batches of another form, NaN or infinite pixels, labels outside classes,
            images of different shapes.
    """
    if calibration_images < 1:
        raise UserError(f"calibration_images={calibration_images}: at least 1 is needed")
    train = _gather("train_loader", train_loader, limit=calibration_images)
    search = _gather("val_loader", val_loader)
    test = None if test_loader is None else _gather("test_loader", test_loader)
    parts = {"train_loader": train, "val_loader": search} | ({} if test is None else {"test_loader": test})
    count = classes if classes is not None else 1 + max(int(part.labels.max()) for part in parts.values())
    for name, part in parts.items():
        check_split(name, part, count)
    shapes = {name: tuple(part.images.shape[1:]) for name, part in parts.items()}
    if len(set(shapes.values())) > 1:
        raise UserError(f"images of several shapes, where all loaders must give one: {shapes}")
    return Data(
        name="loaders",
        train=train,
        search=search,
        test=test,
        classes=tuple(str(label) for label in range(count)),
        mean=(),
        std=(),
        augment=False,
        fingerprint=fingerprint(train, search, test),
        loader=train_loader,
    )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's draws inside come from `seed`; afterwards the global state is as if nothing had been drawn."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


class Reseeded:
    """A loader whose draws come from a seed, whoever used it before and whatever else is drawn meanwhile.

    Those are torch's, Python's and NumPy's global ones and of the generators that a DataLoader is made of; all are put
    back after every batch. An iteration is an epoch, and the next one draws on.

    Args:
        loader: Gives batches, from the start each time it is iterated.
        seed: Of its draws.
    """

    def __init__(self, loader: Iterable[Any], seed: int):
        self._loader = loader
        own = _generators(loader)
        self._places: list[tuple[Callable[[], Any], Callable[[Any], object]]] = [
            (torch.get_rng_state, torch.set_rng_state),
            (random.getstate, random.setstate),
            (np.random.get_state, np.random.set_state),
            *((generator.get_state, generator.set_state) for generator in own),
        ]
        self._states: list[Any] = [
            torch.Generator().manual_seed(seed).get_state(),
            random.Random(seed).getstate(),
            np.random.RandomState(seed % 2**32).get_state(),
            *(torch.Generator(generator.device).manual_seed(seed).get_state() for generator in own),
        ]

    def __iter__(self) -> Iterator[Any]:
        with self._own_draws():
            batches = iter(self._loader)
        while True:
            with self._own_draws():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    @contextmanager
    def _own_draws(self) -> Iterator[None]:
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        before = [take() for take, _ in self._places]
        for (_, put), state in zip(self._places, self._states, strict=True):
            put(state)
        self._states = before


def _generators(loader: Any) -> list[torch.Generator]:
    """Those of a DataLoader and of what it is made of."""
    batches = getattr(loader, "batch_sampler", None)
    owners = loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)
    found = [getattr(owner, "generator", None) for owner in (*owners, getattr(loader, "dataset", None))]
    return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())


def class_labels(name: str, labels: Tensor) -> Tensor:
    """Labels of a batch as int64 [N], from any integer type or bool, also of shape [N, 1].

    Raises:
        UserError: They are no class numbers, but targets of a regression or one row for each class.
    """
    if labels.is_floating_point() or labels.is_complex():
        raise UserError(
            f"{name} gives labels of type {labels.dtype}, but a classifier needs class numbers: integers in [N]. "
            "Regression targets are not supported; one-hot rows become class numbers with labels.argmax(1)",
            code="labels",
            field=name,
        )
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    if labels.ndim != 1:
        raise UserError(
            f"{name} gives labels of shape {list(labels.shape)}: class numbers in [N] are needed; one-hot rows become "
            "class numbers with labels.argmax(1)",
            code="labels",
            field=name,
        )
    return labels.to(torch.int64)


def _gather(name: str, loader: Iterable[Any], limit: int | None = None) -> Split:
    """The loader's images (float32) and labels in one tensor each, at most `limit` of them."""
    images: list[Tensor] = []
    labels: list[Tensor] = []
    gathered = 0
    for batch in Reseeded(loader, 0):
        if not (
            isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(x, Tensor) for x in batch)
        ):
            raise UserError(
                f"{name} gives batches of {type(batch).__name__}: (images, labels) tensors are needed"
            )
        images.append(batch[0].detach().to("cpu", torch.float32))
        labels.append(class_labels(name, batch[1]).detach().cpu())
        gathered += len(batch[0])
        if limit is not None and gathered >= limit:
            break
    if not gathered:
        raise UserError(f"{name} is empty: at least one image is needed")
    try:
        return Split(torch.cat(images)[:limit], torch.cat(labels)[:limit])
    except RuntimeError as error:
        raise UserError(f"{name}: its batches do not fit together: {error}") from error
