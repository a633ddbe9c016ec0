"""Toy searches with known answers: a chain of layers, and an accuracy in closed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest

from agents.base import Agent, Result, SearchTask
from amc_env.encoding import DecisionDescription, Encoder
from amc_env.env import EnvHandle, PruningEnv, PruningVectorEnv
from amc_env.rewards import Error, Infinity
from amc_env.space import Budget, Grid, Problem, Strategy


class ChainMacs:
    """Layers of equal width in a chain: sum of kept(i) * kept(i + 1), the two ends whole."""

    name, unit = "macs", "MACs"

    def __init__(self, totals: Sequence[int]):
        self.totals = np.asarray(totals, dtype=float)

    def __call__(self, removed: Sequence[int]) -> float:
        kept = np.concatenate([[self.totals[0]], self.totals - np.asarray(removed), [self.totals[-1]]])
        return float(kept[:-1] @ kept[1:])


@dataclass(frozen=True)
class ToyOutcome:
    strategy: Strategy
    accuracy: float
    costs: dict[str, float]
    met: bool


@dataclass
class Toy:
    """A search over equal layers.

    ``scored`` lists what was asked for, ``rewards`` what it was worth, ``rounds`` how many episodes ended together.
    """

    accuracy: Callable[[np.ndarray], float]
    decisions: int = 4
    ratio: float | None = 0.5
    bounded: bool = True
    scored: list[tuple[int, ...]] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        grids = [Grid(f"layer{i}", 32, 1, 28) for i in range(self.decisions)]
        macs = ChainMacs([grid.total for grid in grids])
        budgets = [Budget.of(macs, len(grids), ratio=self.ratio)] if self.ratio else []
        self.problem = Problem(grids, [macs], budgets)
        described = [DecisionDescription(grid.name, 32, 32, 8, 8, 1, 3) for grid in grids]
        self.encoder = Encoder(described, self.problem)
        self.reward = Error() if self.bounded else Infinity()

    def outcome(self, strategy: Strategy) -> ToyOutcome:
        removed = strategy.removed
        return ToyOutcome(
            strategy,
            self.accuracy(np.array(strategy.ratios)),
            self.problem.cost(removed),
            self.problem.met(removed),
        )

    def score_one(self, strategy: Strategy) -> ToyOutcome:
        outcome = self.outcome(strategy)
        self.scored.append(strategy.removed)
        self.rewards.append(self.reward(outcome.accuracy, outcome.costs, outcome.met))
        return outcome

    def score(self, batch: Sequence[tuple[int, ...]]) -> list[Result]:
        outcomes = [self.score_one(self.problem.strategy(removed)) for removed in batch]
        rewards = self.rewards[-len(outcomes) :]
        return [
            Result(o.strategy.removed, o.accuracy, reward, o.met)
            for o, reward in zip(outcomes, rewards, strict=True)
        ]

    def score_all(self, strategies: Sequence[Strategy]) -> list[ToyOutcome]:
        self.rounds.append(len(strategies))
        return [self.score_one(strategy) for strategy in strategies]

    def handle(self) -> EnvHandle:
        return EnvHandle(
            self.problem, self.encoder, self.score_one, self.reward, self.bounded, score_all=self.score_all
        )

    def env(self) -> PruningEnv:
        return PruningEnv(self.handle())

    def task(self, episodes: int, seed: int = 1, **more: object) -> SearchTask:
        envs = partial(PruningVectorEnv, self.handle())
        return SearchTask(self.problem, envs, self.score, episodes, seed, **more)

    def run(self, agent: Agent, episodes: int, seed: int = 1) -> Toy:
        agent.search(self.task(episodes, seed))
        return self


def one_fragile_layer(ratios: np.ndarray) -> float:
    """Layer 1 is hurt by every cut, the others not at all: the optimum leaves it whole, accuracy 1."""
    return float(1.0 - ratios[1])


@pytest.fixture
def toy() -> Callable[..., Toy]:
    """Builds toy searches; by default of four layers, the second of which must not be cut."""

    def build(accuracy: Callable[[np.ndarray], float] = one_fragile_layer, **more: object) -> Toy:
        return Toy(accuracy, **more)

    return build
