"""A toy search with a known answer, for tests of agents.

A chain of equal layers, and an accuracy that is a formula of the pruning ratios. By default one layer must not be pruned
and the others lose nothing, so the best strategy under a budget has accuracy 1 and reward 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from agents.base import Agent, SearchTask
from amc_env.encoding import DecisionDescription, Encoder
from amc_env.env import EnvHandle, PruningVectorEnv
from amc_env.rewards import Error, Reward
from amc_env.space import Budget, Grid, Removed, SearchSpace, Strategy, Trial

Accuracy = Callable[[npt.NDArray[np.float64]], float]
WIDTH, LARGEST = 32, 28
"""Channels of every layer, and how many of them may go."""


class ChainMacs:
    """MACs of a chain of 1x1 layers: the sum of kept(i) * kept(i + 1), both ends unpruned."""

    name, unit = "macs", "MACs"

    def __call__(self, removed: Sequence[int]) -> float:
        kept = np.concatenate([[WIDTH], WIDTH - np.asarray(removed, dtype=float), [WIDTH]])
        return float(kept[:-1] @ kept[1:])


def one_fragile_layer(ratios: npt.NDArray[np.float64]) -> float:
    """Every cut of the second layer loses accuracy; the other layers lose nothing."""
    return float(1.0 - ratios[1])


@dataclass
class ToySearch:
    """A search over equal layers that writes down what was asked.

    Attributes:
        accuracy: Accuracy in [0, 1] of pruning ratios [decisions].
        decisions: Number of layers.
        ratio: The budget, as a share of the MACs; None for none.
        reward: Of a scored strategy.
        bounded: Whether the environment keeps the budget.
        stop_after: Raise `KeyboardInterrupt` in place of scoring this many strategies and one; None: never.
        scored: Strategies that were scored, in order, and ``rewards`` theirs.
        batches: Numbers of environments whose episodes ended together.
    """

    accuracy: Accuracy = one_fragile_layer
    decisions: int = 4
    ratio: float | None = 0.5
    reward: Reward = field(default_factory=Error)
    bounded: bool = True
    stop_after: int | None = None
    scored: list[Removed] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        grids = [Grid(f"layer{i}", WIDTH, 1, LARGEST) for i in range(self.decisions)]
        budgets = [Budget.of(ChainMacs(), len(grids), ratio=self.ratio)] if self.ratio else []
        self.space = SearchSpace(grids, [ChainMacs()], budgets)

    def score_one(self, strategy: Strategy) -> Trial:
        """Scores one strategy and writes it down."""
        if len(self.scored) == self.stop_after:
            raise KeyboardInterrupt
        removed = strategy.removed
        score = self.accuracy(np.array(strategy.ratios))
        costs, met = self.space.cost(removed), self.space.met(removed)
        reward = self.reward(score, costs, met)
        self.scored.append(removed)
        self.rewards.append(reward)
        return Trial(len(self.scored), strategy, "original", "none", score, costs, met, reward)

    def score(self, batch: Sequence[Removed]) -> list[Trial]:
        """Scores proposals, in order."""
        return [self.score_one(self.space.strategy(removed)) for removed in batch]

    def score_all(self, strategies: Sequence[Strategy]) -> list[Trial]:
        """Scores the strategies of episodes that ended together."""
        self.batches.append(len(strategies))
        return [self.score_one(strategy) for strategy in strategies]

    def handle(self) -> EnvHandle:
        """What the toy's environments refer to."""
        described = [
            DecisionDescription(name, WIDTH, WIDTH, 8, 8, stride=1, kernel=3) for name in self.space.names
        ]
        encoder = Encoder(described, self.space)
        return EnvHandle(
            self.space, encoder, self.score_one, self.reward, self.bounded, score_all=self.score_all
        )

    def task(self, episodes: int, seed: int = 1, **more: Any) -> SearchTask:
        """The search as an agent sees it; weights that an agent adopts change nothing."""
        envs = partial(PruningVectorEnv, self.handle())
        more = {"adopt": lambda removed: None} | more
        return SearchTask(self.space, envs, self.score, episodes, seed, **more)

    def run(self, agent: Agent, episodes: int, seed: int = 1) -> ToySearch:
        """Lets an agent search."""
        agent.search(self.task(episodes, seed))
        return self
