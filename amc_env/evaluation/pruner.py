"""Cutting and repairing candidates from a state of the weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from amc_env.errors import UserError
from amc_env.evaluation.precision import FLOAT32, arithmetic
from amc_env.evaluation.scorer import Scorer
from amc_env.graph.copying import module_copy
from amc_env.pruning.candidate import Builder, Keeps, Masks
from amc_env.pruning.repair.base import Repair
from amc_env.space import Removed
from amc_env.system import memory_for, using_threads

ORIGINAL = "original"
"""Name of the unpruned network's own weights."""


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
class BaseWeights:
    """A state of the weights that strategies are pruned from.

    Calibration, rankings and memory belong to one state. Strategies are always counted from the unpruned network.

    Attributes:
        name: Identifies it in keys, trials and the journal.
        candidates: Builds networks from these weights.
        repairs: How to make each repair for these weights, by name; made on first use.
        removed: What is removed from these weights already: a strategy that removes no more needs no repair.
    """

    name: str
    candidates: Builder
    repairs: Mapping[str, Callable[[], Repair]]
    removed: tuple[int, ...] = ()


class Pruner:
    """Prunes, repairs and scores candidates, one after another.

    Repairs are calibrated once for the weights that candidates are pruned from; those of the weights before are dropped.

    Args:
        scorer: Score of a pruned network.
        threads: Torch's threads meanwhile; None leaves them as they are.
    """

    def __init__(self, scorer: Callable[[nn.Module], float], threads: int | None = None):
        self.scorer = scorer
        self._threads = threads
        self._weights: BaseWeights | None = None
        self._repairs: dict[str, Repair] = {}

    def expect(self, weights: BaseWeights, repair: str, wanted: Sequence[Removed]) -> None:
        """Announce candidates that `score` will be asked for, in this order; nothing is done ahead in this process."""

    def close(self) -> None:
        """Give back what scoring holds outside this process."""

    def score(self, weights: BaseWeights, repair: str, removed: Removed) -> tuple[float, dict[str, float]]:
        """Score of a candidate, in [0, 1], and the seconds of each phase."""
        began = time.perf_counter()
        with using_threads(self._threads):
            model, _ = self._repaired(weights, repair, removed)
            repaired = time.perf_counter()
            score = self.scorer(model)
        ended = time.perf_counter()
        return score, {"repair": round(repaired - began, 6), "score": round(ended - repaired, 6)}

    def pruned(self, weights: BaseWeights, repair: str, removed: Removed) -> Pruned:
        """The candidate that `score` scores, as a network of its own."""
        with using_threads(self._threads):
            model, keeps = self._repaired(weights, repair, removed)
        builder = weights.candidates
        return Pruned(_own(model), keeps, builder.masks(removed), builder.units(removed))

    def _repaired(self, weights: BaseWeights, name: str, removed: Removed) -> tuple[nn.Module, Keeps]:
        keeps = weights.candidates.keeps(removed)
        model = weights.candidates.cut(removed, keeps)
        if any(removed) and removed != weights.removed:
            with arithmetic(FLOAT32), memory_for("repair", "repair.images"):
                self._repair(weights, name)(model, removed, keeps)
        return model, keeps

    def _repair(self, weights: BaseWeights, name: str) -> Repair:
        if name not in weights.repairs:
            raise UserError(
                f"unknown repair {name!r}; there are {', '.join(weights.repairs)}",
                code="unknown_name",
                field="repair.name",
            )
        if weights is not self._weights:
            self._weights, self._repairs = weights, {}
        if name not in self._repairs:
            if isinstance(self.scorer, Scorer):
                self.scorer.forget()  # calibration needs the memory
            self._repairs[name] = weights.repairs[name]()
        return self._repairs[name]


def _own(model: nn.Module) -> nn.Module:
    """A copy whose tensors are no parts of larger ones, as solutions are that a repair took its weights from."""
    network = module_copy(model)
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    return network
