"""Where a unit is timed: grids of channel counts that grow until interpolation foretells what is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from amc_env.costs.counts import kept_channels
from amc_env.costs.latency.table import Ints, Times
from amc_env.costs.latency.timing import Timing
from amc_env.costs.latency.units import Unit, units_of
from amc_env.graph.layers import LayerGraph
from amc_env.space import Grid

Channels = tuple[int, int]
"""Inputs, of a depthwise unit 1, and outputs."""


@dataclass(frozen=True)
class _Interval:
    """A stretch of an axis: places in the counts that it can have, and whether what it is half of was foretold."""

    axis: int
    low: int
    high: int
    foretold: bool = False

    @property
    def middle(self) -> int:
        """The place halfway."""
        return (self.low + self.high) // 2

    def halves(self, foretold: bool) -> list[_Interval]:
        """Both."""
        ends = (self.low, self.middle), (self.middle, self.high)
        return [_Interval(self.axis, low, high, foretold) for low, high in ends]


class Sheet:
    """The growing grid of one unit.

    Args:
        unit: What is timed.
        reach: The counts that its inputs and outputs can have, ascending.
        allowed_ms: The mean miss of interpolation along a line of the grid that is left as it is.
    """

    def __init__(self, unit: Unit, reach: tuple[Sequence[int], Sequence[int]], allowed_ms: float):
        self.unit, self._reach, self._allowed = unit, reach, allowed_ms
        self._chosen = [{0, len(counts) - 1} for counts in reach]
        self._open = [_Interval(axis, 0, len(counts) - 1) for axis, counts in enumerate(reach)]
        self._times: dict[Channels, Timing] = {}
        self.worst_ms = math.inf  # the largest miss of the last round

    def wanted(self, room: int) -> list[Channels]:
        """Points to time next: the middles of all open intervals are new lines of the grid.

        Args:
            room: The most points that may be. Where they are more, nothing is refined any further.
        """
        self._open = [interval for interval in self._open if interval.high - interval.low > 1]
        before = [set(chosen) for chosen in self._chosen]
        for interval in self._open:
            self._chosen[interval.axis].add(interval.middle)
        inputs, outputs = self._counts()
        points = [(i, o) for i in inputs for o in outputs if (i, o) not in self._times]
        if self._times and len(points) > room:
            self._chosen, self._open, points = before, [], []
        return points

    def take(self, times: Mapping[Channels, Timing]) -> None:
        """Writes timings down. An interval whose middle its ends foretold is open once more, in case that was luck."""
        self._times |= times
        halves = []
        misses = [self._miss(interval) for interval in self._open]
        self.worst_ms = max(misses, default=0.0)
        for interval, miss in zip(self._open, misses, strict=True):
            missed = miss > self._allowed
            if missed or not interval.foretold:
                halves += interval.halves(foretold=not missed)
        self._open = halves

    def fitted(self) -> Times:
        """The grid, made monotone."""
        inputs, outputs = self._counts()
        return Times.fitted(inputs, outputs, [[self._times[i, o].median_ms for o in outputs] for i in inputs])

    def _counts(self) -> tuple[list[int], list[int]]:
        inputs, outputs = (
            [counts[i] for i in sorted(chosen)]
            for counts, chosen in zip(self._reach, self._chosen, strict=True)
        )
        return inputs, outputs

    def _miss(self, interval: _Interval) -> float:
        """Mean milliseconds by which a line of the grid is off those beside it, beyond what timing itself is off."""
        axis = interval.axis
        before, at, after = (self._reach[axis][i] for i in (interval.low, interval.middle, interval.high))
        share = (at - before) / (after - before)
        misses = []
        for other in self._counts()[1 - axis]:
            a, m, b = (self._times[(c, other) if axis == 0 else (other, c)] for c in (before, at, after))
            miss = m.median_ms - (1 - share) * a.median_ms - share * b.median_ms
            noise = math.hypot(_error(m), (1 - share) * _error(a), share * _error(b))
            misses.append(max(0.0, abs(miss) - 2 * noise))
        return float(np.mean(misses))


def _error(timing: Timing) -> float:
    """The standard error of a median, had the runs a normal distribution with these quartiles."""
    return 1.253 * (timing.high_ms - timing.low_ms) / 1.349 / math.sqrt(timing.runs)


def sheets_of(model: nn.Module, graph: LayerGraph, grids: Sequence[Grid], allowed_ms: float) -> list[Sheet]:
    """An empty grid for each distinct unit, with the counts that decisions can leave it."""
    sizes, per_unit = kept_channels(graph)
    reach: dict[Unit, tuple[set[int], set[int]]] = {}
    for row, unit in enumerate(units_of(model, graph).values()):
        inputs, outputs = reach.setdefault(unit, (set(), set()))
        inputs |= {1} if unit.depthwise else _reachable(sizes[row, 0], per_unit[row, 0], grids)
        outputs |= _reachable(sizes[row, 1], per_unit[row, 1], grids)
    return [Sheet(unit, (sorted(i), sorted(o)), allowed_ms) for unit, (i, o) in reach.items()]


def _reachable(size: int, per_unit: Ints, grids: Sequence[Grid]) -> set[int]:
    found = {int(size)}
    for each, grid in zip(per_unit.tolist(), grids, strict=True):
        if each:
            found = {whole - each * grid.count(i) for whole in found for i in range(grid.size)}
    return found
