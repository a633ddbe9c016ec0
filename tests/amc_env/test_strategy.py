"""Grids and strategies: feasible counts, snapping, JSON."""

import json

import numpy as np
import pytest
from refusals import refused

from amc_env.errors import UserError
from amc_env.space import Decision, Grid, Grids, Strategy, as_ratios

GRIDS = [
    Grid("g", total, step, most)
    for total in (1, 2, 7, 10, 16, 33)
    for step in (1, 2, 3, 8)
    for most in sorted({0, total // 2, total * 9 // 10, total - 1})
]


def feasible(grid: Grid) -> list[int]:
    """The definition, by enumeration."""
    return [r for r in range(grid.most + 1) if r == 0 or (grid.total - r) % grid.step == 0]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_counts_are_the_definition(grid: Grid) -> None:
    assert [grid.count(i) for i in range(grid.size)] == feasible(grid)
    assert [grid.index(count) for count in feasible(grid)] == list(range(grid.size))
    assert grid.max_ratio == feasible(grid)[-1] / grid.total


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_snap_is_the_nearest_feasible_count(grid: Grid) -> None:
    for ratio in [*np.linspace(-0.2, 1.2, 57), *(count / grid.total for count in feasible(grid))]:
        target = min(max(ratio, 0.0), 1.0) * grid.total
        assert grid.snap(float(ratio)) == min(feasible(grid), key=lambda c: (abs(c - target), c))


@pytest.mark.parametrize("removed", [-4, -1, 1, 3, 8, 10])
def test_counts_off_the_grid_are_refused(removed: int) -> None:
    with pytest.raises(UserError, match=rf"conv: {removed} removed of 10 .* allowed: \[0, 2, 6\]"):
        Grid("conv", 10, 4, 6).index(removed)


@pytest.mark.parametrize(
    ("grid", "counts"),
    [
        (Grid("2:4", total=4, step=4, most=2, first=2), [0, 2]),
        (Grid("1:4", total=4, step=4, most=3, first=3), [0, 3]),
        (Grid("4:8", total=8, step=8, most=4, first=4), [0, 4]),
        (Grid("own", total=10, step=2, most=8, first=3), [0, 3, 5, 7]),
        (Grid("out of reach", total=10, step=2, most=2, first=3), [0]),
    ],
    ids=lambda value: value.name if isinstance(value, Grid) else "",
)
def test_a_first_count_of_its_own(grid: Grid, counts: list[int]) -> None:
    assert [grid.count(i) for i in range(grid.size)] == counts
    assert [grid.index(count) for count in counts] == list(range(grid.size))
    assert grid.max_ratio == counts[-1] / grid.total
    for ratio in [*np.linspace(-0.2, 1.2, 57), *(count / grid.total for count in counts)]:
        target = min(max(ratio, 0.0), 1.0) * grid.total
        assert grid.snap(float(ratio)) == min(counts, key=lambda c: (abs(c - target), c))
    for removed in set(range(-1, grid.total + 2)) - set(counts):
        with pytest.raises(
            UserError, match=rf"{grid.name}: {removed} removed of {grid.total} is not feasible"
        ):
            grid.index(removed)


def test_grids_together_are_each_grid_alone() -> None:
    """Ratios on counts, half way between two of them, next to both, and anywhere."""
    grids = [
        *GRIDS,
        Grid("own", 10, 2, 8, first=3),
        Grid("2:4", 4, 4, 2, first=2),
        Grid("large", 2359296, 1, 2123366),
    ]
    together, generator = Grids(grids), np.random.default_rng(0)
    for draw in range(300):
        places = [int(generator.integers(grid.size)) for grid in grids]
        between = [0.0, 0.5][draw % 2] * np.array([grid.step for grid in grids])
        near = [grid.count(place) for grid, place in zip(grids, places, strict=True)] + between
        exact = near / np.array([grid.total for grid in grids])
        for ratios in (
            exact,
            np.nextafter(exact, 2),
            np.nextafter(exact, -2),
            generator.uniform(-1, 2, len(grids)),
        ):
            index = together.nearest(ratios)
            assert together.counts(index).tolist() == [g.snap(r) for g, r in zip(grids, ratios, strict=True)]
            assert index.tolist() == [g.index(c) for g, c in zip(grids, together.counts(index), strict=True)]


def test_decision() -> None:
    decision = Decision(removed=3, total=12)
    assert (decision.ratio, decision.kept) == (0.25, 9)


def test_strategy_round_trip_through_json() -> None:
    grids = (Grid("a", 10, 2, 8), Grid("b", 7, 1, 6))
    strategy = Strategy(("a", "b"), (10, 7), (4, 3))
    assert strategy.ratios == (0.4, 3 / 7)
    assert strategy.decisions["b"] == Decision(3, 7)
    again = Strategy.from_json(json.loads(json.dumps(strategy.to_json())), grids)
    assert again == strategy
    assert hash(again) == hash(strategy)


def test_all_problems_of_a_strategy_are_one_message() -> None:
    grids = [Grid(name, 8, 1, 7) for name in "abcdef"]
    decisions = {
        "a": {"removed": 8, "total": 8},
        "b": {"removed": 1, "total": 9},
        "c": {"total": 8},
        "d": {"removed": 1.5},
        "e": {"removed": "x"},
        "z": {"removed": 0, "total": 1},
    }
    with pytest.raises(UserError) as caught:
        Strategy.from_json({"decisions": decisions}, grids)
    message = str(caught.value)
    for part in (
        "unknown decision 'z'",
        "a: 8 removed of 8; at least one must stay",
        "b: made for 9 units, the network has 8",
        "decision 'c' is missing or has no count",
        "d: removed=1.5 is not a whole number",
        "e: removed='x' is not a whole number",
        "decision 'f' is missing",
    ):
        assert part in message


@pytest.mark.parametrize("obj", [{}, {"decisions": 3}, [], None])
def test_no_strategy_at_all(obj: object) -> None:
    with refused("wrong_type", "strategy"):
        Strategy.from_json(obj, [Grid("a", 8, 1, 7)])  # type: ignore[arg-type]


@pytest.mark.parametrize("values", [[0.1], [0.1, float("nan")], [0.1, float("inf")], [0.1, 0.2, 0.3]])
def test_ratios_must_fit(values: list[float]) -> None:
    with pytest.raises(ValueError, match="2 finite pruning ratios"):
        as_ratios(values, 2)
