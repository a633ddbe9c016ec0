"""Sensitivity: every decision is cut alone, and all are then cut to a common threshold of accuracy.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks" (NeurIPS 2015): layers differ in how
much pruning they bear, and each one's curve of accuracy against the share removed says how much to take from it. What
decisions do to each other does not show in the curves: the policy is a baseline.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from agents.base import Agent, SearchTask
from agents.moves import least_error
from amc_env.errors import UserError
from amc_env.space import Removed, SearchSpace
from amc_env.validation import Fraction, FractionOrZero, Listed, settings

log = logging.getLogger(__name__)

Ratios = Annotated[Listed[Fraction], Field(min_length=1)]
"""Shares removed, at least one."""
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_BISECTIONS = 48  # halvings of a threshold; far below one image of any split


@dataclass(frozen=True)
class Curve:
    """Accuracy of the network with one decision cut alone.

    Attributes:
        name: The decision.
        ratios: Shares removed, ascending; the first is 0.
        accuracies: In [0, 1], one per ratio; the first is the original's.
    """

    name: str
    ratios: tuple[float, ...]
    accuracies: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuses points out of order."""
        assert len(self.ratios) == len(self.accuracies)
        if self.ratios[0] != 0.0 or any(a >= b for a, b in pairwise(self.ratios)):
            raise ValueError(f"{self.name}: ratios must ascend from 0; got {self.ratios}")

    @property
    def falling(self) -> tuple[float, ...]:
        """The accuracies made monotone: each the least so far, so that noise cannot lift a curve again."""
        return tuple(float(a) for a in np.minimum.accumulate(self.accuracies))

    @property
    def drop(self) -> float:
        """Mean drop of accuracy over the measured ratios: the area over the curve, over its length."""
        if len(self.ratios) == 1:
            return 0.0
        lost = self.accuracies[0] - np.array(self.accuracies)
        return float(np.trapezoid(lost, self.ratios) / self.ratios[-1])

    def ratio_at(self, threshold: float) -> float:
        """The largest ratio before accuracy, interpolated linearly, first falls below ``threshold``."""
        falling = self.falling
        below = [k for k, accuracy in enumerate(falling) if accuracy < threshold]
        if not below:
            return self.ratios[-1]
        k = below[0]
        if k == 0:
            return 0.0
        step = (falling[k - 1] - threshold) / (falling[k - 1] - falling[k])
        return self.ratios[k - 1] + step * (self.ratios[k] - self.ratios[k - 1])


@dataclass(frozen=True)
class Pick:
    """What a common threshold comes to.

    Attributes:
        removed: The strategy.
        threshold: The accuracy, in [0, 1], at which every curve was left.
    """

    removed: Removed
    threshold: float


def plan(space: SearchSpace, ratios: Sequence[float]) -> list[list[Removed]]:
    """Strategies that cut one decision alone: for every decision one a feasible count, ascending.

    Ratios that come to the same count, or to none at all, are taken once, or not at all.
    """
    plans = []
    for place in range(len(space.names)):
        alone = np.zeros((len(ratios), len(space.names)))
        alone[:, place] = sorted(ratios)
        plans.append([removed for removed in dict.fromkeys(map(space.snap, alone)) if removed[place]])
    return plans


def curves_of(
    space: SearchSpace,
    plans: Sequence[Sequence[Removed]],
    original: float,
    accuracies: Sequence[Sequence[float]],
) -> list[Curve]:
    """The curve of every decision.

    Args:
        space: The decisions.
        plans: `plan`'s strategies.
        original: Accuracy of the uncut network.
        accuracies: Those of the strategies.
    """
    curves = []
    for place, (alone, scored) in enumerate(zip(plans, accuracies, strict=True)):
        ratios = (removed[place] / space.totals[place] for removed in alone)
        curves.append(Curve(space.names[place], (0.0, *ratios), (original, *scored)))
    return curves


