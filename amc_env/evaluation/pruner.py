"""Cutting and repairing candidates from a state of the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from amc_env.errors import UserError
from amc_env.evaluation.precision import FLOAT32, arithmetic
from amc_env.evaluation.scorer import Scorer
from amc_env.pruning.candidate import Builder, Keeps, Masks
from amc_env.pruning.repair.base import Repair
from amc_env.pruning.repair.sequential import FrontToBack
from amc_env.space import Removed
from amc_env.system import using_threads

ORIGINAL = "original"
"""The start of a search that begins with the uncut network's weights."""


@dataclass(frozen=True, eq=False)
class Pruned:
    """A pruned network of its own.

    Attributes:
        network: The network, in eval mode.
        keeps: What stayed of the uncut network's channels.
        masks: The weights that stayed of layers that are masked.
        units: The units that stayed of every channel group, int64, in any order; none where weights are masked.
    """

    network: nn.Module
    keeps: Keeps
    masks: Masks
    units: tuple[Tensor, ...] = ()


@dataclass(frozen=True, eq=False)
class Start:
    """A state of the weights that strategies are cut from.

    Calibration, rankings and memory belong to a start. Its strategies are counted from the uncut network, whatever
    the weights are.

    Attributes:
        name: What identifies it in keys, outcomes and the journal.
        candidates: Builds networks from these weights.
        repairs: How to make each repair for these weights, by name; they are made when first asked for.
        removed: What is gone from these weights already: a strategy that removes no more needs no repair.
    """

    name: str
    candidates: Builder
    repairs: Mapping[str, Callable[[], Repair]]
    removed: tuple[int, ...] = ()


class Bench:
    """Cuts, mends and scores candidates, one after another.

    Repairs are calibrated once while candidates come from one start; those of the start before are forgotten.

    Args:
        scorer: Accuracy of a cut network.
        threads: Of torch meanwhile; None leaves them as they are.
    """

    def __init__(self, scorer: Callable[[nn.Module], float], threads: int | None = None):
        self.scorer = scorer
        self._threads = threads
        self._start: Start | None = None
        self._repairs: dict[str, Repair] = {}

    def score(self, start: Start, repair: str, removed: Removed) -> float:
        """Score of a candidate, in [0, 1]."""
        with using_threads(self._threads):
            model, _ = self._mended(start, repair, removed)
            return self.scorer(model)

    def pruned(self, start: Start, repair: str, removed: Removed) -> Pruned:
        """The candidate that `score` scores, as a network of its own."""
        with using_threads(self._threads):
            model, keeps = self._mended(start, repair, removed)
        builder = start.candidates
        return Pruned(_own(model), keeps, builder.masks(removed), builder.units(removed))

    def _mended(self, start: Start, repair: str, removed: Removed) -> tuple[nn.Module, Keeps]:
        keeps = start.candidates.keeps(removed)
        model = start.candidates.cut(removed, keeps)
        if any(removed) and removed != start.removed:
            mend = self._repair(start, repair)
            if isinstance(mend, FrontToBack):  # it needs the room, and takes several times as long as scoring
                self._forget()
            with arithmetic(FLOAT32):
                mend(model, removed, keeps)
        return model, keeps

    def _repair(self, start: Start, name: str) -> Repair:
        if name not in start.repairs:
            raise UserError(f"unknown repair {name!r}; there are {', '.join(start.repairs)}")
        if start is not self._start:
            self._start, self._repairs = start, {}
        if name not in self._repairs:
            self._forget()  # a calibration needs the room
            self._repairs[name] = start.repairs[name]()
        return self._repairs[name]

    def _forget(self) -> None:
        if isinstance(self.scorer, Scorer):
            self.scorer.forget()


def _own(model: nn.Module) -> nn.Module:
    """A copy whose tensors are no parts of larger ones, as solutions are that a repair took its weights from."""
    network = copy.deepcopy(model)
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    return network
