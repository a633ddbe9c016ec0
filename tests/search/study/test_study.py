"""The loop: counting, the best, finalists, rewards that are no numbers."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from amc_env.errors import UserError
from amc_env.evaluation.evaluator import Outcome
from amc_env.rewards import Error, Infinity
from amc_env.space import Grid, Problem, Strategy
from search.study.study import Episode, Loop


class Kept:
    """A cost: units that stay of 8."""

    name = "kept"
    unit = "units"

    def __call__(self, removed: Any) -> float:
        return float(8 - sum(removed))


class Table:
    """An evaluator of known accuracies: by removed count, and by repair."""

    repair = "cheap"
    staged = False

    def __init__(self, cheap: Sequence[float], dear: Sequence[float] = (), least_met: int = 0) -> None:
        self.problem = Problem([Grid("a", 8, 1, 7)], [Kept()], [])
        self.asked: list[tuple[str, int]] = []
        self.floors: list[Sequence[float] | None] = []
        self._accuracies = {"cheap": cheap, "dear": dear}
        self._least_met = least_met

    def evaluate(self, strategies: Sequence[Strategy], *, repair: str | None = None) -> list[Outcome]:
        return list(self.outcomes(strategies, repair=repair))

    def outcomes(
        self,
        strategies: Sequence[Strategy],
        *,
        repair: str | None = None,
        floors: Sequence[float] | None = None,
    ) -> Iterator[Outcome]:
        name = repair or self.repair
        self.floors.append(floors)
        for strategy in strategies:
            (count,) = strategy.removed
            self.asked.append((name, count))
            met = count >= self._least_met
            costs = self.problem.cost(strategy.removed)
            yield Outcome(strategy, self._accuracies[name][count], costs, met, name)


def loop(table: Table, reward: Any = None, **more: Any) -> Loop:
    return Loop(table, reward or Error(), **more)  # type: ignore[arg-type]


def test_strategies_of_several_environments_are_asked_for_at_once() -> None:
    table = Table([0.9, 0.5, 0.7, 0.8])
    rounds: list[int] = []
    outcomes = table.outcomes
    table.outcomes = lambda strategies, **_: rounds.append(len(strategies)) or outcomes(strategies)  # type: ignore[method-assign,misc]
    searching = loop(table)
    strategies = [table.problem.strategy([count]) for count in (3, 1, 3)]
    given = searching.outcomes(strategies)
    assert [outcome.strategy for outcome in given] == strategies
    assert [outcome.accuracy for outcome in given] == [0.8, 0.5, 0.8]
    assert (rounds, searching.episodes, searching.evaluations) == ([3], 3, 2)


def test_episodes_evaluations_and_repeats_are_counted() -> None:
    seen: list[Episode] = []
    searching = loop(Table([0.9, 0.5, 0.7, 0.8]), on_episode=seen.append)
    results = searching.score([(1,), (3,), (1,), (2,)])
    assert [result.reward for result in results] == pytest.approx([-0.5, -0.2, -0.5, -0.3])
    assert [episode.number for episode in seen] == [1, 2, 3, 4]
    assert [episode.evaluations for episode in seen] == [1, 2, 2, 3]
    assert [episode.cache_hits for episode in seen] == [0, 0, 1, 1]
    assert [episode.best.outcome.accuracy for episode in seen] == [0.5, 0.8, 0.8, 0.8]


def test_episodes_are_shown_as_they_come() -> None:
    table = Table([0.9, 0.5, 0.7, 0.8])
    shown: list[tuple[int, int]] = []
    searching = loop(table, on_episode=lambda episode: shown.append((episode.number, len(table.asked))))
    searching.score([(1,), (3,), (2,)])
    assert shown == [(1, 1), (2, 2), (3, 3)]


def test_one_strategy_of_an_environment_is_one_episode() -> None:
    table = Table([0.9, 0.5])
    searching = loop(table)
    assert searching.outcome(table.problem.strategy((1,))).accuracy == 0.5
    assert (searching.episodes, searching.evaluations, searching.cache_hits) == (1, 1, 0)


def test_the_best_as_scored_is_delivered_without_finalists() -> None:
    table = Table([0.9, 0.5, 0.7])
    searching = loop(table)
    searching.score([(1,), (2,)])
    best = searching.best(0, "dear")
    assert (best.outcome.strategy.removed, best.outcome.repair) == ((2,), "cheap")


def test_finalists_are_scored_once_more_and_the_best_of_those_is_delivered() -> None:
    table = Table([0.9, 0.5, 0.7, 0.8], dear=[0, 0.99, 0.85, 0.82])
    searching = loop(table)
    searching.score([(1,), (2,), (3,)])
    best = searching.best(2, "dear")
    assert table.asked[3:] == [("dear", 3), ("dear", 2)]
    assert (best.outcome.strategy.removed, best.outcome.accuracy, best.outcome.repair) == ((2,), 0.85, "dear")
    assert searching.evaluations == 5
    assert searching.cache_hits == 0


def test_finalists_of_the_search_s_own_repair_cost_nothing() -> None:
    table = Table([0.9, 0.5, 0.7])
    searching = loop(table)
    searching.score([(1,), (2,)])
    assert searching.best(2, "cheap").outcome.strategy.removed == (2,)
    assert len(table.asked) == 2


def test_a_strategy_that_meets_the_budget_beats_a_better_one_that_does_not() -> None:
    table = Table([0.9, 0.99, 0.6, 0.5], least_met=2)
    searching = loop(table)
    searching.score([(1,), (2,), (3,)])
    assert searching.best(0, "cheap").outcome.strategy.removed == (2,)


def test_the_first_found_wins_a_tie() -> None:
    searching = loop(Table([0.9, 0.5, 0.5]))
    searching.score([(2,), (1,)])
    assert searching.best(0, "cheap").outcome.strategy.removed == (2,)


def test_no_strategy_within_the_budget_is_refused() -> None:
    searching = loop(Table([0.9, 0.99], least_met=5), Infinity())
    (result,) = searching.score([(1,)])
    assert result.reward == -math.inf
    with pytest.raises(UserError, match="none of 1 strategies met the budget"):
        searching.best(2, "dear")


def test_nothing_scored_is_refused() -> None:
    with pytest.raises(UserError, match="scored nothing"):
        loop(Table([0.9])).best(2, "dear")


def test_a_reward_of_nan_is_refused() -> None:
    searching = loop(Table([0.9, 0.5]), lambda accuracy, costs, met: math.nan)
    with pytest.raises(UserError, match="NaN"):
        searching.score([(1,)])
