"""Budgets: the exact bound, projection and landing, against brute force and as properties."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from masking import SUITABLE, masked
from networks import problem
from refusals import refused

from amc_env.costs.counts import Macs, Params
from amc_env.errors import UserError
from amc_env.space import Budget, Grid, SearchSpace


class Product:
    """A chain of three decisions, coupled by products as convolutions are."""

    name, unit = "macs", "MACs"

    def __call__(self, removed: Sequence[int]) -> float:
        a, b, c = 8 - removed[0], 12 - removed[1], 10 - removed[2]
        return float(3 * a + a * b + 2 * b * c + c)


class Linear:
    """Parameters that weigh the first decision most."""

    name, unit = "params", "parameters"

    def __call__(self, removed: Sequence[int]) -> float:
        return float(40 - 3 * removed[0] - removed[1])


GRIDS = (Grid("a", 8, 2, 6), Grid("b", 12, 4, 8), Grid("c", 10, 3, 9))
RATIOS = (0.3, 0.5, 0.8, 1.0)


def space(*limits: tuple[object, float]) -> SearchSpace:
    budgets = [Budget.of(cost, 3, ratio=ratio) for cost, ratio in limits]
    return SearchSpace(GRIDS, [Product(), Linear()], budgets)


def counts(grid: Grid) -> list[int]:
    return [grid.count(i) for i in range(grid.size)]


@pytest.mark.parametrize("ratio", RATIOS)
def test_least_is_brute_forces(ratio: float) -> None:
    task = space((Product(), ratio))
    for length in range(3):
        for chosen in itertools.product(*map(counts, GRIDS[:length])):
            later = [list(map(counts, GRIDS[length + 1 :]))]
            fits = [
                count
                for count in counts(GRIDS[length])
                if any(task.met((*chosen, count, *rest)) for rest in itertools.product(*later[0]))
            ]
            assert task.least(chosen) == (min(fits) if fits else counts(GRIDS[length])[-1])


@pytest.mark.parametrize("multiple", [2, 8])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("name", ["residual", "selection", "concat", "grouped", "flatten", "mlp"])
def test_any_bounded_sequence_meets_the_budget(name: str, ratio: float, multiple: int) -> None:
    candidates, grids = problem(name, multiple)
    macs, params = Macs(candidates.graph), Params(candidates.graph)
    most = [grid.count(grid.size - 1) for grid in grids]
    budget = Budget.of(macs, len(grids), ratio=ratio)
    if macs(most) > budget.limit:
        with refused("out_of_reach", "budget"):
            SearchSpace(grids, [macs, params], [budget])
        return
    task = SearchSpace(grids, [macs, params], [budget])
    generator = np.random.default_rng(0)
    for _ in range(60):
        chosen: list[int] = []
        for grid in grids:
            chosen.append(max(grid.snap(generator.uniform() ** 3), task.least(chosen)))
        assert task.met(chosen)
        assert macs(chosen) <= ratio * macs([0] * len(grids))
        assert [grid.count(grid.index(count)) for grid, count in zip(grids, chosen, strict=True)] == chosen


@pytest.mark.parametrize(("ratio", "kind"), [(0.3, Params), (0.5, Macs)])
@pytest.mark.parametrize(("name", "granularity"), SUITABLE)
def test_masked_strategies_meet_the_budget(name: str, granularity: str, ratio: float, kind: type) -> None:
    _, graph, grids = masked(name, granularity)
    cost, nothing = kind(graph, grids), [0] * len(grids)
    budget = Budget.of(cost, len(grids), ratio=ratio)
    if cost([grid.count(grid.size - 1) for grid in grids]) > budget.limit:
        with refused("out_of_reach", "budget"):
            SearchSpace(grids, [cost], [budget])
        return
    task = SearchSpace(grids, [cost], [budget])
    generator = np.random.default_rng(0)
    for _ in range(5):
        chosen: list[int] = []
        for grid in grids:
            chosen.append(max(grid.snap(generator.uniform() ** 3), task.least(chosen)))
        ratios = generator.uniform(0, 1, len(grids)) ** 2
        for counts in (chosen, task.project(ratios), task.land(ratios)):
            assert cost(counts) <= ratio * cost(nothing) * (1 + 1e-12)
            assert [grid.count(grid.index(count)) for grid, count in zip(grids, counts, strict=True)] == [
                *counts
            ]
        if (
            granularity == "fine_grained"
        ):  # single weights: the budget is used up to less than a weight of every layer
            landed = task.land(ratios)
            fewer = [max(0, count - 1) for count in landed]
            assert cost(fewer) > ratio * cost(nothing)


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
def test_nothing_but_least_is_as_little_as_can_be(ratio: float) -> None:
    candidates, grids = problem("residual")
    macs = Macs(candidates.graph)
    task = SearchSpace(grids, [macs], [Budget.of(macs, len(grids), ratio=ratio)])
    chosen: list[int] = []
    for _ in grids:
        chosen.append(task.least(chosen))
    last = grids[-1].index(chosen[-1])
    assert last == 0 or not task.met([*chosen[:-1], grids[-1].count(last - 1)])


def shifted(task: SearchSpace, values: np.ndarray, shift: float) -> tuple[int, ...]:
    return tuple(
        grid.snap(min(grid.max_ratio, value + shift)) for grid, value in zip(task.grids, values, strict=True)
    )


def shifts(task: SearchSpace, values: np.ndarray, least: float) -> list[float]:
    """A point between every two shifts at which any snapped count changes, ascending."""
    edges = {least}
    for grid, value in zip(task.grids, values, strict=True):
        feasible = counts(grid)
        edges |= {(a + b) / 2 / grid.total - value for a, b in itertools.pairwise(feasible)}
    ordered = sorted(edge for edge in edges if edge >= least)
    return [least, *((a + b) / 2 for a, b in itertools.pairwise(ordered)), ordered[-1] + 0.01]


@pytest.mark.parametrize("limits", [[("m", 0.3)], [("m", 0.5)], [("m", 0.8)], [("m", 0.6), ("p", 0.6)]])
@pytest.mark.parametrize("seed", range(10))
def test_project_and_land_are_their_definitions(limits: list[tuple[str, float]], seed: int) -> None:
    task = space(*((Product() if kind == "m" else Linear(), ratio) for kind, ratio in limits))
    values = np.random.default_rng(seed).uniform(0, 1, 3)
    for found, least in ((task.project(values), 0.0), (task.land(values), -1.0)):
        tried = (shifted(task, values, shift) for shift in shifts(task, values, least))
        assert found == next(strategy for strategy in tried if task.met(strategy))
        assert task.met(found)


def plainly_shifted(task: SearchSpace, values: np.ndarray, least: float) -> tuple[int, ...]:
    """The least shift by all of its 48 halvings, decision by decision."""
    low, high = least, max(least, float((task.maxima - values).max()))
    best = shifted(task, values, low)
    if task.met(best):
        return best
    best = shifted(task, values, high)
    for _ in range(48):
        middle = (low + high) / 2
        found = shifted(task, values, middle)
        if task.met(found):
            high, best = middle, found
        else:
            low = middle
    return best


def plainly_least(task: SearchSpace, chosen: Sequence[int]) -> int:
    grid, later = task.grids[len(chosen)], task.most[len(chosen) + 1 :]
    met = (count for count in counts(grid) if task.met((*chosen, count, *later)))
    return next(met, counts(grid)[-1])


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("ratio", [0.4, 0.8])
@pytest.mark.parametrize("name", ["residual", "grouped", "mlp"])
def test_the_quick_ways_find_what_the_plain_ones_do(name: str, ratio: float, multiple: int) -> None:
    candidates, grids = problem(name, multiple)
    macs, params = Macs(candidates.graph), Params(candidates.graph)
    least = SearchSpace(grids, [macs, params])
    ratios = (max(ratio, 1.01 * least.least_ratio(macs)), max(ratio / 2, 1.01 * least.least_ratio(params)))
    budgets = [
        Budget.of(c, len(grids), ratio=min(1.0, r)) for c, r in zip((macs, params), ratios, strict=True)
    ]
    task = SearchSpace(grids, [macs, params], budgets)
    generator = np.random.default_rng(0)
    drawn = [generator.uniform(-0.2, 1.2, len(grids)) ** power for power in (1, 3, 1, 3)]
    coarse = [np.round(values, 1) for values in drawn]  # several decisions change at one shift
    for values in (*drawn, *coarse, np.zeros(len(grids)), np.ones(len(grids)), np.full(len(grids), 0.5)):
        assert task.project(values) == plainly_shifted(task, values, 0.0)
        assert task.land(values) == plainly_shifted(task, values, -float(values.max()))
        assert task.snap(values) == tuple(grid.snap(v) for grid, v in zip(grids, values, strict=True))
        chosen: list[int] = []
        for grid, value in zip(grids, values, strict=True):
            assert task.least(chosen) == plainly_least(task, chosen)
            chosen.append(max(grid.snap(value), task.least(chosen)))


def test_project_leaves_what_meets_the_budget_alone_and_land_does_not() -> None:
    task = space((Product(), 0.8))
    generous = [0.75, 0.6, 0.8]
    assert task.project(generous) == task.snap(generous) == (6, 8, 7)
    assert task.cost(task.land(generous))["macs"] > task.cost((6, 8, 7))["macs"]
    assert task.met(task.land(generous))


@pytest.mark.parametrize("values", [[-3.0, -3.0, -3.0], [-2.0, 0.5, 1.0], [5.0, 5.0, 5.0], [0.0, 0.0, 4.0]])
def test_ratios_out_of_range_still_meet_the_budget(values: list[float]) -> None:
    task = space((Product(), 0.3))
    assert task.met(task.project(values))
    assert task.met(task.land(values))
    assert SearchSpace(GRIDS, [Product()], [Budget.of(Product(), 3, ratio=1.0)]).land([5.0, 5.0, 5.0]) == (
        0,
        0,
        0,
    )


def test_two_budgets_hold_at_once() -> None:
    task = space((Product(), 0.9), (Linear(), 0.5))
    generator = np.random.default_rng(0)
    for _ in range(100):
        chosen: list[int] = []
        for grid in GRIDS:
            chosen.append(max(grid.snap(generator.uniform() ** 2), task.least(chosen)))
        assert Product()(chosen) <= 0.9 * Product()([0, 0, 0])
        assert Linear()(chosen) <= 20


def test_without_budgets_everything_goes() -> None:
    task = SearchSpace(GRIDS, [Product(), Linear()])
    assert task.least([]) == task.least([0, 0]) == 0
    assert task.project([0, 0, 0]) == task.land([0, 0, 0]) == (0, 0, 0)
    assert task.cost((0, 0, 0)) == {"macs": 370.0, "params": 40.0}
    assert task.strategy([2, 4, 0]).removed == (2, 4, 0)


def test_a_budget_out_of_reach_is_refused_with_the_least() -> None:
    with pytest.raises(UserError) as caught:
        space((Product(), 0.05), (Linear(), 0.1))
    message = str(caught.value)
    assert "budget macs <= 18.5 (0.05 of the original) cannot be reached: the least is 41 (0.111)" in message
    assert "budget params <= 4 (0.1 of the original) cannot be reached: the least is 14 (0.35)" in message


def test_the_least_itself_can_be_reached() -> None:
    least = Product()((6, 8, 7)) / Product()((0, 0, 0))
    assert space((Product(), least)).project([0, 0, 0]) == (6, 8, 7)


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.01, float("nan")])
def test_ratio_outside_its_range(ratio: float) -> None:
    with refused("out_of_range", "budget.ratio"):
        Budget.of(Product(), 3, ratio=ratio)


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_limit_outside_its_range(limit: float) -> None:
    with refused("out_of_range", "budget.limit"):
        Budget.of(Product(), 3, limit=limit)


@pytest.mark.parametrize("given", [{}, {"ratio": 0.5, "limit": 3.0}])
def test_ratio_or_limit(given: dict[str, float]) -> None:
    with refused("conflict", "budget"):
        Budget.of(Product(), 3, **given)


def test_limit_and_ratio_say_the_same() -> None:
    assert Budget.of(Product(), 3, limit=185.0).ratio == 0.5
    assert Budget.of(Product(), 3, ratio=0.5).limit == 185.0


def test_nothing_to_decide() -> None:
    with refused("nothing_to_prune", ""):
        SearchSpace([], [Product()])
