"""Budgets, and the search problem as whole strategies see it.

One rule bounds every cost exactly, after rounding: the least count for the next decision is the smallest
feasible one for which the cost, with everything later at its maximum, is within the limit. Costs never rise
when more is removed, so bisection finds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from amc_env.costs import Cost
from amc_env.errors import UserError
from amc_env.strategy import Grid, Grids, Strategy, as_ratios

_BISECTIONS = 48  # halvings of a shift in ratios; far below one unit of any layer


def figure(value: float) -> str:
    """A cost for people: 40551552 -> '40,551,552'; 1.23456 -> '1.235'."""
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.4g}"


@dataclass(frozen=True)
class Budget:
    """A limit on a cost.

    Attributes:
        cost: What is limited.
        limit: The most it may be, in the cost's unit.
        ratio: The share of the original cost that ``limit`` is.
    """

    cost: Cost
    limit: float
    ratio: float

    def met(self, removed: Sequence[int]) -> bool:
        """Whether a strategy is within the limit."""
        return self.cost(removed) <= self.limit * (1 + 1e-12)  # the limit itself is a rounded product

    @classmethod
    def of(
        cls, cost: Cost, decisions: int, *, ratio: float | None = None, limit: float | None = None
    ) -> Budget:
        """A budget from a share of the original cost or from an absolute limit.

        Raises:
            UserError: Neither or both are given, or the value is out of range.
        """
        if (ratio is None) == (limit is None):
            raise UserError(
                f"a budget on {cost.name} takes budget.ratio or budget.limit, one of the two; "
                f"got ratio={ratio}, limit={limit}"
            )
        whole = cost([0] * decisions)
        if ratio is not None:
            if not 0.0 < ratio <= 1.0:
                raise UserError(
                    f"budget.ratio={ratio} is outside (0, 1]: the share of {cost.name} that may remain"
                )
            return cls(cost, ratio * whole, ratio)
        assert limit is not None
        if not limit > 0.0:
            raise UserError(f"budget.limit={limit} must be above 0 {cost.unit}")
        return cls(cost, limit, limit / whole)


class Problem:
    """Decisions, costs and budgets together: everything about a strategy but its accuracy.

    Args:
        grids: The decisions' feasible counts, in the order of decisions.
        costs: All costs that outcomes state.
        budgets: Limits that must hold; none for an accuracy-guaranteed search.

    Raises:
        UserError: A budget is below the least that the decisions can reach.
    """

    def __init__(self, grids: Sequence[Grid], costs: Sequence[Cost], budgets: Sequence[Budget] = ()):
        if not grids:
            raise UserError("there is nothing to decide: no channel group can be pruned with these settings")
        self.grids = tuple(grids)
        self.costs = tuple(costs)
        self.budgets = tuple(budgets)
        self.names = tuple(grid.name for grid in grids)
        self.totals = tuple(grid.total for grid in grids)
        self.most = tuple(grid.count(grid.size - 1) for grid in grids)
        self.maxima = np.array([grid.max_ratio for grid in grids])
        self._together = Grids(grids)
        unreachable = [
            f"budget {b.cost.name} <= {figure(b.limit)} ({b.ratio:.3g} of the original) cannot be reached: "
            f"the least is {figure(b.cost(self.most))} ({self.least_ratio(b.cost):.3g}); "
            "raise budget.ratio or granularity.max_ratio, or lower channel_multiple"
            for b in self.budgets
            if not b.met(self.most)
        ]
        if unreachable:
            raise UserError("; ".join(unreachable))

    def least_ratio(self, cost: Cost) -> float:
        """The least share of the original cost that the decisions can reach."""
        return cost(self.most) / cost([0] * len(self.grids))

    def cost(self, removed: Sequence[int]) -> dict[str, float]:
        """All costs of a strategy, by name."""
        return {cost.name: cost(removed) for cost in self.costs}

    def met(self, removed: Sequence[int]) -> bool:
        """Whether every budget holds."""
        return all(budget.met(removed) for budget in self.budgets)

    def strategy(self, removed: Sequence[int]) -> Strategy:
        """The strategy of these counts."""
        return Strategy(self.names, self.totals, tuple(int(r) for r in removed))

    def least(self, chosen: Sequence[int]) -> int:
        """The least feasible count for decision ``len(chosen)``, given the counts before it.

        Returns:
            The smallest feasible count that can still meet every budget with everything later at its maximum;
            the largest feasible count where none can (the counts chosen were not bounded).
        """
        t = len(chosen)
        grid = self.grids[t]
        later = self.most[t + 1 :]
        if self.met((*chosen, 0, *later)):  # true of most decisions of an episode
            return 0
        low, high = 0, grid.size - 1
        while low < high:
            middle = (low + high) // 2
            if self.met((*chosen, grid.count(middle), *later)):
                high = middle
            else:
                low = middle + 1
        return grid.count(high)

    def snap(self, ratios: Sequence[float] | np.ndarray) -> tuple[int, ...]:
        """The nearest feasible counts."""
        return self._counts(self._together.nearest(as_ratios(ratios, len(self.grids))))

    def _counts(self, index: np.ndarray) -> tuple[int, ...]:
        return tuple(self._together.counts(index).tolist())

    def project(self, ratios: Sequence[float]) -> tuple[int, ...]:
        """Counts within every budget by the least common shift of all ratios.

        The least ``shift >= 0`` for which ``snap(min(max_i, ratio_i + shift))`` meets every budget. Bounding
        decision by decision instead would dump all cuts on the last ones.
        """
        return self._least_shift(as_ratios(ratios, len(self.grids)), least=0.0)

    def land(self, ratios: Sequence[float]) -> tuple[int, ...]:
        """Counts on the budget: ratios shifted either way by the least amount that still meets every budget.

        Without a budget the counts are `snap`'s.
        """
        values = as_ratios(ratios, len(self.grids))
        return self._least_shift(values, least=-float(values.max())) if self.budgets else self.snap(values)

    def _least_shift(self, values: np.ndarray, *, least: float) -> tuple[int, ...]:
        def shifted(by: float) -> np.ndarray:
            return self._together.nearest(np.minimum(values + by, self.maxima))

        low, high = least, max(least, float((self.maxima - values).max()))  # all are at their maximum there
        under, over = shifted(low), shifted(high)
        if self.met(self._counts(under)):
            return self._counts(under)
        for _ in range(_BISECTIONS):
            if (over - under).sum() <= 1:  # one step of one decision: no shift gives anything in between
                break
            middle = (low + high) / 2
            index = shifted(middle)
            if self.met(self._counts(index)):
                high, over = middle, index
            else:
                low, under = middle, index
        return self._counts(over)
