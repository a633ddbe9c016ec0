"""The search: what an agent proposes is scored, counted and compared here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from amc_env.errors import UserError
from amc_env.evaluation.evaluator import Evaluator
from amc_env.evaluation.pruner import BaseWeights
from amc_env.space import Removed, Strategy, Trial


class Study:
    """Scores what an agent proposes and remembers the best.

    Attributes:
        seconds: Duration of the search, once it is over.
        episodes: So far.
        best_so_far: The best trial yet; None before the first.
        states: The first trial from each state of the weights: of an agent that adopts weights, one a round.

    Args:
        evaluator: Scores strategies.
        on_episode: Called with the trial of every episode.
        adopted: Makes the weights of a trial's network, for agents that adopt weights: (trial, round from 1).
    """

    def __init__(
        self,
        evaluator: Evaluator,
        on_episode: Callable[[Trial], None] | None = None,
        adopted: Callable[[Trial, int], BaseWeights] | None = None,
    ):
        self.evaluator = evaluator
        self.seconds = 0.0
        self.episodes = 0
        self.best_so_far: Trial | None = None
        self.states: list[Trial] = []
        self._on_episode = on_episode
        self._ranked: dict[Removed, Trial] = {}
        self._before = 0  # different evaluations from earlier weights
        self._adopted = adopted
        self._rounds = 0
        self._finalists = 0
        self._started = time.perf_counter()

    @property
    def evaluations(self) -> int:
        """Different evaluations asked for, those read back from a journal included."""
        return self.scored + self._finalists

    @property
    def scored(self) -> int:
        """Different strategies that the agent had scored."""
        return self._before + len(self._ranked)

    @property
    def trials(self) -> list[Trial]:
        """Different strategies scored from the current weights, in order, finalists left out."""
        return list(self._ranked.values())

    @property
    def cache_hits(self) -> int:
        """Episodes that ended in a strategy that was scored before."""
        return self.episodes - self.scored

    def score(self, proposals: Sequence[Removed]) -> list[Trial]:
        """Score whole strategies, in order: one episode each."""
        return self.score_all([self.evaluator.space.strategy(removed) for removed in proposals])

    def score_one(self, strategy: Strategy) -> Trial:
        """Score an environment's strategy: one episode."""
        return self.score_all([strategy])[0]

    def score_all(self, strategies: Sequence[Strategy]) -> list[Trial]:
        """Score the strategies of several environments, in order: one episode each."""
        return [self._episode(trial) for trial in self.evaluator.trials(strategies)]

    def adopt(self, removed: Removed) -> None:
        """Continue from the weights of a strategy just scored; earlier trials are no longer compared with.

        Raises:
            ValueError: The strategy was not scored from the current weights.
        """
        if self._adopted is None or removed not in self._ranked:
            raise ValueError(f"the strategy {removed} was not scored in this round, so it cannot be adopted")
        self._rounds += 1
        self.evaluator.move(self._adopted(self._ranked[removed], self._rounds))
        self._before += len(self._ranked)
        self._ranked, self.best_so_far = {}, None

    def until(self, trial: Trial, evaluator: Evaluator) -> Study:
        """The study as it stood when the first trial of a state of the weights had been scored.

        Args:
            trial: One of `states`.
            evaluator: Scores further strategies.
        """
        study = Study(evaluator)
        study.episodes = study._before = trial.number
        study.seconds = self.seconds
        return study

    def _episode(self, trial: Trial) -> Trial:
        self.episodes += 1
        if not self._ranked:
            self.states.append(trial)
        self._ranked.setdefault(trial.removed, trial)
        if self.best_so_far is None or _order(trial) > _order(self.best_so_far):
            self.best_so_far = trial
        if self._on_episode is not None:
            self._on_episode(trial)
        return trial

    def best(self, finalists: int, repair: str) -> Trial:
        """The strategy to deliver.

        Args:
            finalists: So many of the best are scored again with ``repair``, and the best of those is delivered; 0
                delivers the best as the search scored it.
            repair: Name of that repair.

        Raises:
            UserError: Nothing was scored, or no strategy met the budget.
        """
        ranked = sorted(self._ranked.values(), key=_order, reverse=True)  # stable: the first found wins ties
        if not ranked:
            raise UserError("the search scored nothing; search.episodes must be at least 1", code="no_trial")
        if not ranked[0].met:
            raise UserError(
                f"none of {len(ranked)} strategies met the budget; search longer, or keep the bound on "
                "(enforce_budget=true)",
                code="budget_missed",
            )
        if finalists > 0 and repair != self.evaluator.repair and not self._rounds:
            strategies = [trial.strategy for trial in ranked[:finalists] if trial.met]
            self._finalists = len(strategies)
            ranked = sorted(self.evaluator.evaluate(strategies, repair=repair), key=_order, reverse=True)
        self.seconds = time.perf_counter() - self._started
        return ranked[0]


def _order(trial: Trial) -> tuple[bool, float]:
    return trial.met, trial.reward
