"""Building a latency table from few timings, and checking it against measured networks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from torch import nn

from amc_env.costs.latency.cost import Latency
from amc_env.costs.latency.refining import Channels, Sheet, sheets_of
from amc_env.costs.latency.runtimes import Runtime
from amc_env.costs.latency.table import Conditions, Correction, LatencyTable
from amc_env.costs.latency.timing import Timing, interleaved, warn_where_busy
from amc_env.costs.latency.units import Unit
from amc_env.costs.memory import Activations
from amc_env.inputs import Inputs, count, device_of
from amc_env.pruning.candidate import Candidates
from amc_env.space import Grid
from amc_env.system import using_threads

_WARMUP = 5  # rounds before the timing


_LARGEST_ROUND = 2**26  # weights and inputs of the units that are timed in one round: 256 MiB


Key = TypeVar("Key", bound=Hashable)


Point = tuple[Unit, Channels]
"""A unit and its inputs and outputs."""


Run = tuple[nn.Module, Inputs]
"""What is run, on what."""


@dataclass(frozen=True)
class Progress:
    """How far the building or checking of a table is.

    Attributes:
        stage: ``units`` or ``networks``.
        done: Timings (points or networks) that are finished.
        total: Timings known so far; refining adds to them.
    """

    stage: str
    done: int
    total: int


OnProgress = Callable[[Progress], None]


def build_table(
    candidates: Candidates,
    grids: Sequence[Grid],
    example: Inputs,
    *,
    runtime: Runtime,
    threads: int,
    activations: Activations | None = None,
    tolerance: float = 0.05,
    repeats: int = 30,
    networks: int = 20,
    points: int = 1500,
    on_progress: OnProgress | None = None,
    seed: int = 0,
) -> LatencyTable:
    """Times a network's units where their channels can be, and fits the correction on complete networks.

    Distinct units are timed once, at the ends, the middle and the quarters of the channel counts that decisions can
    reach. An interval between counts is halved on, down to neighbouring ones, where its middle is not what its ends
    foretold, by more than ``tolerance``: so that steps of vector widths come out where there are any.

    Args:
        candidates: Builds the pruned networks; its graph has one group a decision.
        grids: The decisions' feasible counts.
        example: The batch, on the device of the use.
        runtime: What runs the units and networks.
        threads: Threads of the processor.
        activations: Elements of the network's operations; None: the correction has no part for them.
        tolerance: The largest miss of interpolation that is left as it is, as a share of the network's latency
            divided by its layers.
        repeats: Timed passes of a point.
        networks: Complete networks for the correction, the original and the most pruned among them.
        points: The most that are timed beyond the ends and middles: on a busy machine noise looks like steps.
        on_progress: Called after every set of timings.
        seed: Of the orders of timing and the random networks.
    """
    started = time.perf_counter()
    clock = _Clock(runtime, example, repeats, on_progress or (lambda _: None), seed)
    model, graph = candidates.original, candidates.graph
    with using_threads(threads):
        unpruned = clock.reference(model)
        sheets = sheets_of(model, graph, grids, tolerance * unpruned / len(graph.layers))
        _refine(sheets, clock, points)
        conditions = Conditions.here(runtime.name, threads, count(example), str(device_of(example)))
        table = LatencyTable(
            conditions, {sheet.unit: sheet.fitted() for sheet in sheets}, points=clock.points
        )
        plain = Latency(model, graph, table, activations)
        most = tuple(grid.count(grid.size - 1) for grid in grids)
        strategies = [(0,) * len(grids), *random_strategies(grids, networks - 2, seed), most]
        measured = clock.networks({removed: candidates.build(removed) for removed in strategies})
    correction = fit_correction([plain.parts(r) for r in measured], [t.median_ms for t in measured.values()])
    seconds = time.perf_counter() - started
    return replace(table, correction=correction, forwards=clock.forwards, seconds=seconds)


def fit_correction(parts: Sequence[tuple[float, float, float]], measured_ms: Sequence[float]) -> Correction:
    """Least squares in relative errors; factors are at least 0.

    The first network counts as much as all others: it is the original, and budgets are shares of it.

    Args:
        parts: Of each network what `Latency.parts` gives.
        measured_ms: Its measured latency.
    """
    measured = np.asarray(measured_ms)
    columns = np.column_stack([np.asarray(parts, dtype=np.float64), np.ones(len(parts))])
    columns[:, 1:-1] *= np.ptp(columns[:, 1:-1], axis=0) > 0  # what is the same of all networks is a constant
    size = np.maximum(np.abs(columns).max(axis=0), 1e-12)
    weights = np.ones(len(parts))
    weights[0] = np.sqrt(max(1, len(parts) - 1))
    system = columns / size * (weights / measured)[:, None]
    bounds = [0.0, 0.0, 0.0, -np.inf], np.inf
    from scipy.optimize import lsq_linear  # half a second to import

    found = lsq_linear(system, weights, bounds=bounds, method="bvls").x / size
    return Correction(*(float(value) for value in np.where(columns.any(axis=0), found, 0.0)))


def random_strategies(grids: Sequence[Grid], count: int, seed: int) -> list[tuple[int, ...]]:
    """Counts removed of random strategies, from next to nothing to nearly the most.

    Ratios of strategy k are ``u ** (1 / level - 1)`` of the largest with ``u`` uniform in (0, 1), whose mean is
    ``level = (k + 1/2) / count``: ratios drawn uniformly would make networks that all take about as long.
    """
    generator = np.random.default_rng(seed)
    largest = np.array([grid.max_ratio for grid in grids])
    strategies = []
    for k in range(count):
        level = (k + 0.5) / count
        ratios = largest * generator.uniform(size=len(grids)) ** (1 / level - 1)
        strategies.append(tuple(grid.snap(ratio) for grid, ratio in zip(grids, ratios, strict=True)))
    return strategies


@dataclass(frozen=True)
class Checked:
    """Predictions beside measurements.

    Attributes:
        strategies: Counts removed.
        predicted_ms: Milliseconds by the table.
        measured: Complete networks, timed interleaved.
        original_ms: The uncut network's milliseconds by the table, and as measured in the same rounds.
    """

    strategies: tuple[tuple[int, ...], ...]
    predicted_ms: tuple[float, ...]
    measured: tuple[Timing, ...]
    original_ms: tuple[float, float]

    @property
    def errors(self) -> tuple[float, ...]:
        """Of each network (predicted - measured) / measured."""
        pairs = zip(self.predicted_ms, self.measured, strict=True)
        return tuple(predicted / timing.median_ms - 1 for predicted, timing in pairs)

    @property
    def share_errors(self) -> tuple[float, ...]:
        """The same of shares of the original's latency, in which a budget is given.

        A machine that runs at another speed today than when the table was built moves milliseconds, and shares hardly.
        """
        predicted, measured = self.original_ms
        return tuple((1 + error) * measured / predicted - 1 for error in self.errors)

    @property
    def median_share_error(self) -> float:
        """The median absolute error of shares."""
        return float(np.median(np.abs(self.share_errors)))

    @property
    def median_error(self) -> float:
        """The median absolute error, as a share of the measured latency."""
        return float(np.median(np.abs(self.errors)))

    @property
    def largest_error(self) -> float:
        """The largest absolute error, as a share of the measured latency."""
        return float(np.abs(self.errors).max())

    @property
    def rank_correlation(self) -> float:
        """Spearman's, between predicted and measured latency; NaN where either is the same for all networks."""
        columns = self.predicted_ms, [timing.median_ms for timing in self.measured]
        if any(len(set(column)) < 2 for column in columns):  # a busy machine can make a table flat
            return math.nan
        from scipy.stats import spearmanr

        return float(spearmanr(*columns).statistic)


