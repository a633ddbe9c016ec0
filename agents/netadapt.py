"""NetAdapt: a network cut greedily, one decision a round, each round tuned before the next.

Yang et al., "NetAdapt: Platform-Aware Neural Network Adaptation for Mobile Applications", ECCV 2018, section 3; the
other choice of a winner is that of the authors' release.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import count
from typing import ClassVar, Literal

import numpy as np

from agents.base import Agent, SearchTask
from amc_env.errors import UserError
from amc_env.space import Budget, Removed, SearchSpace, Trial
from amc_env.validation import Fraction, Share, settings

log = logging.getLogger(__name__)

_HALVINGS = 5  # of a round's reduction that no decision can give
_BISECTIONS = 32  # of a shift in ratios; far below one unit of any layer
_SLACK = 1 + 1e-12  # a limit is a rounded product


@settings
class NetAdapt(Agent):
    """Takes the resource down round by round, by the decision whose cut costs the least accuracy.

    A round aims at a reduction of the resource. Every decision is cut alone, by the least count that gives it; the
    proposals are repaired, shortly fine-tuned and scored; the winner's weights are what the next round cuts. The
    resource is the budget's cost; of several budgets, that which is furthest from its limit. The last round aims at
    the limit itself. Where no decision can give the reduction, half of it is asked for, and so on; where none lowers the
    resource alone (peak memory in two places at once), all are cut together.

    It spends as many evaluations as the budget takes: `planned` estimates them, and ``search.episodes`` does not matter.

    Attributes:
        reduction: Of the first round, as a share of the original's resource (the release's 0.025).
        decay: Its factor a round (the release's 0.96; 1 keeps it constant).
        choice: The winner has the highest accuracy (``accuracy``, the paper) or gives up the least accuracy for the
            resource saved (``exchange``, the release). Ties in accuracy go to what saves more.
    """

    name: ClassVar[str] = "netadapt"
    steps: ClassVar[bool] = False
    tunes: ClassVar[bool] = True

    reduction: Fraction = 0.025
    decay: Share = 0.96
    choice: Literal["accuracy", "exchange"] = "accuracy"

    def check(self, space: SearchSpace, episodes: int) -> None:
        """Refuses a search space without a budget.

        Raises:
            UserError: There is none.
        """
        if not space.budgets:
            raise UserError(
                "agent=netadapt adapts a network to a budget, and there is none; set one, like budget=flops",
                code="missing",
                field="budget",
            )

    def planned(self, space: SearchSpace, episodes: int) -> int:
        """Evaluations that the schedule takes, if every round saves what it aims at."""
        ratio = min((budget.ratio for budget in space.budgets), default=1.0)
        left, rounds = 1.0, 0
        while left > ratio + 1e-9 and self._share(rounds + 1) > 1e-6:
            rounds += 1
            left -= self._share(rounds)
        return 1 + rounds * (len(space.names) + 1)

    def _share(self, number: int) -> float:
        """What a round aims at, as a share of the original's resource."""
        return self.reduction * self.decay ** (number - 1)

    def search(self, task: SearchTask) -> None:
        """Run rounds until every budget holds.

        Raises:
            UserError: There is no budget.
        """
        self.check(task.space, task.episodes)
        state = task.score([task.space.snap(np.zeros(len(task.space.names)))])[0]
        for number in count(1):
            if task.space.met(state.removed):
                return
            budget = _furthest(task.space.budgets, state.removed)
            proposals = self._proposals(task.space, budget, state.removed, number)
            winner = self._winner(state, task.score(proposals), budget)
            task.adopt(winner.removed)
            state = task.score([winner.removed])[0]

    def _proposals(self, space: SearchSpace, budget: Budget, removed: Removed, number: int) -> list[Removed]:
        """Each decision cut alone by the least count that gives the round's reduction; those that can."""
        now, wanted = budget.cost(removed), self._share(number) * budget.cost([0] * len(removed))
        for halving in range(_HALVINGS):
            target = max(budget.limit, now - wanted / 2**halving)
            found = [cut(space, budget, removed, place, target) for place in range(len(removed))]
            proposals = [proposal for proposal in found if proposal is not None]
            if proposals:
                return proposals
        log.info("round %d: no decision alone saves enough, so all are cut together", number)
        return [cut_together(space, budget, removed, max(budget.limit, now - wanted))]

    def _winner(self, state: Trial, trials: Sequence[Trial], budget: Budget) -> Trial:
        now = budget.cost(state.removed)

        def worth(trial: Trial) -> tuple[float, float]:
            saved = now - budget.cost(trial.removed)
            if self.choice == "accuracy":
                return trial.score, saved
            lost = 100 * (state.score - trial.score)
            return -(lost + 1e-6) / (saved + 1e-5), saved  # the release's constants, accuracy in percent

        return max(trials, key=worth)  # the first of equals


def _furthest(budgets: Sequence[Budget], removed: Removed) -> Budget:
    return max(budgets, key=lambda budget: budget.cost(removed) / budget.limit)


def cut(space: SearchSpace, budget: Budget, removed: Removed, place: int, target: float) -> Removed | None:
    """The least further cut of one decision that takes a cost down to a target, found by bisection.

    Args:
        space: The decisions.
        budget: Has the cost, which never rises when more is removed.
        removed: What is gone already.
        place: The decision's.
        target: The most that the cost may be.

    Returns:
        The strategy; None where the decision alone cannot reach the target.
    """

    def at(index: int) -> Removed:
        return (*removed[:place], grid.count(index), *removed[place + 1 :])

    grid = space.grids[place]
    low, high = 0, grid.size - 1
    if grid.count(high) <= removed[place] or budget.cost(at(high)) > target * _SLACK:
        return None
    while low < high:
        middle = (low + high) // 2
        if grid.count(middle) > removed[place] and budget.cost(at(middle)) <= target * _SLACK:
            high = middle
        else:
            low = middle + 1
    return at(high)


def cut_together(space: SearchSpace, budget: Budget, removed: Removed, target: float) -> Removed:
    """The least common further cut of all decisions, in ratios, that takes a cost down to a target.

    Args:
        space: The decisions; with all at their most they are within every limit.
        budget: Has the cost.
        removed: What is gone already.
        target: The most that the cost may be, at least the limit.
    """
    ratios = np.array(removed) / np.array(space.totals)

    def shifted(shift: float) -> Removed:
        counts = space.snap(np.minimum(ratios + shift, space.maxima))
        return tuple(max(pair) for pair in zip(counts, removed, strict=True))

    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if budget.cost(shifted(middle)) <= target * _SLACK:
            high = middle
        else:
            low = middle
    return shifted(high)
