"""The evaluator: strategies in, trials out. Every policy is scored here and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Protocol

from amc_env.errors import UserError
from amc_env.evaluation.pruner import BaseWeights, Pruned, Pruner
from amc_env.pruning.candidate import Builder
from amc_env.rewards import Error, RewardFunction
from amc_env.space import Removed, SearchSpace, Strategy, Trial


@dataclass(frozen=True)
class Key:
    """What identifies an evaluation."""

    start: str
    repair: str
    removed: Removed


class Memory(Protocol):
    """Trials by key. A dictionary will do; a journal keeps them on disk."""

    def get(self, key: Key, /) -> Trial | None:
        """The trial of an evaluation, None where it is not known."""

    def __contains__(self, key: Key, /) -> bool:
        """Whether the trial of an evaluation is known; unlike `get` it is not asked for."""

    def __setitem__(self, key: Key, trial: Trial, /) -> None: ...

    def __len__(self) -> int: ...


class Evaluator:
    """Scores strategies; the same one is never scored twice.

    Scoring is a pure function of (start, repair, strategy): it does not touch the global random state.

    Args:
        weights: The weights that strategies are pruned from at first.
        space: Costs and budgets.
        pruner: Prunes, repairs and scores candidates.
        repair: Name of the repair that strategies are scored with by default.
        memory: Trials that are known already; a journal keeps them across runs.
        reward: Of a trial's score, costs and whether its budgets are met.
    """

    def __init__(
        self,
        weights: BaseWeights,
        space: SearchSpace,
        pruner: Pruner,
        repair: str,
        memory: Memory | None = None,
        *,
        reward: RewardFunction | None = None,
    ):
        self.space = space
        self.repair = repair
        self.start = weights.name
        self.hits = 0
        self.evaluations = 0
        self._reward = reward or Error()
        self._pruner = pruner
        self._weights = {weights.name: weights}
        self._memory: Memory = {} if memory is None else memory

    def add(self, weights: BaseWeights) -> None:
        """Make further weights known, for example those that an earlier trial was fine-tuned to.

        Raises:
            ValueError: There are weights of that name already; their trials would be taken for those of these.
        """
        if weights.name in self._weights:
            raise ValueError(
                f"weights named {weights.name!r} are known already; give each state of the weights its own name"
            )
        self._weights[weights.name] = weights

    def move(self, weights: BaseWeights) -> None:
        """Switch to new base weights and drop the previous ones.

        Raises:
            ValueError: There are weights of that name already.
        """
        self.add(weights)
        left, self.start = self.start, weights.name
        del self._weights[left]

    def within(self, space: SearchSpace) -> Evaluator:
        """The same evaluator under other budgets: weights, repairs and memory are shared.

        Args:
            space: The same decisions with other budgets.
        """
        other = copy(self)
        other.space, other.hits, other.evaluations = space, 0, 0
        other._weights = dict(self._weights)
        return other

    def beside(self, weights: BaseWeights, memory: Memory) -> Evaluator:
        """An evaluator that scores in the same way and shares the calibration, with its own memory and counts.

        Args:
            weights: What strategies are pruned from.
            memory: Trials that are known already.
        """
        other = copy(self)
        other.start, other._weights, other._memory = weights.name, {weights.name: weights}, memory
        other.hits = other.evaluations = 0
        return other

    def builder(self, start: str) -> Builder:
        """What builds candidates from these weights."""
        return self._known(start).candidates

    def evaluate(
        self, strategies: Sequence[Strategy], *, start: str | None = None, repair: str | None = None
    ) -> list[Trial]:
        """All `trials` of strategies."""
        return list(self.trials(strategies, start=start, repair=repair))

    def trials(
        self, strategies: Sequence[Strategy], *, start: str | None = None, repair: str | None = None
    ) -> Iterator[Trial]:
        """Score strategies one after another; known ones come from memory.

        Args:
            strategies: What to score.
            start: Name of the weights that they are pruned from; by default the current ones.
            repair: Name of the repair; by default the search's.

        Raises:
            UserError: A candidate's outputs are not numbers, the repair is unknown, or the reward is NaN.
            ValueError: The start is unknown.
        """
        weights, repair = self._known(start or self.start), repair or self.repair
        keys = [Key(weights.name, repair, strategy.removed) for strategy in strategies]
        self._pruner.expect(weights, repair, [key.removed for key in keys if key not in self._memory])
        for strategy, key in zip(strategies, keys, strict=True):
            known = self._memory.get(key)
            if known is None:
                trial = self._scored(weights, repair, strategy)
                self._memory[key] = trial
                self.evaluations += 1
                yield trial
            else:
                self.hits += 1
                met = self.space.met(strategy.removed)  # it may have been scored under another budget
                yield replace(known, met=met, reward=self._rewarded(known.score, known.costs, met))

    def close(self) -> None:
        """End other processes that score, if there are any; what is scored later starts them again."""
        self._pruner.close()

    def _scored(self, weights: BaseWeights, repair: str, strategy: Strategy) -> Trial:
        score, seconds = self._pruner.score(weights, repair, strategy.removed)
        costs, met = self.space.cost(strategy.removed), self.space.met(strategy.removed)
        reward = self._rewarded(score, costs, met)
        number = len(self._memory) + 1
        return Trial(number, strategy, weights.name, repair, score, costs, met, reward, seconds)

    def _rewarded(self, score: float, costs: Mapping[str, float], met: bool) -> float:
        reward = self._reward(score, costs, met)
        if math.isnan(reward):
            raise UserError(f"the reward of score {score} and costs {dict(costs)} is NaN", code="nan_reward")
        return reward

    def _known(self, name: str) -> BaseWeights:
        if name not in self._weights:
            raise ValueError(f"unknown start {name!r}; there are {', '.join(self._weights)}")
        return self._weights[name]

    def apply(self, strategy: Strategy, *, start: str | None = None, repair: str | None = None) -> Pruned:
        """Prune and repair without scoring.

        Args:
            strategy: What to remove.
            start: As in `trials`.
            repair: As in `trials`.
        """
        return self._pruner.pruned(self._known(start or self.start), repair or self.repair, strategy.removed)

    def network(self, trial: Trial) -> Pruned:
        """The network that was scored, bit for bit."""
        return self.apply(trial.strategy, start=trial.start, repair=trial.repair)
