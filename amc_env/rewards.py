"""What a scored strategy is worth: -error, weighted by a cost or cut off by the constraint.

He et al., "AMC: AutoML for Model Compression and Acceleration on Mobile Devices", ECCV 2018, section 3.4, and
the lecture's form with minus infinity. Error is ``1 - accuracy``, in [0, 1].

A reward of one's own needs no registration: any callable ``(accuracy, costs, met) -> float`` is one, and
configurations name it by ``_target_``. Where it must see strategies that miss their budget, give it an
attribute ``needs_bound_off = True``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from amc_env.errors import UserError


@runtime_checkable
class RewardFunction(Protocol):
    """The one thing that the environment asks of a reward."""

    def __call__(self, accuracy: float, costs: Mapping[str, float], met: bool) -> float:
        """Returns the reward of an accuracy in [0, 1], costs by name, and whether every budget is met."""


@dataclass(frozen=True)
class Reward(ABC):
    """A reward that has checked its accuracy; subclasses say what the error is worth.

    Attributes:
        name: What configurations and the registry call it.
        needs_bound_off: True where the reward judges strategies that miss their budget, which an environment
            that bounds its actions never produces.
    """

    name: ClassVar[str]
    needs_bound_off: ClassVar[bool] = False

    def __call__(self, accuracy: float, costs: Mapping[str, float], met: bool) -> float:
        """Returns the reward.

        Args:
            accuracy: Share of right answers, in [0, 1].
            costs: The strategy's costs by name, each in its own unit (macs: multiply-accumulates; params:
                weights).
            met: Whether every budget is met.

        Raises:
            UserError: The accuracy is no number in [0, 1], or a cost that the reward needs is not there.
        """
        if not 0.0 <= accuracy <= 1.0:  # NaN compares false and lands here too
            raise UserError(
                f"reward {self.name!r} was given accuracy {accuracy}; it must be a number in [0, 1]. "
                "Check weights and data for NaN, and that the evaluator returns a share, no percentage",
                code="out_of_range",
                field="reward",
            )
        return self.value(1.0 - accuracy, costs, met)

    @abstractmethod
    def value(self, error: float, costs: Mapping[str, float], met: bool) -> float:
        """Returns the reward of ``error`` in [0, 1]."""


class Error(Reward):
    """``-error``: resource-constrained search, where the bound on the action keeps the budget."""

    name = "error"

    def value(self, error: float, costs: Mapping[str, float], met: bool) -> float:
        """Returns ``-error``, in [-1, 0]."""
        return -error


@dataclass(frozen=True)
class _ErrorLogCost(Reward):
    """``-error * log(cost)``, natural logarithm, of a cost counted in units (at least one)."""

    cost: ClassVar[str]

    def value(self, error: float, costs: Mapping[str, float], met: bool) -> float:
        """Returns ``-error * log(cost)``, at most 0."""
        if self.cost not in costs:
            raise UserError(
                f"reward {self.name!r} needs the cost {self.cost!r}, the search computes {sorted(costs)}; "
                "use reward=error or add that cost",
                code="missing",
                field="reward",
            )
        return -error * math.log(max(costs[self.cost], 1.0))


class ErrorFlops(_ErrorLogCost):
    """``-error * log(MACs)``: accuracy-guaranteed search (the papers' FLOPs are MACs)."""

    name = "error_flops"
    cost = "macs"


class ErrorParams(_ErrorLogCost):
    """``-error * log(parameters)``: accuracy-guaranteed search for size."""

    name = "error_params"
    cost = "params"


class Infinity(Reward):
    """The lecture's form: ``-error`` where the constraint holds, minus infinity where it does not."""

    name = "infinity"
    needs_bound_off = True

    def value(self, error: float, costs: Mapping[str, float], met: bool) -> float:
        """Returns ``-error`` or ``-inf``."""
        return -error if met else -math.inf


REWARDS: dict[str, type[Reward]] = {cls.name: cls for cls in (Error, ErrorFlops, ErrorParams, Infinity)}


def reward(name: str) -> Reward:
    """Returns the reward of that name.

    Raises:
        UserError: There is none.
    """
    if name not in REWARDS:
        raise UserError(
            f"unknown reward {name!r}; there are {sorted(REWARDS)}, "
            "and a reward of your own is named by `_target_`",
            code="unknown_name",
            field="reward",
        )
    return REWARDS[name]()
