"""Scoring in stages: a few images first, the others only for candidates that can still matter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

_ERRORS = 3  # standard errors of the first images' accuracy


class Score(NamedTuple):
    """What a candidate scores.

    Attributes:
        accuracy: In [0, 1].
        images: How many images it is of, where they were not all.
    """

    accuracy: float
    images: int | None = None


class _Part(Protocol):
    """Scores on a part of the images."""

    images: Tensor

    def fold(self, model: nn.Module) -> nn.Module:
        """What is scored in place of a cut network."""
        ...

    def of(self, network: nn.Module) -> float:
        """Its accuracy on them, in [0, 1]."""
        ...

    def forget(self) -> None:
        """Lets go of what is kept for candidates to come."""
        ...


class Staged:
    """Scores a candidate on the first images; on the others as well unless those say that it is too bad to matter.

    Too bad is an accuracy that lies three standard errors below what would matter (the larger of its own error and that
    of what would matter): about one candidate in a thousand is wronged. Called without such a floor it scores all images.

    Args:
        first: Accuracy on the first images.
        rest: Accuracy on the others, of what the first ones' scorer folds.
    """

    def __init__(self, first: _Part, rest: _Part):
        self._first = first
        self._rest = rest

    @property
    def images(self) -> Tensor:
        """All of them, as they are scored, the first ones first."""
        return torch.cat([self._first.images, self._rest.images])

    def __call__(self, model: nn.Module) -> float:
        """Accuracy on all images, in [0, 1]."""
        return self.score(model, 0.0).accuracy

    def forget(self) -> None:
        """Lets go of what is kept for candidates to come."""
        self._first.forget()
        self._rest.forget()

    def score(self, model: nn.Module, floor: float) -> Score:
        """Accuracy on as many images as it takes.

        Args:
            model: The cut network.
            floor: The least accuracy that matters, in [0, 1] or above.
        """
        few, more = len(self._first.images), len(self._rest.images)
        network = self._first.fold(model)
        found = self._first.of(network)
        chance = min(floor, 1.0)
        error = math.sqrt(max(found * (1 - found), chance * (1 - chance)) / few)
        if found + _ERRORS * error < floor:
            return Score(found, few)
        hits = round(found * few) + round(self._rest.of(network) * more)
        return Score(hits / (few + more))


def score(scorer: Callable[[nn.Module], float], model: nn.Module, floor: float = 0.0) -> Score:
    """What ``scorer`` makes of a candidate, in stages where it has any."""
    return scorer.score(model, floor) if isinstance(scorer, Staged) else Score(scorer(model))
