"""What an agent is given, and what it must be.

An agent sees a search in one of two ways: as Gymnasium environments that take one decision a step, or as a
`Problem` whose whole strategies it has scored. Both end at the same evaluator, which counts, keeps the best
and writes the journal; an agent only asks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from gymnasium.vector import VectorEnv

Removed = tuple[int, ...]
"""A strategy as its integers: units removed from each decision."""


class Grid(Protocol):
    """The feasible counts of one decision, ascending from 0."""

    @property
    def size(self) -> int:
        """How many there are."""

    def count(self, index: int) -> int:
        """The count at a place, from 0."""


class Budget(Protocol):
    """A limit on a cost that never rises when more is removed."""

    @property
    def cost(self) -> Callable[[Sequence[int]], float]:
        """The cost of a strategy."""

    @property
    def limit(self) -> float:
        """The most that it may be."""

    @property
    def ratio(self) -> float:
        """The limit as a share of the original's cost."""


class Problem(Protocol):
    """The decisions, their costs and the budgets, seen from the outside. A ratio is the share removed."""

    @property
    def names(self) -> Sequence[str]:
        """Names of the decisions, in order."""

    @property
    def totals(self) -> Sequence[int]:
        """Units of each decision."""

    @property
    def maxima(self) -> npt.NDArray[np.float64]:
        """Largest ratio of each decision."""

    @property
    def grids(self) -> Sequence[Grid]:
        """Feasible counts of each decision."""

    @property
    def budgets(self) -> Sequence[Budget]:
        """The budgets; empty where nothing limits the search."""

    def snap(self, ratios: Any) -> Removed:
        """Returns the nearest feasible counts."""

    def project(self, ratios: Any) -> Removed:
        """Returns the counts after the least common shift upwards that meets every budget."""

    def land(self, ratios: Any) -> Removed:
        """Returns the counts after the common shift, either way, that lands on the budget."""

    def cost(self, removed: Sequence[int]) -> dict[str, float]:
        """Returns every cost by name."""

    def met(self, removed: Sequence[int]) -> bool:
        """Returns whether every budget is met."""

    def least(self, chosen: Sequence[int]) -> int:
        """Returns the least count for the next decision from which the budgets can still be met."""


class TaskError(ValueError):
    """What was asked of an agent cannot be done: one message with the value, what is allowed and the way out."""


@dataclass(frozen=True)
class Result:
    """What a proposal turned out to be worth.

    Attributes:
        removed: The strategy that was scored.
        accuracy: In [0, 1].
        reward: The search's reward; may be minus infinity.
        met: Whether every budget is met.
    """

    removed: Removed
    accuracy: float
    reward: float
    met: bool


def _stays(removed: Removed) -> None:
    raise TaskError("this search begins with the original's weights throughout")


@dataclass(frozen=True)
class SearchTask:
    """A search to be done.

    Attributes:
        problem: The whole-strategy view.
        envs: The layer-by-layer view: so many environments side by side, whose episodes end together; the last step
            hands all their strategies to the same evaluator as ``score``.
        score: Scores whole strategies, in order.
        episodes: Episodes of the environments, or evaluations of an agent that proposes whole strategies.
        seed: What an agent draws depends on this and on the rewards alone: a killed search is resumed by
            running the agent again and reading the outcomes back, and ``episodes`` may have grown by then.
        on_update: Called with figures of the agent under slash names (agent/critic_loss), for a tracker.
        adopt: Makes the weights of a strategy just scored, repaired and shortly fine-tuned, those that ``score`` cuts
            from then on; counts stay those of units removed from the original.
    """

    problem: Problem
    envs: Callable[[int], VectorEnv[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[Any]]]
    score: Callable[[Sequence[Removed]], list[Result]]
    episodes: int
    seed: int
    on_update: Callable[[Mapping[str, float]], None] | None = None
    adopt: Callable[[Removed], None] = _stays


class Agent(ABC):
    """Searches. An agent is its settings: it holds no state between two searches.

    Attributes:
        name: What configurations call it.
        steps: True where it uses the environments, False where it proposes whole strategies.
        tunes: Whether it adopts weights, and its candidates are shortly fine-tuned unless settings say otherwise.
    """

    name: ClassVar[str]
    steps: ClassVar[bool]
    tunes: ClassVar[bool] = False

    def check(self, problem: Problem, episodes: int) -> None:  # noqa: B027 -- most can do any search
        """Refuses a search that it cannot do, before anything is scored.

        Raises:
            TaskError: It cannot.
        """

    def planned(self, problem: Problem, episodes: int) -> int:
        """About how many evaluations or episodes a search of ``episodes`` takes, for a progress display."""
        return episodes

    @abstractmethod
    def search(self, task: SearchTask) -> None:
        """Spends the task's episodes."""
