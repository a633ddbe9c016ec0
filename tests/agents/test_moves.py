"""Moves stay on the budget, and the least total error is found where it is known."""

import itertools

import numpy as np
import pytest

from agents.moves import fill, least_error, starts, swap
from agents.toy import ToySearch
from amc_env.space import Budget, Grid, Removed, SearchSpace


class Additive:
    """Each unit of a decision costs as much as its weight."""

    name, unit = "macs", "MACs"

    def __init__(self, *weights: float) -> None:
        self.weights = np.array(weights)

    def __call__(self, removed: Removed) -> float:
        return float(self.weights @ (8 - np.asarray(removed)))


def additive(ratio: float = 0.5) -> SearchSpace:
    grids = [Grid(f"layer{i}", 8, 1, 7) for i in range(3)]
    cost = Additive(1.0, 2.0, 5.0)
    return SearchSpace(grids, [cost], [Budget.of(cost, 3, ratio=ratio)])


def test_what_is_filled_meets_the_budget_and_first_come_is_first_served() -> None:
    space = additive()
    assert fill(space, space.most, [2, 1, 0]) == (7, 5, 3)
    assert fill(space, space.most, [0, 1, 2]) == (0, 0, 7)
    assert fill(space, (7, 7, 7), []) == (7, 7, 7)


@pytest.mark.parametrize("swaps", [1, 4])
def test_swaps_stay_on_the_budget(swaps: int) -> None:
    space, rng = ToySearch().space, np.random.default_rng(0)
    removed, changed = space.project([0.0] * 4), []
    for _ in range(50):
        child = swap(space, removed, rng, swaps)
        assert space.met(child)
        assert all(space.grids[i].index(count) is not None for i, count in enumerate(child))
        changed.append(sum(a != b for a, b in zip(child, removed, strict=True)))
        removed = child
    assert space.budgets[0].cost(removed) > 0.9 * space.budgets[0].limit
    assert max(changed) <= 4
    assert swaps > 1 or min(changed) < 4


def test_swaps_without_a_budget_move_both_ways() -> None:
    space, rng = ToySearch(ratio=None).space, np.random.default_rng(0)
    steps = np.array([swap(space, (10,) * 4, rng) for _ in range(100)]) - 10
    assert (steps > 0).any()
    assert (steps < 0).any()


def test_the_least_total_error_is_that_of_all_strategies() -> None:
    space = additive()
    errors = [weight * (np.arange(8) / 8) ** 2 for weight in (1.0, 0.2, 4.0)]

    def total(removed: Removed) -> float:
        return sum(float(error[count]) for error, count in zip(errors, removed, strict=True))

    best = min(filter(space.met, itertools.product(range(8), repeat=3)), key=total)
    found = least_error(space, errors)
    assert space.met(found)
    assert total(found) <= 1.05 * total(best)


def test_a_search_starts_from_the_least_error_where_it_is_known() -> None:
    search = ToySearch()
    uniform = search.space.project([0.0] * 4)
    assert starts(search.task(1)) == [uniform]
    flat = np.zeros(search.space.grids[0].size)
    errors = [flat, np.arange(len(flat)) / len(flat), flat, flat]
    (known, second) = starts(search.task(1, layer_errors=lambda: errors))
    assert (known[1], second) == (0, uniform)
