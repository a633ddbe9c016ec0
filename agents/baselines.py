"""Policies that learn nothing, and are hard to beat: print them beside every learned result."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from typing import ClassVar

import numpy as np

from agents.base import Agent, SearchTask
from amc_env.errors import UserError
from amc_env.space import Removed, SearchSpace
from amc_env.validation import Count, FractionOrZero, settings

log = logging.getLogger(__name__)


@settings
class Uniform(Agent):
    """One ratio for every decision: the least that meets the budget. One evaluation.

    Attributes:
        ratio: The ratio to begin from, raised where the budget asks for more; needed without a budget.
    """

    name: ClassVar[str] = "uniform"
    steps: ClassVar[bool] = False

    ratio: FractionOrZero | None = None

    def search(self, task: SearchTask) -> None:
        """Scores the one strategy.

        Raises:
            UserError: There is neither a budget nor a ratio.
        """
        if self.ratio is None and not task.space.budgets:
            raise UserError(
                "agent=uniform with budget=none has no ratio to use; set agent.ratio, like agent.ratio=0.5",
                code="missing",
                field="agent.ratio",
            )
        task.score([task.space.project([self.ratio or 0.0] * len(task.space.names))])


@settings
class Random(Agent):
    """Ratios drawn uniformly, shifted together so that they land on the budget.

    Attributes:
        redraws: Draws in a row that may repeat earlier strategies before the search ends for want of new
            ones.
    """

    name: ClassVar[str] = "random"
    steps: ClassVar[bool] = False

    redraws: Count = 100

    def search(self, task: SearchTask) -> None:
        """Scores ``task.episodes`` different strategies, or all that could be found."""
        strategies = list(islice(self._draw(task.space, np.random.default_rng(task.seed)), task.episodes))
        if len(strategies) < task.episodes:
            log.warning("only %d different strategies found of %d asked for", len(strategies), task.episodes)
        task.score(strategies)

    def _draw(self, space: SearchSpace, rng: np.random.Generator) -> Iterator[Removed]:
        """Different strategies, without end unless repeats run into ``redraws``."""
        seen: set[Removed] = set()
        repeats = 0
        while repeats < self.redraws:
            removed = space.land(rng.uniform(0.0, space.maxima))
            repeats = repeats + 1 if removed in seen else 0
            if repeats == 0:
                seen.add(removed)
                yield removed
