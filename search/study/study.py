"""The search loop: what agents ask ends here, is counted, compared and shown."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from agents.base import Result
from amc_env.errors import UserError
from amc_env.evaluation.evaluator import Evaluator, Outcome
from amc_env.evaluation.pruner import Start
from amc_env.rewards import RewardFunction
from amc_env.space import Removed, Strategy


@dataclass(frozen=True)
class Scored:
    """An outcome and its reward."""

    outcome: Outcome
    reward: float


@dataclass(frozen=True)
class Episode:
    """What an episode came to.

    Attributes:
        number: From 1.
        scored: This episode's.
        best: The best so far.
        evaluations: Different strategies so far.
        cache_hits: Episodes that ended in one met before.
    """

    number: int
    scored: Scored
    best: Scored
    evaluations: int
    cache_hits: int


class Loop:
    """Scores what agents propose and remembers the best.

    Attributes:
        seconds: Of the search, when it is over.
        episodes: So far.

    Args:
        evaluator: Judges strategies.
        reward: Turns outcomes into rewards.
        on_episode: Called after every episode.
        moved: Makes the start with an outcome's network, for agents that adopt weights: (outcome, round from 1).
    """

    def __init__(
        self,
        evaluator: Evaluator,
        reward: RewardFunction,
        on_episode: Callable[[Episode], None] | None = None,
        moved: Callable[[Outcome, int], Start] | None = None,
    ):
        self.evaluator = evaluator
        self.seconds = 0.0
        self.episodes = 0
        self._reward = reward
        self._on_episode = on_episode
        self._best: Scored | None = None
        self._ranked: dict[Removed, Scored] = {}
        self._before = 0  # different evaluations from the weights before
        self._moved = moved
        self._rounds = 0
        self._finalists = 0
        self._started = time.perf_counter()

    @property
    def evaluations(self) -> int:
        """Different evaluations asked for, those read back from a journal included."""
        return self._before + len(self._ranked) + self._finalists

    @property
    def cache_hits(self) -> int:
        """Episodes that ended in a strategy met before."""
        return self.episodes - self._before - len(self._ranked)

    def outcome(self, strategy: Strategy) -> Outcome:
        """Scores an environment's strategy: one episode."""
        return self.outcomes([strategy])[0]

    def outcomes(self, strategies: Sequence[Strategy]) -> list[Outcome]:
        """Scores the strategies of several environments, in order: one episode each."""
        return [scored.outcome for scored in self._episodes(strategies)]

    def score(self, proposals: Sequence[Removed]) -> list[Result]:
        """Scores whole strategies, in order: one episode each."""
        scored = self._episodes([self.evaluator.problem.strategy(removed) for removed in proposals])
        return [
            Result(s.outcome.strategy.removed, s.outcome.accuracy, s.reward, s.outcome.met) for s in scored
        ]

    def _episodes(self, strategies: Sequence[Strategy]) -> list[Scored]:
        outcomes = self.evaluator.outcomes(strategies)  # shown as they come
        return [self._episode(self._rewarded(outcome)) for outcome in outcomes]

    def adopt(self, removed: Removed) -> None:
        """Goes on from the weights of a strategy just scored; what was scored before is no longer compared with.

        Raises:
            ValueError: The strategy was not scored from the present weights.
        """
        if self._moved is None or removed not in self._ranked:
            raise ValueError(f"the strategy {removed} was not scored in this round, so it cannot be adopted")
        self._rounds += 1
        self.evaluator.move(self._moved(self._ranked[removed].outcome, self._rounds))
        self._before += len(self._ranked)
        self._ranked, self._best = {}, None

    def _rewarded(self, outcome: Outcome) -> Scored:
        reward = self._reward(outcome.accuracy, outcome.costs, outcome.met)
        if math.isnan(reward):
            raise UserError(
                f"the reward of accuracy {outcome.accuracy} and costs {dict(outcome.costs)} is NaN"
            )
        return Scored(outcome, reward)

    def _episode(self, scored: Scored) -> Scored:
        self.episodes += 1
        self._ranked.setdefault(scored.outcome.strategy.removed, scored)
        if self._best is None or _order(scored) > _order(self._best):
            self._best = scored
        if self._on_episode is not None:
            counts = self.evaluations, self.cache_hits
            self._on_episode(Episode(self.episodes, scored, self._best, *counts))
        return scored

    def best(self, finalists: int, repair: str) -> Scored:
        """The strategy to deliver.

        Args:
            finalists: The best so many are scored once more with ``repair``, and the best of
                those is delivered as it was scored; 0 delivers the best as the search scored it.
            repair: Name of that repair.

        Raises:
            UserError: Nothing was scored, or no strategy met the budget.
        """
        ranked = sorted(self._ranked.values(), key=_order, reverse=True)  # stable: the first found wins ties
        if not ranked:
            raise UserError("the search scored nothing; search.episodes must be at least 1")
        if not ranked[0].outcome.met:
            raise UserError(
                f"none of {len(ranked)} strategies met the budget; search longer, or keep the bound on "
                "(enforce_budget=true)"
            )
        if finalists > 0 and repair != self.evaluator.repair and not self._rounds:
            strategies = [scored.outcome.strategy for scored in ranked[:finalists] if scored.outcome.met]
            self._finalists = len(strategies)
            again = self.evaluator.evaluate(strategies, repair=repair)
            ranked = sorted((self._rewarded(outcome) for outcome in again), key=_order, reverse=True)
        self.seconds = time.perf_counter() - self._started
        return ranked[0]


def _order(scored: Scored) -> tuple[bool, float]:
    return scored.outcome.met, scored.reward
