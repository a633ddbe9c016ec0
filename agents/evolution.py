"""Evolution: swaps of cost between layers, the best of parent and children survives."""

from __future__ import annotations

import logging
from typing import ClassVar

import numpy as np

from agents.base import Agent, SearchTask
from agents.moves import order, some_swaps, starts, swap
from amc_env.space import Removed, SearchSpace
from amc_env.validation import Count, settings

log = logging.getLogger(__name__)
_TRIES = 50  # to mutate a strategy into a new one


@settings
class Evolution(Agent):
    """(1 + children) evolution on the budget, from the best of the uniform and the least-error strategy.

    Every child moves cost between a few pairs of decisions (`agents.moves.swap`), so every strategy uses its budget up.
    Where nothing better was found for some generations, the search continues from a strongly mutated best strategy.

    Attributes:
        children: Of a generation; they are scored together.
        patience: Generations without a better strategy before a restart.
    """

    name: ClassVar[str] = "evolution"
    steps: ClassVar[bool] = False

    children: Count = 8
    patience: Count = 10

    def search(self, task: SearchTask) -> None:
        """Scores ``task.episodes`` different strategies, or all that could be found."""
        rng, space = np.random.default_rng(task.seed), task.space
        seen = dict.fromkeys(starts(task)[: task.episodes])
        best = parent = max(task.score(list(seen)), key=order)
        stuck = 0
        while len(seen) < task.episodes:
            origin, strength = (
                (parent.removed, 1) if stuck < self.patience else (best.removed, len(space.names))
            )
            children = mutants(space, origin, rng, seen, self.children, strength)
            if not children:
                log.warning("only %d different strategies found of %d asked for", len(seen), task.episodes)
                return
            children = children[: task.episodes - len(seen)]
            seen |= dict.fromkeys(children)
            child = max(task.score(children), key=order)
            restarted = stuck >= self.patience
            stuck = 0 if restarted or order(child) > order(parent) else stuck + 1
            parent = child if restarted or order(child) >= order(parent) else parent
            best = max(best, child, key=order)


def mutants(
    space: SearchSpace,
    origin: Removed,
    rng: np.random.Generator,
    seen: dict[Removed, None],
    count: int,
    strength: int = 1,
) -> list[Removed]:
    """At most ``count`` different strategies near ``origin`` that were not seen yet.

    Args:
        space: The decisions and budgets.
        origin: A strategy that meets the budget.
        rng: Makes the choices.
        seen: Strategies to leave out.
        count: How many.
        strength: Factor on the number of swaps.
    """
    found: dict[Removed, None] = {}
    for _ in range(count + _TRIES):
        child = swap(space, origin, rng, strength * some_swaps(rng))
        if child not in seen:
            found[child] = None
        if len(found) == count:
            break
    return list(found)
