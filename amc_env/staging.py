"""Counting hits, and scoring in stages: a few images first, the others only for candidates that can still matter."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import closing
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from amc_env.errors import UserError

_ERRORS = 3  # standard errors of the accuracy so far


class Score(NamedTuple):
    """What a candidate scores.

    Attributes:
        accuracy: In [0, 1].
        images: How many images it is of, where they were not all.
    """

    accuracy: float
    images: int | None = None


class Tally:
    """Hits so far. Nothing waits for a graphics processor until they are asked for.

    Attributes:
        images: How many they are of.
    """

    def __init__(self, device: torch.device):
        self.images = 0
        self._hits = torch.zeros((), dtype=torch.int64, device=device)
        self._broken = torch.zeros((), dtype=torch.bool, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Counts a batch: logits [N, classes] whose largest is the label, int64 [N]."""
        self._hits += (logits.argmax(1) == labels).sum()
        self._broken |= logits.isnan().any()
        self.images += len(labels)

    @property
    def accuracy(self) -> float:
        """Share of hits, in [0, 1].

        Raises:
            UserError: A logit is not a number.
        """
        if self._broken:
            raise UserError(
                "the network's outputs are not numbers (NaN): look for NaN in its weights and in the data"
            )
        return int(self._hits) / self.images


class _Scorer(Protocol):
    """Scores on all images; see `amc_env.evaluator.Scorer`."""

    images: Tensor

    def fold(self, model: nn.Module) -> nn.Module: ...

    def outputs(self, network: nn.Module) -> Generator[tuple[Tensor, Tensor]]: ...

    def forget(self) -> None: ...


class Staged:
    """Scores a candidate on the first images; on twice as many while those do not say that it is too bad to matter.

    Too bad is an accuracy that lies three standard errors below what would matter: the larger of its own error and that
    of what would matter, as a sample without replacement has it (Cochran, "Sampling Techniques", 1977, section 2.6). So
    at each look no more than about one candidate in a thousand is wronged, from some hundred images on. Called without
    such a floor it scores all images.

    Args:
        scorer: Of all images, in an order by lot.
        first: How many images to score before the first look; whole batches are scored.
    """

    def __init__(self, scorer: _Scorer, first: int):
        self._scorer = scorer
        self._first = first

    @property
    def images(self) -> Tensor:
        """All of them, as they are scored."""
        return self._scorer.images

    def __call__(self, model: nn.Module) -> float:
        """Accuracy on all images, in [0, 1]."""
        return self.score(model, 0.0).accuracy

    def forget(self) -> None:
        """Lets go of what is kept for candidates to come."""
        self._scorer.forget()

    def score(self, model: nn.Module, floor: float) -> Score:
        """Accuracy on as many images as it takes.

        Args:
            model: The cut network.
            floor: The least accuracy that matters, in [0, 1] or above.
        """
        every, look = len(self.images), self._first
        tally = Tally(self.images.device)
        with closing(self._scorer.outputs(self._scorer.fold(model))) as batches:
            for logits, labels in batches:
                tally.add(logits, labels)
                if floor > 0 and look <= tally.images < every:
                    if _hopeless(tally.accuracy, floor, tally.images, every):
                        return Score(tally.accuracy, tally.images)
                    look = 2 * tally.images
        return Score(tally.accuracy)


def _hopeless(found: float, floor: float, few: int, every: int) -> bool:
    chance = min(floor, 1.0)
    spread = max(found * (1 - found), chance * (1 - chance))
    return found + _ERRORS * math.sqrt(spread / few * (1 - few / every)) < floor


def score(scorer: Callable[[nn.Module], float], model: nn.Module, floor: float = 0.0) -> Score:
    """What ``scorer`` makes of a candidate, in stages where it has any."""
    return scorer.score(model, floor) if isinstance(scorer, Staged) else Score(scorer(model))
