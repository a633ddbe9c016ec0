"""The loop: counting, the best, finalists, rewards that are no numbers."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from refusals import refused

from amc_env.rewards import Error, Infinity
from amc_env.space import Grid, SearchSpace, Strategy, Trial
from search.study.study import Study


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
        self.space = SearchSpace([Grid("a", 8, 1, 7)], [Kept()], [])
        self.asked: list[tuple[str, int]] = []
        self._accuracies = {"cheap": cheap, "dear": dear}
        self._least_met = least_met

    def evaluate(self, strategies: Sequence[Strategy], *, repair: str | None = None) -> list[Trial]:
        return list(self.trials(strategies, repair=repair))

    def trials(self, strategies: Sequence[Strategy], *, repair: str | None = None) -> Iterator[Trial]:
        name = repair or self.repair
        for strategy in strategies:
            (count,) = strategy.removed
            self.asked.append((name, count))
            met = count >= self._least_met
            costs = self.space.cost(strategy.removed)
            score = self._accuracies[name][count]
            reward = self._reward(score, costs, met)
            yield Trial(len(self.asked), strategy, "original", name, score, costs, met, reward)


def loop(table: Table, reward: Any = None, **more: Any) -> Study:
    table._reward = reward or Error()
    return Study(table, **more)  # type: ignore[arg-type]


def test_strategies_of_several_environments_are_asked_for_at_once() -> None:
    table = Table([0.9, 0.5, 0.7, 0.8])
    rounds: list[int] = []
    trials = table.trials
    table.trials = lambda strategies, **_: rounds.append(len(strategies)) or trials(strategies)  # type: ignore[method-assign,misc]
    searching = loop(table)
    strategies = [table.space.strategy([count]) for count in (3, 1, 3)]
    given = searching.score_all(strategies)
    assert [trial.strategy for trial in given] == strategies
    assert [trial.score for trial in given] == [0.8, 0.5, 0.8]
    assert (rounds, searching.episodes, searching.evaluations) == ([3], 3, 2)


def test_episodes_evaluations_and_repeats_are_counted() -> None:
    seen: list[tuple[Any, ...]] = []
    searching = loop(Table([0.9, 0.5, 0.7, 0.8]), on_episode=lambda trial: seen.append(counts()))

    def counts() -> tuple[Any, ...]:
        return searching.episodes, searching.evaluations, searching.cache_hits, searching.best_so_far.score

    trials = searching.score([(1,), (3,), (1,), (2,)])
    assert [trial.reward for trial in trials] == pytest.approx([-0.5, -0.2, -0.5, -0.3])
    assert seen == [(1, 1, 0, 0.5), (2, 2, 0, 0.8), (3, 2, 1, 0.8), (4, 3, 1, 0.8)]


def test_episodes_are_shown_as_they_come() -> None:
    table = Table([0.9, 0.5, 0.7, 0.8])
    shown: list[tuple[int, int]] = []
    searching = loop(table, on_episode=lambda trial: shown.append((trial.removed[0], len(table.asked))))
    searching.score([(1,), (3,), (2,)])
    assert shown == [(1, 1), (3, 2), (2, 3)]


def test_one_strategy_of_an_environment_is_one_episode() -> None:
    table = Table([0.9, 0.5])
    searching = loop(table)
    assert searching.score_one(table.space.strategy((1,))).score == 0.5
    assert (searching.episodes, searching.evaluations, searching.cache_hits) == (1, 1, 0)


def test_the_best_as_scored_is_delivered_without_finalists() -> None:
    table = Table([0.9, 0.5, 0.7])
    searching = loop(table)
    searching.score([(1,), (2,)])
    best = searching.best(0, "dear")
    assert (best.strategy.removed, best.repair) == ((2,), "cheap")


def test_finalists_are_scored_once_more_and_the_best_of_those_is_delivered() -> None:
    table = Table([0.9, 0.5, 0.7, 0.8], dear=[0, 0.99, 0.85, 0.82])
    searching = loop(table)
    searching.score([(1,), (2,), (3,)])
    best = searching.best(2, "dear")
    assert table.asked[3:] == [("dear", 3), ("dear", 2)]
    assert (best.strategy.removed, best.score, best.repair) == ((2,), 0.85, "dear")
    assert searching.evaluations == 5
    assert searching.cache_hits == 0


def test_finalists_of_the_search_s_own_repair_cost_nothing() -> None:
    table = Table([0.9, 0.5, 0.7])
    searching = loop(table)
    searching.score([(1,), (2,)])
    assert searching.best(2, "cheap").strategy.removed == (2,)
    assert len(table.asked) == 2


def test_a_strategy_that_meets_the_budget_beats_a_better_one_that_does_not() -> None:
    table = Table([0.9, 0.99, 0.6, 0.5], least_met=2)
    searching = loop(table)
    searching.score([(1,), (2,), (3,)])
    assert searching.best(0, "cheap").strategy.removed == (2,)


def test_the_first_found_wins_a_tie() -> None:
    searching = loop(Table([0.9, 0.5, 0.5]))
    searching.score([(2,), (1,)])
    assert searching.best(0, "cheap").strategy.removed == (2,)


def test_no_strategy_within_the_budget_is_refused() -> None:
    searching = loop(Table([0.9, 0.99], least_met=5), Infinity())
    (result,) = searching.score([(1,)])
    assert result.reward == -math.inf
    with refused("budget_missed", ""):
        searching.best(2, "dear")


def test_nothing_scored_is_refused() -> None:
    with refused("no_trial", ""):
        loop(Table([0.9])).best(2, "dear")
