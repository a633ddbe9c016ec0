"""NetAdapt on problems whose rounds can be worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from refusals import refused
from torch import nn

from agents.base import SearchTask
from agents.netadapt import NetAdapt, cut
from amc_env.costs.counts import Macs, Params
from amc_env.graph.layers import LayerGraph
from amc_env.graph.tracing import trace
from amc_env.pruning.granularity import Channel
from amc_env.space import Budget, Grid, Removed, SearchSpace, Trial


class Rounds:
    """Scores proposals by a function of (round, removed), and writes down what was adopted."""

    def __init__(self, space: SearchSpace, accuracy: Callable[[int, Removed], float]):
        self.space, self._accuracy = space, accuracy
        self.adopted: list[Removed] = []
        self.scored: list[list[Removed]] = []

    def score(self, proposals: Sequence[Removed]) -> list[Trial]:
        self.scored.append(list(proposals))
        number = len(self.adopted) + 1
        accuracies = [self._accuracy(number, removed) for removed in proposals]
        return [
            Trial(
                1,
                self.space.strategy(removed),
                "original",
                "none",
                score,
                {},
                self.space.met(removed),
                score - 1,
            )
            for removed, score in zip(proposals, accuracies, strict=True)
        ]

    def run(self, agent: NetAdapt) -> Rounds:
        task = SearchTask(self.space, None, self.score, 1, 0, adopt=self.adopted.append)  # type: ignore[arg-type]
        agent.search(task)
        return self


def chain() -> LayerGraph:
    """The network of the release's unit tests: convolutions 3-16-32-64-10, 3x3 on 32x32, no bias."""
    widths = [3, 16, 32, 64, 10]
    layers = [nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(widths)]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return trace(network, torch.zeros(1, 3, 32, 32))


def test_the_worked_case_of_the_release() -> None:
    """Whole rounds of 2.5% of the MACs, constant; the winners are the third, the first, the second convolution."""
    graph, grids = Channel(multiple=1).decisions(chain())
    macs, params = Macs(graph), Params(graph)
    assert (macs([0, 0, 0]), params([0, 0, 0])) == (29_933_568, 29_232)
    space = SearchSpace(grids, [macs, params], [Budget.of(macs, 3, limit=26_809_344)])
    wins = {1: (2, 0.80), 2: (0, 0.85), 3: (1, 0.90)}

    def accuracy(number: int, removed: Removed) -> float:
        place, value = wins[min(number, 3)]
        before = rounds.adopted[-1] if rounds.adopted else (0, 0, 0)
        return value if removed[place] > before[place] else 0.5

    rounds = Rounds(space, accuracy)
    rounds.run(NetAdapt(reduction=0.025, decay=1.0))
    kept = [tuple(t - r for t, r in zip((16, 32, 64), removed, strict=True)) for removed in rounds.adopted]
    assert kept == [(16, 32, 62), (13, 32, 62), (13, 30, 62)]
    assert [params(removed) for removed in rounds.adopted] == [28_476, 27_531, 26_181]
    assert [macs(removed) for removed in rounds.adopted] == [29_159_424, 28_191_744, 26_809_344]


def four_layers(ratio: float = 0.5, step: int = 1) -> SearchSpace:
    """Independent layers of 32 units, each unit worth as much."""
    grids = [Grid(f"layer{i}", 32, step, 28) for i in range(4)]
    cost = Units()
    return SearchSpace(grids, [cost], [Budget.of(cost, 4, ratio=ratio)])


class Units:
    """What is kept of four layers of 32 units."""

    name, unit = "units", "units"

    def __call__(self, removed: Sequence[int]) -> float:
        return 128.0 - sum(removed)


def fragile_second(number: int, removed: Removed) -> float:
    """Cutting layer 1 costs twice as much as another."""
    return 1.0 - 0.001 * (sum(removed) + removed[1])


def test_every_proposal_cuts_one_decision_alone_by_the_least_that_gives_the_reduction() -> None:
    rounds = Rounds(four_layers(), fragile_second).run(NetAdapt(reduction=0.05, decay=1.0))
    original, first = rounds.scored[0], rounds.scored[1]
    assert original == [(0, 0, 0, 0)]
    assert first == [(7, 0, 0, 0), (0, 7, 0, 0), (0, 0, 7, 0), (0, 0, 0, 7)]  # 6.4 of 128, rounded up
    before = np.array(rounds.adopted[0])
    for proposal in rounds.scored[3]:
        assert sorted(np.array(proposal) - before) == [0, 0, 0, 7]


def test_it_ends_on_the_limit_and_never_cuts_the_fragile_layer() -> None:
    rounds = Rounds(four_layers(), fragile_second).run(NetAdapt(reduction=0.05, decay=1.0))
    assert sum(rounds.adopted[-1]) == 64  # nine rounds of 7, and the last of 1
    assert len(rounds.adopted) == 10
    assert rounds.adopted[-1][1] == 0
    assert rounds.scored[-1] == [rounds.adopted[-1]]


def test_the_reduction_decays() -> None:
    rounds = Rounds(four_layers(0.8), fragile_second).run(NetAdapt(reduction=0.1, decay=0.5))
    steps = np.diff([0, *map(sum, rounds.adopted)])
    # 12.8, 6.4, 3.2, 1.6 and on from where the round before ended, each rounded up; the limit is 25.6 units removed.
    assert list(steps) == [13, 7, 4, 2]


