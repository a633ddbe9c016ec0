"""Write an agent of your own: hill climbing from the uniform strategy."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from own_network import make_loaders, train_network

from agents.base import Agent, SearchTask
from agents.testing import check_agent
from search import compress


@dataclass(frozen=True)
class HillClimbing(Agent):
    """Change the best strategy at random; keep the change where it is no worse.

    Attributes:
        step: Standard deviation of a change, in pruning ratio.
    """

    name: ClassVar[str] = "hill_climbing"
    steps: ClassVar[bool] = False

    step: float = 0.1

    def search(self, task: SearchTask) -> None:
        """Score ``task.episodes`` strategies, all of them on the budget."""
        space, rng = task.space, np.random.default_rng(task.seed)
        totals = np.array(space.totals)
        best = task.score([space.project(np.zeros(len(totals)))])[0]
        for _ in range(task.episodes - 1):
            ratios = np.array(best.removed) / totals + rng.normal(0.0, self.step, len(totals))
            result = task.score([space.land(np.clip(ratios, 0.0, space.maxima))])[0]
            if result.reward >= best.reward:
                best = result


if __name__ == "__main__":
    check_agent(HillClimbing)
    train, val, test = make_loaders()
    small = compress(
        train_network(),
        train,
        val,
        budget=0.3,
        agent=HillClimbing(),
        test_loader=test,
        episodes=60,
        finetune=0,
    )
    print(f"accuracy {small.result.base.accuracy:.3f} -> {small.result.pruned.accuracy:.3f}")
    print({name: round(ratio, 2) for name, ratio in small.strategy.items()})
