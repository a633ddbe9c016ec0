"""The search space: decisions, strategies, costs and budgets, all in integers.

A strategy is identified by its integer counts. One rule bounds every cost exactly, after rounding: the least count of
the next decision is the smallest feasible one for which the cost, with everything later at its maximum, is within the
limit. Costs never rise when more is removed, so bisection finds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from amc_env.errors import UserError

Removed = tuple[int, ...]
"""Units removed from every decision: the identity of a strategy."""

_NEIGHBOURS = np.array([[-1], [0], [1]])


@dataclass(frozen=True)
class Decision:
    """How much of one decision is removed: ``removed`` of ``total`` units."""

    removed: int
    total: int

    @property
    def ratio(self) -> float:
        """The pruning ratio, in [0, 1)."""
        return self.removed / self.total

    @property
    def kept(self) -> int:
        """Units that stay."""
        return self.total - self.removed


@dataclass(frozen=True)
class Grid:
    """The feasible counts of one decision: 0, then ``first``, ``first + step`` and so on, up to ``most``.

    Attributes:
        name: The decision's name.
        total: Units that there are.
        step: Units between two feasible counts.
        most: The largest count that may be removed.
        first: The smallest count above 0; by default the least that leaves a multiple of ``step``.

    Examples:
        >>> [Grid("conv", total=10, step=4, most=8).count(i) for i in range(3)]
        [0, 2, 6]
    """

    name: str
    total: int
    step: int
    most: int
    first: int | None = None

    @property
    def _first(self) -> int:
        return self.first or self.total % self.step or self.step

    @property
    def size(self) -> int:
        """Number of feasible counts."""
        return 1 if self.most < self._first else 2 + (self.most - self._first) // self.step

    @property
    def max_ratio(self) -> float:
        """The largest feasible pruning ratio."""
        return self.count(self.size - 1) / self.total

    def count(self, index: int) -> int:
        """The feasible count of removed units at ``index``, in ascending order."""
        return 0 if index == 0 else self._first + (index - 1) * self.step

    def index(self, removed: int) -> int:
        """The place of a feasible count.

        Raises:
            UserError: ``removed`` is not a feasible count.
        """
        index = 0 if removed == 0 else 1 + (removed - self._first) // self.step
        if not 0 <= index < self.size or self.count(index) != removed:
            allowed = [self.count(i) for i in range(min(self.size, 12))]
            more = ", ..." if self.size > 12 else ""
            raise UserError(
                f"{self.name}: {removed} removed of {self.total} is not feasible; allowed: {allowed}{more}",
                code="does_not_fit",
            )
        return index

    def snap(self, ratio: float) -> int:
        """The feasible count nearest to ``ratio`` (ties to the smaller)."""
        target = min(max(ratio, 0.0), 1.0) * self.total
        guess = int((target - self._first) // self.step) + 1
        near = {min(max(guess + shift, 0), self.size - 1) for shift in (-1, 0, 1)}
        return min((self.count(i) for i in near), key=lambda count: (abs(count - target), count))


class Grids:
    """`Grid`'s counts and snapping for all decisions of a search at once, as arrays [decisions]."""

    def __init__(self, grids: Sequence[Grid]):
        first = [grid.count(1) for grid in grids]
        columns = [grid.step for grid in grids], [grid.size - 1 for grid in grids], [g.total for g in grids]
        self._first, self._step, self._last, self._totals = np.array([first, *columns], dtype=np.int64)
        self._decisions = np.arange(len(grids))

    def counts(self, index: np.ndarray) -> np.ndarray:
        """The feasible counts at these places, as `Grid.count`."""
        return np.where(index == 0, 0, self._first + (index - 1) * self._step)

    def nearest(self, ratios: np.ndarray) -> np.ndarray:
        """The places of the counts nearest to ``ratios`` (ties to the smaller), as `Grid.snap`."""
        target = np.minimum(np.maximum(ratios, 0.0), 1.0) * self._totals
        guess = ((target - self._first) // self._step).astype(np.int64) + 1
        near = np.minimum(np.maximum(guess + _NEIGHBOURS, 0), self._last)  # [3, decisions], ascending
        found: np.ndarray = near[np.abs(self.counts(near) - target).argmin(axis=0), self._decisions]
        return found


@dataclass(frozen=True)
class Strategy:
    """All decisions of a search, in order.

    Attributes:
        names: Names of the decisions.
        totals: Units of each decision.
        removed: Units removed from each: the strategy's identity.
    """

    names: tuple[str, ...]
    totals: tuple[int, ...]
    removed: tuple[int, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """The pruning ratio of each decision."""
        return tuple(r / t for r, t in zip(self.removed, self.totals, strict=True))

    @property
    def decisions(self) -> dict[str, Decision]:
        """The decisions by name."""
        return {n: Decision(r, t) for n, r, t in zip(self.names, self.removed, self.totals, strict=True)}

    def to_json(self) -> dict[str, Any]:
        """A plain object that `from_json` reads back."""
        return {
            "decisions": {
                name: {"removed": d.removed, "total": d.total, "ratio": round(d.ratio, 6)}
                for name, d in self.decisions.items()
            }
        }

    @classmethod
    def from_json(cls, obj: Mapping[str, Any], grids: Sequence[Grid]) -> Strategy:
        """Reads `to_json`'s object, checked against the decisions of a network.

        Raises:
            UserError: Decisions are missing or unknown, or a count does not fit; all problems in one message.
        """
        given = obj.get("decisions") if isinstance(obj, Mapping) else None
        if not isinstance(given, Mapping):
            raise UserError(
                "the strategy has no object 'decisions' of {name: {removed, total}}",
                code="wrong_type",
                field="strategy",
            )
        names = {grid.name for grid in grids}
        problems = [f"unknown decision {name!r}" for name in given if name not in names]
        removed: list[int] = []
        for grid in grids:
            entry = given.get(grid.name)
            if not isinstance(entry, Mapping) or "removed" not in entry:
                problems.append(f"decision {grid.name!r} is missing or has no count 'removed'")
            elif entry.get("total", grid.total) != grid.total:
                problems.append(f"{grid.name}: made for {entry['total']} units, the network has {grid.total}")
            elif type(entry["removed"]) is not int:
                problems.append(f"{grid.name}: removed={entry['removed']!r} is not a whole number")
            elif not 0 <= entry["removed"] < grid.total:
                problems.append(
                    f"{grid.name}: {entry['removed']} removed of {grid.total}; at least one must stay"
                )
            else:
                removed.append(entry["removed"])
        if problems:
            raise UserError(
                "the strategy does not fit the network: " + "; ".join(problems),
                code="does_not_fit",
                field="strategy",
            )
        return cls(tuple(g.name for g in grids), tuple(g.total for g in grids), tuple(removed))


@dataclass(frozen=True)
class Trial:
    """A scored strategy: what memory, journal, agents, progress and report pass around.

    Trials are equal when the same strategy scored the same, whenever that was and however long it took.

    Attributes:
        number: Place among the evaluations of a run, from 1.
        strategy: The strategy.
        start: Name of the weights that it was pruned from.
        repair: Name of the repair that it was scored with.
        score: On the search split, in [0, 1]; accuracy for classification.
        costs: All costs by name.
        met: Whether every budget is met.
        reward: The search's reward; may be minus infinity.
        seconds: Time by phase: ``repair`` (with pruning) and ``score``.
    """

    number: int = field(compare=False)
    strategy: Strategy
    start: str
    repair: str
    score: float
    costs: Mapping[str, float]
    met: bool
    reward: float
    seconds: Mapping[str, float] = field(default_factory=dict, compare=False)

    @property
    def removed(self) -> Removed:
        """Units removed from every decision."""
        return self.strategy.removed


def as_ratios(values: Sequence[float] | np.ndarray, count: int) -> np.ndarray:
    """Checks a vector of pruning ratios: ``count`` finite numbers, as float64."""
    ratios = np.asarray(values, dtype=np.float64).reshape(-1)
    if ratios.shape != (count,) or not np.isfinite(ratios).all():
        raise ValueError(f"{count} finite pruning ratios are needed, one per decision; got {values!r}")
    return ratios


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
                f"got ratio={ratio}, limit={limit}",
                code="conflict",
                field="budget",
            )
        unpruned = cost([0] * decisions)
        if ratio is not None:
            if not 0.0 < ratio <= 1.0:
                raise UserError(
                    f"budget.ratio={ratio} is outside (0, 1]: the share of {cost.name} that may remain",
                    code="out_of_range",
                    field="budget.ratio",
                )
            return cls(cost, ratio * unpruned, ratio)
        assert limit is not None
        if not limit > 0.0:
            raise UserError(
                f"budget.limit={limit} must be above 0 {cost.unit}", code="out_of_range", field="budget.limit"
            )
        return cls(cost, limit, limit / unpruned)


class SearchSpace:
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
            raise UserError(
                "there is nothing to decide: no channel group can be pruned with these settings",
                code="nothing_to_prune",
            )
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
            raise UserError("; ".join(unreachable), code="out_of_reach", field="budget")

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

    def project(self, ratios: Sequence[float] | np.ndarray) -> tuple[int, ...]:
        """Counts within every budget by the least common shift of all ratios.

        The least ``shift >= 0`` for which ``snap(min(max_i, ratio_i + shift))`` meets every budget. Bounding
        decision by decision instead would dump all cuts on the last ones.
        """
        return self._least_shift(as_ratios(ratios, len(self.grids)), least=0.0)

    def land(self, ratios: Sequence[float] | np.ndarray) -> tuple[int, ...]:
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


class Cost(Protocol):
    """A cost of a strategy, non-increasing in every decision."""

    @property
    def name(self) -> str:
        """Its name in results, e.g. ``macs``."""
        ...

    @property
    def unit(self) -> str:
        """Its unit, for people."""
        ...

    def __call__(self, removed: Sequence[int]) -> float:
        """The cost when ``removed`` units (one count per decision) are gone."""
        ...