def check_table(
    latency: Latency,
    candidates: Candidates,
    example: Inputs,
    *,
    runtime: Runtime,
    threads: int,
    strategies: Sequence[tuple[int, ...]],
    repeats: int = 30,
    on_progress: OnProgress | None = None,
    seed: int = 0,
) -> Checked:
    """Measure complete networks, interleaved, beside the predictions of the table.

    Args:
        latency: The table's predictions.
        candidates: Builds the networks.
        example: The batch, on the device of the use.
        runtime: What runs the networks.
        threads: Threads of the processor.
        strategies: Counts removed, of networks that building did not use (`random_strategies` of another seed).
        repeats: Timed passes of a network.
        on_progress: Called before and after.
        seed: Of the order of timing.
    """
    distinct = list(dict.fromkeys(strategies))
    unpruned = (0,) * len(distinct[0])
    clock = _Clock(runtime, example, repeats, on_progress or (lambda _: None), seed)
    with using_threads(threads):
        networks = {removed: candidates.build(removed) for removed in dict.fromkeys([*distinct, unpruned])}
        measured = clock.networks(networks)
    predicted = tuple(latency(removed) for removed in distinct)
    original = latency(unpruned), measured[unpruned].median_ms
    return Checked(tuple(distinct), predicted, tuple(measured[removed] for removed in distinct), original)


