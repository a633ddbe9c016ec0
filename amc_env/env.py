"""The search for a pruning strategy as a Gymnasium environment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from amc_env.encoding import FEATURES, Encoder
from amc_env.errors import UserError
from amc_env.rewards import RewardFunction

if TYPE_CHECKING:
    from amc_env.budget import Problem
    from amc_env.evaluator import Outcome
    from amc_env.strategy import Strategy

Observation = npt.NDArray[np.float32]
Action = npt.NDArray[np.float32]


@dataclass(frozen=True)
class EnvHandle:
    """Everything that an environment refers to, shared and never copied.

    ``gymnasium.make`` and the wrappers' ``spec`` deep-copy keyword arguments; this object answers with
    itself, so the network and the data behind ``score`` stay where they are.

    Attributes:
        problem: The decisions, their costs and the budgets.
        encoder: Makes the observations.
        score: Scores a whole strategy; called once an episode, at its last step.
        reward: Turns accuracy, costs and "budget met" into the reward.
        enforce_budget: Raise each action to the least ratio from which the budgets can still be met.
        fill_budget: At the last step, lower all ratios together as far as the budgets allow before the
            strategy is scored. Not in AMC: its bound only raises actions, so episodes often end far below the
            budget.
    """

    problem: Problem
    encoder: Encoder
    score: Callable[[Strategy], Outcome]
    reward: RewardFunction
    enforce_budget: bool = True
    fill_budget: bool = False

    def __copy__(self) -> EnvHandle:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> EnvHandle:
        return self


class PruningEnv(gymnasium.Env[Observation, Action]):
    """Decides layer by layer how much of a network is removed; the whole strategy is scored at the end.

    ## Description
    One step is one decision: a set of coupled channels (or, for other granularities, one layer), in forward
    order. The environment sees no tensor: it is given decisions, costs, budgets and a callable that scores a
    strategy. This is the decision process of AMC (He et al., ECCV 2018).

    ## Action space
    ``Box(0, m, (1,), float32)``: the pruning ratio, the share *removed*; m <= 1 is the largest ratio that any
    decision allows. An action becomes the nearest feasible count of the decision (what is kept stays a
    multiple of the channel multiple, ties to the smaller count); with ``enforce_budget`` that is then raised
    to the least count from which every budget can still be met, later decisions at their largest. Finite
    actions outside the box are taken for the nearest feasible count as well. With ``fill_budget`` the
    strategy that is scored has all ratios lowered together as far as the budgets allow: ``strategy``,
    ``executed_ratio`` and ``macs`` of the last step are that strategy's, while observations and earlier infos
    hold what was known then.

    ## Observation space
    ``Box(0, 1, (11,), float32)``, describing the decision now taken. n, c, h, w, stride and k are of its
    first consumer in forward order; sizes s are scaled as log(1 + s) / log(1 + largest).

    | #  | feature        | meaning                                                              | largest |
    |----|----------------|----------------------------------------------------------------------|---------|
    | 0  | index          | number of the decision, from 0                                       | 255     |
    | 1  | out_channels   | n                                                                    | 4095    |
    | 2  | in_channels    | c                                                                    | 4095    |
    | 3  | height         | h, pixels of the layer's input                                       | 511     |
    | 4  | width          | w, pixels of the layer's input                                       | 511     |
    | 5  | stride         | stride                                                               | 7       |
    | 6  | kernel         | k                                                                    | 15      |
    | 7  | macs           | MACs that removing all of this decision would save, of the original  | a share |
    | 8  | reduced        | MACs saved by the decisions taken, of the original                   | a share |
    | 9  | rest           | MACs that removing all later decisions would save now                | a share |
    | 10 | previous_ratio | the ratio executed at the previous step                              | a share |

    After the last step the observation is zero.

    ## Rewards
    0 at every step but the last; there ``reward(accuracy, costs, met)`` of the scored strategy. The reward
    "infinity" is -inf where the budget is missed; it needs ``enforce_budget=False``.

    ## Episode
    ``reset`` starts at the first decision; nothing is random, seeds are accepted and change nothing, and
    there are no options. The episode terminates after the last decision and is never truncated.

    ## Info of a step
    | key            | meaning                                                                           |
    |----------------|-----------------------------------------------------------------------------------|
    | decision       | name of the decision just taken                                                   |
    | executed_ratio | the ratio carried out, after snapping and the bound                               |
    | bound          | least ratio that was allowed; 0 without a budget or with ``enforce_budget=False`` |
    | macs           | MACs left by the decisions taken so far, later ones untouched                     |
    | accuracy       | last step only: accuracy of the strategy, in [0, 1]                               |
    | met            | last step only: whether every budget is met                                       |
    | strategy       | last step only: the `Strategy` that was scored                                    |
    | outcome        | last step only: the evaluator's `Outcome`                                         |

    ## Arguments
    ``gymnasium.make("amc_env/Pruning-v0", handle=EnvHandle(problem, encoder, score, reward))``
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 -- declared so by gymnasium.Env

    def __init__(self, handle: EnvHandle) -> None:
        """Builds the environment around what ``handle`` refers to.

        Raises:
            UserError: The reward judges missed budgets and the bound would let none occur.
        """
        if handle.enforce_budget and getattr(handle.reward, "needs_bound_off", False):
            raise UserError(
                f"reward {getattr(handle.reward, 'name', handle.reward)!r} judges strategies that miss the "
                "budget, and the bound on the action never lets one miss it; set enforce_budget=False, or "
                "use reward=error"
            )
        self.handle = handle
        most = float(np.max(handle.problem.maxima))
        self.action_space = spaces.Box(0.0, most, (1,), np.float32)
        self.observation_space = spaces.Box(0.0, 1.0, (len(FEATURES),), np.float32)
        self._chosen: list[int] | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Starts at the first decision with nothing removed."""
        super().reset(seed=seed)
        self._chosen = []
        return self.handle.encoder(()), {}

    def step(self, action: Action) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Takes one decision; the last one scores the strategy.

        Raises:
            ValueError: The action is not one finite number.
            UserError: The reward of the scored strategy is NaN, or its accuracy is no share.
            gymnasium.error.ResetNeeded: The episode is over, or none was begun.
        """
        problem = self.handle.problem
        if self._chosen is None or len(self._chosen) == len(problem.names):
            raise gymnasium.error.ResetNeeded("no episode is running: call reset() before step()")
        info = self._decide(_ratio(action, problem.names[len(self._chosen)]))
        if len(self._chosen) < len(problem.names):
            return self.handle.encoder(self._chosen), 0.0, False, False, info
        reward = self._finish(info)
        return np.zeros(len(FEATURES), np.float32), reward, True, False, info

    def _decide(self, ratio: float) -> dict[str, Any]:
        """Carries out the next decision and describes it."""
        assert self._chosen is not None
        problem, t = self.handle.problem, len(self._chosen)
        least = problem.least(self._chosen) if self.handle.enforce_budget else 0
        self._chosen.append(max(problem.grids[t].snap(ratio), least))
        costs = problem.cost(self._chosen + [0] * (len(problem.names) - t - 1))
        return {
            "decision": problem.names[t],
            "executed_ratio": self._chosen[-1] / problem.totals[t],
            "bound": least / problem.totals[t],
            "macs": costs["macs"],
        }

    def _finish(self, info: dict[str, Any]) -> float:
        """Scores the strategy, adds what is known of it to ``info`` and returns its reward."""
        assert self._chosen is not None
        strategy = self.handle.problem.strategy(self._filled())
        outcome = self.handle.score(strategy)
        reward = float(self.handle.reward(outcome.accuracy, outcome.costs, outcome.met))
        if np.isnan(reward):
            raise UserError(f"the reward of accuracy {outcome.accuracy} and costs {outcome.costs} is NaN")
        info.update(accuracy=outcome.accuracy, met=outcome.met, strategy=strategy, outcome=outcome)
        info.update(executed_ratio=strategy.ratios[-1], macs=outcome.costs["macs"])
        return reward

    def _filled(self) -> Sequence[int]:
        """The counts to score: those chosen, or all lowered together until a budget is used up."""
        assert self._chosen is not None
        problem = self.handle.problem
        if not self.handle.fill_budget or not problem.met(self._chosen):
            return self._chosen
        return problem.land(
            [count / total for count, total in zip(self._chosen, problem.totals, strict=True)]
        )


def _ratio(action: Action, decision: str) -> float:
    """The one number of an action."""
    values = np.asarray(action, dtype=np.float64).reshape(-1)
    if values.shape != (1,) or not np.isfinite(values).all():
        raise ValueError(
            f"decision {decision!r} was given the action {action!r}; one finite pruning ratio is needed"
        )
    return float(values[0])
