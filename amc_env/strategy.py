"""Decisions and strategies: integers that say how much of every decision is removed.

A *pruning ratio* is the share removed, in [0, 1). Ratios are what people and policies speak of; the integer
counts are what everything here is identified by (journal, memo, JSON), so no rounding can make two strategies
out of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from amc_env.errors import UserError

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

    Example:
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
                f"{self.name}: {removed} removed of {self.total} is not feasible; allowed: {allowed}{more}"
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
            raise UserError("the strategy has no object 'decisions' of {name: {removed, total}}")
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
            raise UserError("the strategy does not fit the network: " + "; ".join(problems))
        return cls(tuple(g.name for g in grids), tuple(g.total for g in grids), tuple(removed))


def as_ratios(values: Sequence[float] | np.ndarray, count: int) -> np.ndarray:
    """Checks a vector of pruning ratios: ``count`` finite numbers, as float64."""
    ratios = np.asarray(values, dtype=np.float64).reshape(-1)
    if ratios.shape != (count,) or not np.isfinite(ratios).all():
        raise ValueError(f"{count} finite pruning ratios are needed, one per decision; got {values!r}")
    return ratios
