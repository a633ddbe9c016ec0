"""Random numbers of the user's loaders, drawn from a seed of ours."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class Reseeded:
    """A loader whose draws come from a seed, whoever used it before and whatever else is drawn meanwhile.

    Those are torch's, Python's and NumPy's global ones and of the generators that a DataLoader is made of; all are put
    back after every batch. An iteration is an epoch, and the next one draws on.

    Args:
        loader: Gives batches, anew each time it is iterated.
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
