"""What an agent is given, and what it must be.

An agent sees a search in one of two ways: as Gymnasium environments that take one decision a step, or as a
`SearchSpace` whose whole strategies it has scored. Both end at the same evaluator, which counts, keeps the best
and writes the journal; an agent only asks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from gymnasium.vector import VectorEnv

from amc_env.errors import UserError
from amc_env.space import Removed, SearchSpace, Trial


def _stays(removed: Removed) -> None:
    raise UserError("this search cuts every strategy from the original's weights", code="unsupported")


@dataclass(frozen=True)
class SearchTask:
    """A search to be done.

    Attributes:
        space: The whole-strategy view.
        envs: The layer-by-layer view: so many environments side by side, whose episodes end together; the last step
            hands all their strategies to the same evaluator as ``score``.
        score: Scores whole strategies, in order.
        episodes: Episodes of the environments, or evaluations of an agent that proposes whole strategies.
        seed: What an agent draws depends on this and on the rewards alone: a killed search is resumed by
            running the agent again and reading the outcomes back, and ``episodes`` may have grown by then.
        on_update: Called with figures of the agent under slash names (agent/critic_loss), for a tracker.
        layer_errors: Gives, for every decision, the relative error that its cut alone leaves in the layers that read
            it after least squares, at each of its feasible counts (`amc_env.space.Grid`), ascending from 0; None where
            that is not known. It costs no evaluation.
        save: Writes a file of the agent's into the run folder: its name and content. None where there is no folder.
        known: Trials of earlier searches from the same weights under looser budgets, in order; `Trial.met` and the reward
            are those of their budgets.
        adopt: Makes the weights of a strategy just scored, repaired and shortly fine-tuned, those that ``score`` cuts
            from then on; counts stay those of units removed from the original.
    """

    space: SearchSpace
    envs: Callable[[int], VectorEnv[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[Any]]]
    score: Callable[[Sequence[Removed]], list[Trial]]
    episodes: int
    seed: int
    on_update: Callable[[Mapping[str, float]], None] | None = None
    adopt: Callable[[Removed], None] = _stays
    layer_errors: Callable[[], Sequence[npt.NDArray[np.float64]] | None] = lambda: None
    save: Callable[[str, bytes], None] | None = None
    known: Sequence[Trial] = ()


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

    def check(self, space: SearchSpace, episodes: int) -> None:  # noqa: B027 -- most can do any search
        """Refuses a search that it cannot do, before anything is scored.

        Raises:
            UserError: It cannot.
        """

    def planned(self, space: SearchSpace, episodes: int) -> int:
        """About how many evaluations or episodes a search of ``episodes`` takes, for a progress display."""
        return episodes

    @abstractmethod
    def search(self, task: SearchTask) -> None:
        """Spends the task's episodes."""
