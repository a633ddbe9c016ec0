"""Building and checking tables, against runtimes whose times are known."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from networks import images, problem
from torch import Tensor, nn

from amc_env.costs.latency import Timing, runtime, sampling
from amc_env.costs.latency.cost import Latency
from amc_env.costs.latency.sampling import (
    Checked,
    Progress,
    build_table,
    check_table,
    fit_correction,
    random_strategies,
)
from amc_env.costs.latency.table import LatencyTable
from amc_env.costs.memory import Activations
from amc_env.graph.layers import Layer
from amc_env.graph.tracing import trace_layers
from amc_env.pruning.candidate import Candidates
from amc_env.space import Grid

Ms = Callable[[Layer], float]
SLOWER, CALL = 1.5, 0.2  # of layers within a network, and of every network


def bilinear(layer: Layer) -> float:
    """Milliseconds that interpolation needs the ends alone for."""
    return 0.01 + 1e-4 * layer.positions * layer.in_channels * layer.out_channels / layer.groups


def in_steps(layer: Layer) -> float:
    """Milliseconds of a processor that takes 8 outputs at once."""
    return 0.01 + 1e-3 * layer.positions * -(-layer.out_channels // 8)


_TRACED: dict[tuple[str, torch.Size], tuple[Layer, ...]] = {}


def traced_layers(model: nn.Module, example: Tensor) -> tuple[Layer, ...]:
    """The layers; equal networks are traced once, which is most of the time that a table takes here."""
    key = str(model), example.shape
    if key not in _TRACED:
        _TRACED[key] = trace_layers(model, example).layers
    return _TRACED[key]


@dataclass
class Known:
    """A runtime that takes ``ms`` for each layer; whole networks (of more than one) are slower, and cost a call.

    ``slowing`` is the share by which every pass takes longer than the one before, and ``disturbed`` the share
    that every other pair of them takes longer.
    """

    ms: Ms
    name: str = "known"
    slowing: float = 0.0
    disturbed: float = 0.0
    passes: list[int] = field(default_factory=list)

    def check(self) -> None:
        """Any machine can."""

    def prepare(self, model: nn.Module, example: Tensor) -> Callable[[], float]:
        layers = traced_layers(model, example)
        alone = sum(map(self.ms, layers))
        took = alone if len(layers) == 1 else SLOWER * alone + CALL

        def call() -> float:
            self.passes.append(len(layers))
            disturbance = self.disturbed * (len(self.passes) % 4 < 2)
            return took * (1 + disturbance) * (1 + self.slowing) ** len(self.passes)

        return call


EACH = 5 + 3 * 2
"""Passes of what is timed three times: five to warm up, and one before each to settle."""


def built(
    name: str, known: Known, multiple: int = 2, **options: object
) -> tuple[LatencyTable, Candidates, tuple[Grid, ...]]:
    candidates, grids = problem(name, multiple)
    activations = Activations(candidates.original, candidates.graph, grids, images(1))
    table = build_table(
        candidates, grids, images(2), runtime=known, threads=1, activations=activations, repeats=3, **options
    )
    return table, candidates, grids


def checked(
    table: LatencyTable, candidates: Candidates, grids: tuple[Grid, ...], known: Known, count: int = 8
) -> Checked:
    activations = Activations(candidates.original, candidates.graph, grids, images(1))
    latency = Latency(candidates.original, candidates.graph, table, activations)
    strategies = random_strategies(grids, count, seed=99)
    return check_table(
        latency, candidates, images(2), runtime=known, threads=1, strategies=strategies, repeats=2
    )


@pytest.mark.parametrize("name", ["residual", "grouped", "concat", "gated"])
def test_bilinear_times_need_few_points_and_networks_are_predicted_exactly(name: str) -> None:
    known = Known(bilinear)
    table, candidates, grids = built(name, known)
    assert table.points <= 25 * len(table.units)  # the ends, the middle and the quarters of both axes
    assert table.correction.scale == pytest.approx(SLOWER, rel=1e-3)
    assert table.correction.constant_ms == pytest.approx(CALL, rel=1e-3)
    found = checked(table, candidates, grids, known)
    assert found.largest_error < 1e-6
    assert found.rank_correlation == pytest.approx(1.0)
    depthwise = [times for unit, times in table.units.items() if unit.depthwise]
    assert bool(depthwise) == (name == "gated")
    assert all(times.inputs == (1,) and len(times.outputs) >= 2 for times in depthwise)
    equal = name in ("residual", "gated")  # some units are, and are timed once
    assert (len(table.units) < len(candidates.graph.layers)) is equal


def test_a_machine_that_slows_down_shows_no_steps() -> None:
    known = Known(bilinear, slowing=3e-4)
    table, *_ = built("residual", known, multiple=1, tolerance=0.1)
    assert table.points <= 25 * len(table.units)
    assert (1 + known.slowing) ** len(known.passes) > 1.5


def test_points_and_forwards_are_counted_and_progress_is_told() -> None:
    known, told = Known(bilinear), list[Progress]()
    table, *_ = built("mlp", known, on_progress=told.append, networks=5)
    assert table.forwards == len(known.passes) == sum(known.passes.count(n) for n in (1, 3))
    assert known.passes.count(1) == table.points * EACH
    rounds = known.passes.count(3) / EACH - told[-1].total
    assert (
        rounds == 1 + len({p.done for p in told if p.stage == "units"}) - 1
    )  # the reference, alone and in each
    assert [p for p in told if p.stage == "units"][-1] == Progress("units", table.points, table.points)
    assert told[-1].stage == "networks"
    assert 3 <= told[-1].done == told[-1].total <= 5  # equal ones are timed once


def test_steps_are_found_down_to_neighbouring_counts_unless_they_lie_within_the_tolerance() -> None:
    known = Known(in_steps)
    table, candidates, grids = built("residual", known, networks=8)
    conv = next(times for unit, times in table.units.items() if unit.in_size == (8, 8) and unit.norm)
    assert len(conv.inputs) == 5  # they do not matter: the ends, the middle and the quarters say so
    assert set(conv.outputs) == {2, 4, 6, 8, 10, 12, 14, 16}
    assert checked(table, candidates, grids, known).largest_error < 0.01
    coarse, *_ = built("residual", Known(in_steps), tolerance=10.0, networks=3)
    assert coarse.points < table.points
    assert all(len(times.outputs) <= 5 for times in coarse.units.values())


def test_the_correction_is_recovered_and_never_rises() -> None:
    parts = [(1.0, 100.0, 7e3), (2.0, 150.0, 1e3), (3.0, 500.0, 2e3), (4.0, 300.0, 9e3), (5.0, 350.0, 1e3)]
    exact = fit_correction(parts, [1.2 * s + 0.001 * e + 1e-4 * w - 0.1 for s, e, w in parts])
    factors = exact.scale, exact.per_element_ms, exact.per_weight_ms
    assert (*factors, exact.constant_ms) == pytest.approx((1.2, 0.001, 1e-4, -0.1))
    falling = fit_correction(parts, [10 - s for s, _, _ in parts])
    assert min(falling.scale, falling.per_element_ms, falling.per_weight_ms) >= 0


def test_elements_that_no_decision_changes_are_a_constant() -> None:
    found = fit_correction([(1.0, 70.0, 0.0), (2.0, 70.0, 0.0), (3.0, 70.0, 0.0)], [2.5, 4.5, 6.5])
    assert (found.scale, found.per_element_ms, found.constant_ms) == pytest.approx((2.0, 0.0, 0.5))


def test_errors_are_relative() -> None:
    found = fit_correction([(1.0, 0.0, 0.0)] * 3, [1.0, 1.0, 2.0])
    assert found.scale + found.constant_ms == pytest.approx(3.5 / 3.25)  # sum(w/y) / sum(w/y^2), w 2, 1, 1


def test_random_strategies_go_from_nothing_to_the_most() -> None:
    grids = tuple(Grid(f"conv{i}", 64, 2, 56) for i in range(8))
    drawn = random_strategies(grids, 20, seed=1)
    assert drawn == random_strategies(grids, 20, seed=1)
    assert not set(drawn) & set(random_strategies(grids, 20, seed=2))
    for removed in drawn:
        for grid, count in zip(grids, removed, strict=True):
            assert grid.count(grid.index(count)) == count
    share = [sum(removed) / (8 * 56) for removed in drawn]
    assert share[0] < 0.1
    assert share[-1] > 0.9
    assert np.corrcoef(share, np.linspace(0, 1, 20))[0, 1] > 0.95


def test_figures_of_a_check_by_hand() -> None:
    measured = tuple(Timing(ms, ms, ms, 1) for ms in (1.0, 2.0, 4.0, 5.0))
    found = Checked(((0,), (1,), (2,), (3,)), (1.1, 2.0, 5.0, 4.0), measured, original_ms=(10.0, 8.0))
    assert found.errors == pytest.approx((0.1, 0.0, 0.25, -0.2))
    assert found.median_error == pytest.approx(0.15)
    assert found.largest_error == pytest.approx(0.25)
    # The machine was a quarter slower when the table was built: shares are 0.11, 0.2, 0.5, 0.4 and 0.125, 0.25, 0.5, 0.625.
    assert found.share_errors == pytest.approx((-0.12, -0.2, 0.0, -0.36))
    assert found.median_share_error == pytest.approx(0.16)
    assert found.rank_correlation == pytest.approx(0.8)  # two neighbours of four change places


def test_a_flat_table_has_no_ranks() -> None:
    measured = tuple(Timing(ms, ms, ms, 1) for ms in (1.0, 2.0))
    assert math.isnan(Checked(((0,), (1,)), (1.5, 1.5), measured, (3.0, 3.0)).rank_correlation)


def test_equal_networks_are_measured_once() -> None:
    known = Known(bilinear)
    table, candidates, grids = built("mlp", known, networks=3)
    latency = Latency(candidates.original, candidates.graph, table)
    same = [(0,) * len(grids)] * 3
    found = check_table(latency, candidates, images(2), runtime=known, threads=1, strategies=same, repeats=2)
    assert len(found.strategies) == len(found.measured) == 1


def test_a_real_runtime() -> None:
    candidates, grids = problem("mlp")
    threads = torch.get_num_threads()
    eager = runtime("eager", 1)
    table = build_table(candidates, grids, images(1), runtime=eager, threads=1, repeats=5, networks=4)
    assert torch.get_num_threads() == threads
    assert (table.conditions.runtime, table.conditions.batch) == ("eager", 1)
    latency = Latency(candidates.original, candidates.graph, table)
    assert 1e-3 < latency([0] * len(grids)) < 100


def test_rounds_hold_no_more_units_than_memory_does(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, *_ = built("mlp", Known(bilinear), networks=3)
    monkeypatch.setattr(sampling, "_LARGEST_ROUND", 1)
    known = Known(bilinear)
    one_by_one, *_ = built("mlp", known, networks=3)
    beside = known.passes.count(3) // EACH
    assert one_by_one.points < beside  # the reference is beside each point
    for unit, times in at_once.units.items():
        assert one_by_one.units[unit].ms == pytest.approx(times.ms)


def test_a_busy_machine_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    built("mlp", Known(bilinear), networks=3)
    assert not caplog.records
    built("mlp", Known(bilinear, disturbed=3.0), networks=3)
    assert caplog.text.count("something else runs here") == 1


def test_a_cap_on_points_ends_refining_with_whole_grids() -> None:
    """Times with a step at every count: without a cap all of them are timed."""
    jagged = Known(lambda layer: 1.0 + 0.5 * (layer.out_channels % 3) + 0.3 * (layer.in_channels % 5))
    free, candidates, _ = built("mlp", jagged, tolerance=1e-6)
    capped, _, _ = built("mlp", jagged, tolerance=1e-6, points=60)
    assert free.points > 100
    assert capped.points <= 60
    for times in capped.units.values():
        assert times.ms.shape == (len(times.inputs), len(times.outputs))
        assert np.isfinite(times.ms).all()
    assert set(capped.units) == set(free.units)
    latency = Latency(candidates.original, candidates.graph, capped)
    assert np.isfinite(latency([0] * len(candidates.orders)))
