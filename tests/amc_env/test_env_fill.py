"""fill_budget: the scored strategy uses the budget up, evenly, and never exceeds it."""

from __future__ import annotations

import numpy as np
import pytest

from amc_env.encoding import DecisionDescription, Encoder
from amc_env.env import EnvHandle, PruningEnv
from amc_env.rewards import Error
from amc_env.space import Budget, Grid, SearchSpace, Strategy, Trial


class Linear:
    """A cost of 10 a unit kept, over two decisions of 20 units."""

    name = "macs"
    unit = "MACs"

    def __call__(self, removed: tuple[int, ...] | list[int]) -> float:
        return 10.0 * (40 - sum(removed))


def scored_by(fill: bool, actions: tuple[float, float]) -> tuple[Strategy, SearchSpace]:
    grids = [Grid(name, 20, 1, 18) for name in ("a", "b")]
    cost = Linear()
    space = SearchSpace(grids, [cost], [Budget.of(cost, 2, ratio=0.5)])
    encoder = Encoder([DecisionDescription(name, 20, 20, 4, 4, 1, 3) for name in ("a", "b")], space)

    def score(strategy: Strategy) -> Trial:
        costs, met = space.cost(strategy.removed), space.met(strategy.removed)
        return Trial(1, strategy, "original", "none", 0.5, costs, met, -0.5)

    env = PruningEnv(EnvHandle(space, encoder, score, Error(), fill_budget=fill))
    env.reset()
    for action in actions:
        info = env.step(np.array([action], dtype=np.float32))[4]
    return info["strategy"], space


def test_without_it_an_overshooting_policy_stays_below_the_budget() -> None:
    strategy, _ = scored_by(fill=False, actions=(0.8, 0.6))
    assert strategy.removed == (16, 12)


def test_with_it_all_ratios_are_lowered_together_to_the_budget() -> None:
    strategy, space = scored_by(fill=True, actions=(0.8, 0.6))
    assert strategy.removed == (12, 8)  # 20 units of 40 must go, and the difference of 4 stays
    assert space.cost(strategy.removed)["macs"] == pytest.approx(200.0)


def test_a_policy_on_the_budget_is_left_alone() -> None:
    strategy, _ = scored_by(fill=True, actions=(0.7, 0.3))
    assert strategy.removed == (14, 6)