class _Clock:
    """Times units and networks, and counts."""

    def __init__(self, runtime: Runtime, example: Inputs, repeats: int, report: OnProgress, seed: int):
        self._runtime, self._example, self._repeats = runtime, example, repeats
        self._report, self._seed = report, seed
        self._reference: tuple[nn.Module, float] | None = None
        self.points = self.forwards = 0

    def reference(self, model: nn.Module) -> float:
        """Times the network that is timed again beside all units; gives its milliseconds."""
        ms = self.interleaved({None: (model, self._example)}, settle=1)[None].median_ms
        self._reference = model, ms
        return ms

    def networks(self, models: Mapping[tuple[int, ...], nn.Module]) -> dict[tuple[int, ...], Timing]:
        """Complete networks on the example."""
        self._report(Progress("networks", 0, len(models)))
        runs = {key: (model, self._example) for key, model in models.items()}
        found = self.interleaved(runs, settle=1)
        self._report(Progress("networks", len(models), len(models)))
        warn_where_busy(list(found.values()))
        return found

    def units(self, points: Sequence[Point]) -> dict[Point, Timing]:
        """Units at their channels, in rounds of so many that memory holds them.

        Rounds are seconds apart, and by then a busy or hot machine has another speed, which interpolation would take
        for a step. So all times are put at the speed that the reference had at first.
        """
        assert self._reference is not None
        model, first_ms = self._reference
        found: dict[Point, Timing] = {}
        for some in _portions(points, count(self._example)):
            self._report(Progress("units", self.points, self.points + len(points) - len(found)))
            runs: dict[Point | None, Run] = {point: self._unit(*point) for point in some}
            times = self.interleaved(runs | {None: (model, self._example)}, settle=1)
            speed = first_ms / times[None].median_ms
            found |= {point: _scaled(times[point], speed) for point in some}
            self.points += len(some)
        self._report(Progress("units", self.points, self.points))
        return found

    def _unit(self, unit: Unit, channels: Channels) -> Run:
        inputs, outputs = channels
        into = unit.example(count(self._example), outputs if unit.depthwise else inputs)
        device = device_of(self._example)
        return unit.build(inputs, outputs).to(device), into.to(device)

    def interleaved(self, runs: Mapping[Key, Run], settle: int = 0) -> dict[Key, Timing]:
        """Modules on their inputs; ``settle`` times run before they are timed."""
        calls = {key: self._runtime.prepare(model, into) for key, (model, into) in runs.items()}
        self.forwards += len(calls) * (_WARMUP + self._repeats * (1 + settle))
        return interleaved(calls, repeats=self._repeats, warmup=_WARMUP, settle=settle, seed=self._seed)


def _scaled(timing: Timing, factor: float) -> Timing:
    return Timing(timing.median_ms * factor, timing.low_ms * factor, timing.high_ms * factor, timing.runs)


def _portions(points: Sequence[Point], batch: int) -> list[list[Point]]:
    """The points in portions of at most ``_LARGEST_ROUND`` weights and inputs, each of at least one point."""
    portions: list[list[Point]] = []
    room = 0
    for unit, (inputs, outputs) in points:
        pixels = batch * unit.in_size[0] * unit.in_size[1]
        size = inputs * outputs * unit.kernel[0] * unit.kernel[1]
        size += pixels * (outputs if unit.depthwise else inputs)
        if size > room or not portions:
            portions.append([])
            room = _LARGEST_ROUND
        portions[-1].append((unit, (inputs, outputs)))
        room -= size
    return portions


def _refine(sheets: Sequence[Sheet], clock: _Clock, most: int) -> None:
    """Times what the sheets want until they want no more or there are too many; each round takes in all of them."""
    while True:
        points: list[Point] = []
        for sheet in sorted(sheets, key=lambda sheet: -sheet.worst_ms):  # those that miss most come first
            points += [(sheet.unit, channels) for channels in sheet.wanted(most - clock.points - len(points))]
        if not points:
            return
        times = clock.units(points)
        for sheet in sheets:
            sheet.take({channels: time for (unit, channels), time in times.items() if unit == sheet.unit})
