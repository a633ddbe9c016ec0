"""The user's own DataLoaders, and random numbers from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from amc_env.errors import UserError, first_line
from amc_env.inputs import Inputs, count, described, joined, take, to_device
from search.data.base import Data, Split, check_split, fingerprint
from search.data.reading import Reader, batches_from

MOST_BATCHES = 100_000
"""Batches after which a loader is taken for endless."""


def from_loaders(
    train_loader: Iterable[Any],
    val_loader: Iterable[Any],
    test_loader: Iterable[Any] | None = None,
    calibration_images: int = 2000,
    outputs: Tensor | None = None,
    reader: Reader | None = None,
) -> Data:
    """Data from the user's own loaders, whose inputs are as the network wants them; see `search.data.reading`.

    Args:
        train_loader: kept for fine-tuning as it is; its first `calibration_images` become the train split.
        val_loader: judges candidates; read whole, once.
        test_loader: for the final figures; None leaves them on the validation examples.
        outputs: the network's for a few examples, which targets are compared with; None: they are not.
        reader: makes inputs and targets of batches; by default those of a classifier with one input.

    Raises:
        UserError: an empty loader, batches of another form, NaN or infinite inputs, targets that do not fit the task or
            the outputs, examples of different shapes.
    """
    if calibration_images < 1:
        raise UserError(
            f"calibration_images={calibration_images}: at least 1 is needed",
            code="out_of_range",
            field="calibration_images",
        )
    reader = reader or Reader()
    train = _gather("train_loader", train_loader, reader, limit=calibration_images)
    search = _gather("val_loader", val_loader, reader)
    test = None if test_loader is None else _gather("test_loader", test_loader, reader)
    parts = {"train_loader": train, "val_loader": search} | ({} if test is None else {"test_loader": test})
    for name, part in parts.items():
        check_split(name, part)
        if outputs is not None:
            reader.task.check(name, outputs, part.targets)
    shapes = {name: described(take(part.inputs, slice(1))) for name, part in parts.items()}
    if len(set(shapes.values())) > 1:
        raise UserError(
            f"examples of several shapes, where all loaders must give one: {shapes}",
            code="batch",
            field="train_loader",
        )
    classes = 0 if outputs is None else reader.task.classes(outputs)
    return Data(
        name="loaders",
        train=train,
        search=search,
        test=test,
        classes=tuple(str(label) for label in range(classes)),
        mean=(),
        std=(),
        augment=False,
        fingerprint=fingerprint(train, search, test),
        loader=train_loader,
        reader=reader,
    )


def as_loader(name: str, given: Any, batch_size: int, *, shuffle: bool = False) -> Any:
    """A loader as it is; a DataLoader of a dataset, or of a pair (inputs, targets) of tensors.

    Args:
        name: the argument's.
        given: what was given in place of a loader; None stays.
        batch_size: of such a DataLoader.
        shuffle: whether such a DataLoader shuffles.

    Raises:
        UserError: an iterator, which can be read once only; what is neither loader, dataset nor pair; tensors of different
            lengths.
    """
    if given is None:
        return None
    if isinstance(given, Iterator):
        raise one_pass(name)
    arrays = isinstance(given, tuple | list) and given and isinstance(given[0], Tensor | np.ndarray)
    if arrays and len(given) == 2 and isinstance(given[1], Tensor | np.ndarray):
        _check_lengths(name, given)
        given = TensorDataset(*map(torch.as_tensor, given))
    elif arrays or isinstance(given, Tensor | np.ndarray | Mapping) or not _gives_batches(given):
        what = f"{type(given).__name__} of {len(given)} entries" if arrays else type(given).__name__
        raise UserError(
            f"{{field}} is a {what}: give a DataLoader or list of batches (inputs, targets), a dataset, or one pair "
            "(inputs, targets) of tensors; inputs of a network with several go together, ((x1, x2), targets)",
            code="wrong_type",
            field=name,
        )
    if isinstance(given, Dataset) and not isinstance(given, IterableDataset):
        return DataLoader(given, batch_size, shuffle=shuffle)
    return given


def _check_lengths(name: str, pair: Sequence[Any]) -> None:
    inputs, targets = (len(part) if part.ndim else 0 for part in pair)
    if inputs != targets:
        raise UserError(
            f"{{field}} has {inputs} inputs and {targets} targets: one target for each input is needed",
            code="batch",
            field=name,
        )


def _gives_batches(given: Any) -> bool:
    return given is None or isinstance(given, Iterable | Dataset) or hasattr(given, "__getitem__")


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


def one_pass(name: str) -> UserError:
    """The refusal of a loader that can be read once only."""
    return UserError(
        "{field} is an iterator, which can be read once: give a DataLoader or a list of batches",
        code="one_pass",
        field=name,
    )


def endless(name: str) -> UserError:
    """The refusal of a loader that seems to have no end."""
    return UserError(
        f"{{field}} has no length and gives more than {MOST_BATCHES} batches: give it a length",
        code="endless",
        field=name,
    )


def _gather(name: str, loader: Iterable[Any], reader: Reader, limit: int | None = None) -> Split:
    """The loader's inputs and targets on the CPU, at most `limit` of them."""
    inputs: list[Inputs] = []
    targets: list[Inputs] = []
    gathered = 0
    for batch in batches_from(name, Reseeded(loader, 0)):
        one, wanted = reader(name, batch)
        inputs.append(to_device(one, "cpu"))
        targets.append(to_device(wanted, "cpu"))
        gathered += count(one)
        if limit is not None and gathered >= limit:
            break
        if len(inputs) > MOST_BATCHES:
            raise endless(name)
    if not gathered:
        raise UserError(f"{name} is empty: at least one example is needed", code="empty", field=name)
    try:
        whole = slice(limit)
        return Split(take(joined(inputs), whole), take(joined(targets), whole))
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{name}: its batches do not fit together: {first_line(error).rstrip('.')}. All examples must have one shape: "
            "bring images to one size, and texts to one length (padding='max_length')",
            code="batch",
            field=name,
        ) from error
