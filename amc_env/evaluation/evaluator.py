"""The evaluator: strategies in, outcomes out. Every policy is judged here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

from torch import nn

from amc_env.evaluation.pruner import ORIGINAL, Bench, Pruned, Start
from amc_env.pruning.candidate import Builder
from amc_env.space import Problem, Strategy


@dataclass(frozen=True)
class Outcome:
    """What a strategy is worth.

    Attributes:
        strategy: The strategy.
        accuracy: On the search split, in [0, 1].
        costs: All costs by name.
        met: Whether every budget holds.
        repair: Name of the repair that it was scored with.
        start: Name of the weights that it was cut from.
    """

    strategy: Strategy
    accuracy: float
    costs: Mapping[str, float]
    met: bool
    repair: str
    start: str = ORIGINAL


@dataclass(frozen=True)
class Key:
    """What identifies an evaluation."""

    start: str
    repair: str
    removed: tuple[int, ...]


class Evaluator:
    """Turns strategies into outcomes; the same one is never scored twice.

    Scoring is a pure function of (start, repair, strategy): it does not touch the global random state.

    Args:
        start: The weights that a search begins with.
        problem: Costs and budgets.
        scorer: Accuracy of a cut network.
        repair: Name of the repair that strategies are scored with by default.
        memo: Accuracies known already; a journal keeps them across runs.
        threads: Of torch while candidates are cut, mended and scored; None leaves them as they are.
    """

    def __init__(
        self,
        start: Start,
        problem: Problem,
        scorer: Callable[[nn.Module], float],
        repair: str,
        memo: MutableMapping[Key, Outcome] | None = None,
        *,
        threads: int | None = None,
    ):
        self.problem = problem
        self.repair = repair
        self.start = start.name
        self.hits = 0
        self.evaluations = 0
        self._bench = Bench(scorer, threads)
        self._starts = {start.name: start}
        self._memo: MutableMapping[Key, Outcome] = {} if memo is None else memo

    def begin(self, start: Start) -> None:
        """Makes further weights known, for example those that an earlier outcome was tuned to.

        Raises:
            ValueError: There is a start of that name already; its outcomes would be taken for this one's.
        """
        if start.name in self._starts:
            raise ValueError(
                f"a start named {start.name!r} is known already; give each state of the weights its own name"
            )
        self._starts[start.name] = start

    def move(self, start: Start) -> None:
        """Goes on from further weights: strategies are cut from them by default, and those before are forgotten.

        Raises:
            ValueError: There is a start of that name already.
        """
        self.begin(start)
        left, self.start = self.start, start.name
        del self._starts[left]

    def builder(self, start: str) -> Builder:
        """What builds candidates from these weights."""
        return self._known_start(start).candidates

    def evaluate(
        self, strategies: Sequence[Strategy], *, start: str | None = None, repair: str | None = None
    ) -> list[Outcome]:
        """The `outcomes` of strategies, all of them."""
        return list(self.outcomes(strategies, start=start, repair=repair))

    def outcomes(
        self,
        strategies: Sequence[Strategy],
        *,
        start: str | None = None,
        repair: str | None = None,
    ) -> Iterator[Outcome]:
        """Scores strategies and gives each as soon as it and those before it are known; from memory where they are.

        Args:
            strategies: What to score.
            start: Name of the weights that they are cut from; by default those that the search began with.
            repair: Name of the repair; by default the search's.

        Raises:
            UserError: A candidate's outputs are not numbers, or the repair is unknown.
            ValueError: The start is unknown.
        """
        begun, mend = self._known_start(start or self.start), repair or self.repair
        for strategy in strategies:
            key = Key(begun.name, mend, strategy.removed)
            outcome = self._memo.get(key)
            if outcome is None:
                outcome = self._outcome(key, strategy, self._bench.score(begun, mend, strategy.removed))
                self._memo[key] = outcome
                self.evaluations += 1
            else:
                self.hits += 1
            yield outcome

    def _known_start(self, name: str) -> Start:
        if name not in self._starts:
            raise ValueError(f"unknown start {name!r}; there are {', '.join(self._starts)}")
        return self._starts[name]

    def _outcome(self, key: Key, strategy: Strategy, accuracy: float) -> Outcome:
        costs, met = self.problem.cost(strategy.removed), self.problem.met(strategy.removed)
        return Outcome(strategy, accuracy, costs, met, key.repair, key.start)

    def apply(self, strategy: Strategy, *, start: str | None = None, repair: str | None = None) -> Pruned:
        """Prunes and mends without scoring.

        Args:
            strategy: What to remove.
            start: As in `evaluate`.
            repair: As in `evaluate`.
        """
        return self._bench.pruned(
            self._known_start(start or self.start), repair or self.repair, strategy.removed
        )

    def network(self, outcome: Outcome) -> Pruned:
        """The network that was scored, bit for bit."""
        return self.apply(outcome.strategy, start=outcome.start, repair=outcome.repair)
