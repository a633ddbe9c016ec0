"""Moves between strategies on the budget, and the strategies that searches start from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from agents.base import SearchTask
from amc_env.space import Removed, SearchSpace, Trial

Floats = npt.NDArray[np.float64]

_LARGEST_MOVE = 0.25  # of a decision's feasible counts, that one swap may move it by
_ROUNDS = 4  # of linearising costs around the strategy found
_BISECTIONS = 40  # of the price of the budget


def order(trial: Trial) -> tuple[bool, float]:
    """The order in which trials are compared: those that meet the budget first, then by reward."""
    return trial.met, trial.reward


def fill(space: SearchSpace, removed: Sequence[int], places: Iterable[int]) -> Removed:
    """Give decisions back as much as the budget allows, one after another.

    Args:
        space: The decisions and budgets.
        removed: Counts that meet the budget.
        places: Decisions, by index; those that come first get the most.

    Returns:
        Counts that meet the budget, none larger than in ``removed``.
    """
    counts = list(removed)
    for place in places:
        grid = space.grids[place]
        low, high = 0, grid.index(counts[place])
        while low < high:
            middle = (low + high) // 2
            counts[place] = grid.count(middle)
            low, high = (low, middle) if space.met(counts) else (middle + 1, high)
        counts[place] = grid.count(high)
    return tuple(counts)


def swap(space: SearchSpace, removed: Removed, rng: np.random.Generator, swaps: int = 1) -> Removed:
    """Prune some decisions more and others less, so that the strategy stays on the budget.

    A swap prunes one decision by up to a quarter of its range more and gives the cost that this saves to another
    decision (EvoPress: Sieberling et al., "Accurate Dynamic Model Compression via Evolutionary Search", ICML 2025, whose
    swaps keep the level of compression). Without a budget the other decision is given back as many steps at random.

    Args:
        space: The decisions and budgets.
        removed: Counts that meet the budget.
        rng: Makes the choices.
        swaps: How many.
    """
    counts = list(removed)
    free = [place for place, grid in enumerate(space.grids) if grid.size > 1]
    for _ in range(swaps):
        more, less = (int(place) for place in rng.choice(free, 2, replace=len(free) < 2))
        for place, sign in ((more, 1), (less, -1)):
            grid = space.grids[place]
            steps = 1 + int(rng.integers(max(1, int(_LARGEST_MOVE * grid.size))))
            if sign > 0 or not space.budgets:
                index = min(max(grid.index(counts[place]) + sign * steps, 0), grid.size - 1)
                counts[place] = grid.count(index)
        if space.budgets:
            counts = list(fill(space, counts, [less]))
    return fill(space, counts, rng.permutation(free)[:2]) if space.budgets else tuple(counts)


def some_swaps(rng: np.random.Generator) -> int:
    """How many swaps a mutation makes: few more often than many."""
    return int(min(rng.geometric(0.5), 8))


def starts(task: SearchTask) -> list[Removed]:
    """Strategies to start from.

    The one of least total layer error where that is known, the uniform one, and the best one known from a looser budget,
    shifted to this one.
    """
    space, errors = task.space, task.layer_errors()
    uniform = space.project([0.0] * len(space.names))
    found = [] if errors is None or not space.budgets else [least_error(space, errors)]
    best = max(task.known, key=order, default=None)
    before = [] if best is None else [space.land(best.strategy.ratios)]
    return list(dict.fromkeys([*found, uniform, *before]))


def least_error(space: SearchSpace, errors: Sequence[Floats]) -> Removed:
    """The strategy within the budgets whose layer errors have about the least sum.

    Every decision takes the count that minimises its error minus a price times the cost that it saves; the price is the
    least that meets the budgets, found by bisection. Savings depend on the other decisions, so they are computed
    again around the strategy found.

    Args:
        space: The decisions and at least one budget.
        errors: As in `SearchTask.layer_errors`.
    """
    counts = [[grid.count(index) for index in range(grid.size)] for grid in space.grids]
    found: Removed = (0,) * len(counts)
    candidates: list[Removed] = []
    for _ in range(_ROUNDS):
        savings = [_savings(space, found, place, counts[place]) for place in range(len(counts))]

        def chosen(price: float, savings: list[Floats] = savings) -> Removed:
            best = (np.argmin(error - price * saved) for error, saved in zip(errors, savings, strict=True))
            return tuple(column[int(index)] for column, index in zip(counts, best, strict=True))

        found = _cheapest(space, chosen)
        candidates.append(found)
    least = min(candidates, key=lambda removed: _total(space, errors, removed))
    steep = np.argsort([-_slope(error, space, place, least) for place, error in enumerate(errors)])
    return fill(space, least, (int(place) for place in steep))


def _cheapest(space: SearchSpace, chosen: Callable[[float], Removed]) -> Removed:
    """What ``chosen`` gives for the least price that meets the budgets; all at their most where none does."""
    low, high = 1e-6, 1e6
    if not space.met(chosen(high)):
        return space.most
    for _ in range(_BISECTIONS):
        middle = float(np.sqrt(low * high))
        low, high = (low, middle) if space.met(chosen(middle)) else (middle, high)
    return chosen(high)


def _savings(space: SearchSpace, removed: Removed, place: int, counts: Sequence[int]) -> Floats:
    """What each count of a decision saves, in shares of the budgets' limits, with the others as they are."""

    def used(count: int) -> float:
        strategy = (*removed[:place], count, *removed[place + 1 :])
        return sum(budget.cost(strategy) / budget.limit for budget in space.budgets)

    values: Floats = np.array([used(count) for count in counts])
    return np.asarray(values[0] - values)


def _total(space: SearchSpace, errors: Sequence[Floats], removed: Removed) -> float:
    pairs = zip(space.grids, errors, removed, strict=True)
    return float(sum(error[grid.index(count)] for grid, error, count in pairs))


def _slope(error: Floats, space: SearchSpace, place: int, removed: Removed) -> float:
    """What the last step of a decision adds to its error."""
    index = space.grids[place].index(removed[place])
    return float(error[index] - error[index - 1]) if index else -np.inf