def pick(space: SearchSpace, curves: Sequence[Curve], drop: float | None = None) -> Pick:
    """Cuts every decision to where its curve crosses a common threshold, the highest that meets the budget.

    What snapping to feasible counts leaves of the budget is given back by the least common shift of all ratios.

    Args:
        space: The decisions and the budgets.
        curves: One per decision.
        drop: The accuracy that may be given up at once, as a share of 1; the threshold goes below that only where the
            budget asks for it, and nothing is given back. Without it the threshold begins at the original's accuracy.
    """

    def cut_to(threshold: float) -> list[float]:
        return [curve.ratio_at(threshold) for curve in curves]

    met = high = curves[0].accuracies[0] - (drop or 0.0)
    if not space.met(space.snap(cut_to(high))):
        met = min(
            min(curve.falling) for curve in curves
        )  # every curve's end; beyond it there is only the shift
        for _ in range(_BISECTIONS):
            middle = (met + high) / 2
            if space.met(space.snap(cut_to(middle))):
                met = middle
            else:
                high = middle
    ratios = cut_to(met)
    return Pick(space.land(ratios) if drop is None else space.project(ratios), met)


@settings
class Sensitivity(Agent):
    """Cuts every decision alone over a list of ratios, then all to one threshold of accuracy.

    It spends an evaluation a decision and ratio, one on the original and one on what it picks; with fewer episodes
    the list of ratios is thinned out evenly, and episodes beyond are left.

    Attributes:
        ratios: Shares removed, each in (0, 1); the nearest feasible counts are scored.
        threshold: Accuracy that may be given up, in [0, 1), as measured with one decision cut; more is where the
            budget asks for it. Needed without a budget. What a search delivers is the best by its reward: without a
            budget take one that knows the cost (reward=error_flops), or the original is delivered.
        source: ``accuracy`` scores the curves. ``least_squares`` takes the error that least squares leaves in each layer
            instead and scores the strategy of least total error alone (`agents.moves.least_error`): one evaluation.
    """

    name: ClassVar[str] = "sensitivity"
    steps: ClassVar[bool] = False

    ratios: Ratios = RATIOS
    threshold: FractionOrZero | None = None
    source: Literal["accuracy", "least_squares"] = "accuracy"

    def check(self, space: SearchSpace, episodes: int) -> None:
        """Refuses a search space that gives nothing to prune to.

        Raises:
            UserError: There is neither a budget nor a threshold.
        """
        if self.source == "least_squares" and not space.budgets:
            raise UserError(
                "agent.source=least_squares needs a budget; set one, like budget=flops",
                field="agent.source",
                code="missing",
            )
        if self.threshold is None and not space.budgets:
            raise UserError(
                "agent=sensitivity with budget=none has no threshold to prune to; set agent.threshold, "
                "like agent.threshold=0.01",
                code="missing",
                field="agent.threshold",
            )

    def search(self, task: SearchTask) -> None:
        """Scores the original, every decision alone, and the strategy that they suggest.

        Raises:
            UserError: There are too few episodes, or neither a budget nor a threshold.
        """
        space = task.space
        self.check(space, task.episodes)
        if self.source == "least_squares":
            task.score([self._least_error(task)])
            return
        plans = self._fitting(space, task.episodes)
        unpruned = space.snap(np.zeros(len(space.names)))
        trials = task.score([unpruned, *(removed for alone in plans for removed in alone)])
        scored = iter([trial.score for trial in trials])
        original = next(scored)
        curves = curves_of(space, plans, original, [[next(scored) for _ in alone] for alone in plans])
        task.score([pick(space, curves, self.threshold).removed])

    def _least_error(self, task: SearchTask) -> Removed:
        errors = task.layer_errors()
        if errors is None:
            raise UserError(
                "agent.source=least_squares is not known for masked weights: use agent.source=accuracy",
                field="agent.source",
                code="unsupported",
            )
        return least_error(task.space, errors)

    def _fitting(self, space: SearchSpace, episodes: int) -> list[list[Removed]]:
        """The plan for as many ratios as ``episodes`` allow, evenly out of the list."""
        ratios = sorted(set(self.ratios))
        needed = 0
        for count in range(len(ratios), 0, -1):
            chosen = [ratios[int((k + 0.5) * len(ratios) / count)] for k in range(count)]
            plans = plan(space, chosen)
            needed = 2 + sum(map(len, plans))
            if needed <= episodes:
                if count < len(ratios):
                    log.warning(
                        "search.episodes=%d are too few for %d ratios of each of %d decisions: %d are scored, %s",
                        episodes,
                        len(ratios),
                        len(plans),
                        count,
                        chosen,
                    )
                return plans
        raise UserError(
            f"agent=sensitivity needs search.episodes={needed} at least for one ratio of each of "
            f"{len(space.names)} decisions, the original and the strategy picked; it is {episodes}",
            code="out_of_range",
            field="search.episodes",
        )