def test_equal_accuracies_go_to_the_one_that_saves_most() -> None:
    grids = [Grid("fine", 32, 1, 28), Grid("coarse", 32, 8, 24)]
    cost = Pair()
    space = SearchSpace(grids, [cost], [Budget.of(cost, 2, ratio=0.9)])
    rounds = Rounds(space, lambda number, removed: 0.9).run(NetAdapt(reduction=0.05))
    assert rounds.scored[1] == [(4, 0), (0, 8)]
    assert rounds.adopted == [(0, 8)]


class Pair:
    """What is kept of two layers of 32 units."""

    name, unit = "units", "units"

    def __call__(self, removed: Sequence[int]) -> float:
        return 64.0 - sum(removed)


@pytest.mark.parametrize(("choice", "adopted"), [("accuracy", (4, 0)), ("exchange", (0, 8))])
def test_the_paper_takes_the_highest_accuracy_and_the_release_the_best_exchange(
    choice: str, adopted: Removed
) -> None:
    """0.2 points for 4 units against 0.3 points for 8: 0.05 and 0.0375 a unit."""
    grids = [Grid("fine", 32, 1, 28), Grid("coarse", 32, 8, 24)]
    cost = Pair()
    space = SearchSpace(grids, [cost], [Budget.of(cost, 2, ratio=0.94)])
    worth = {(0, 0): 0.9, (4, 0): 0.898, (0, 8): 0.897}
    agent = NetAdapt(reduction=0.05, choice=choice)
    rounds = Rounds(space, lambda number, removed: worth[removed]).run(agent)
    assert rounds.adopted == [adopted]


def test_of_two_budgets_the_one_furthest_from_its_limit_is_cut() -> None:
    class First(Units):
        name = "first"

        def __call__(self, removed: Sequence[int]) -> float:
            return 64.0 - removed[0] - removed[1]

    grids = [Grid(f"layer{i}", 32, 1, 28) for i in range(4)]
    costs = Units(), First()
    budgets = [Budget.of(costs[0], 4, ratio=0.9), Budget.of(costs[1], 4, ratio=0.7)]
    space = SearchSpace(grids, costs, budgets)
    rounds = Rounds(space, fragile_second).run(NetAdapt(reduction=0.1, decay=1.0))
    assert all(sum(p) == sum(p[:2]) for p in rounds.scored[1])  # layers 2 and 3 do not lower it
    assert all(budget.met(rounds.adopted[-1]) for budget in budgets)


def test_what_no_decision_can_save_at_once_is_saved_by_halves() -> None:
    """Half of all units in one round: no layer has so many; a quarter of them can go in one."""
    rounds = Rounds(four_layers(0.5), fragile_second).run(NetAdapt(reduction=0.4, decay=1.0))
    assert rounds.scored[1][0] == (26, 0, 0, 0)  # 51.2 of 128 asked for, then 25.6
    assert sum(rounds.adopted[-1]) == 64


def test_where_no_single_cut_lowers_the_cost_all_are_cut_by_the_least_common_ratio() -> None:
    class Both(Units):
        """Falls only where two layers are cut together."""

        def __call__(self, removed: Sequence[int]) -> float:
            return 128.0 - 4 * min(removed)

    cost = Both()
    grids = [Grid(f"layer{i}", 32, 1, 28) for i in range(4)]
    space = SearchSpace(grids, [cost], [Budget.of(cost, 4, ratio=0.5)])
    rounds = Rounds(space, fragile_second).run(NetAdapt(reduction=0.1, decay=1.0))
    # 12.8 of 128 a round are 3.2 units of each, so 4, then 16 in the fourth: the limit is 64, of 16 units of each
    assert rounds.adopted == [(4,) * 4, (8,) * 4, (12,) * 4, (16,) * 4]


def test_bisection_finds_the_least_count() -> None:
    space = four_layers(step=4)
    budget = space.budgets[0]
    grid = space.grids[1]
    for target in range(90, 128, 3):
        counts = [grid.count(i) for i in range(grid.size)]
        enough = [c for c in counts if c > 4 and 128 - 4 - c + 4 - 3 <= target]  # 3 gone elsewhere
        found = cut(space, budget, (3, 4, 0, 0), 1, target)
        assert found == ((3, min(enough), 0, 0) if enough else None), target
    assert cut(space, budget, (0, 28, 0, 0), 1, 128) is None  # nothing is left to cut


def test_planned_counts_rounds_of_the_schedule() -> None:
    assert NetAdapt(reduction=0.1, decay=1.0).planned(four_layers(0.5), 300) == 1 + 5 * 5
    assert NetAdapt(reduction=0.2, decay=0.5).planned(four_layers(0.7), 300) == 1 + 2 * 5


def test_bad_settings_are_refused_together() -> None:
    with refused("out_of_range", "reduction", "decay", "choice"):
        NetAdapt(reduction=0, decay=2, choice="best")


def test_a_problem_without_a_budget_is_refused() -> None:
    space = SearchSpace([Grid("a", 8, 1, 4)], [Units()], [])
    with refused("missing", "budget"):
        NetAdapt().check(space, 1)
