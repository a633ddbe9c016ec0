"""The search for a pruning strategy as a Gymnasium environment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from amc_env.encoding import FEATURES, Encoder
from amc_env.errors import UserError, diverged
from amc_env.rewards import RewardFunction

if TYPE_CHECKING:
    from amc_env.space import SearchSpace, Strategy, Trial

Observation = npt.NDArray[np.float32]
Action = npt.NDArray[np.float32]
Info = dict[str, Any]


@dataclass(frozen=True)
class EnvHandle:
    """Everything that an environment refers to, shared and never copied.

    ``gymnasium.make`` and the wrappers' ``spec`` deep-copy keyword arguments; this object answers with
    itself, so the network and the data behind ``score`` stay where they are.

    Attributes:
        space: The decisions, their costs and the budgets.
        encoder: Makes the observations.
        score: Scores a whole strategy; called once an episode, at its last step.
        reward: Turns accuracy, costs and "budget met" into the reward.
        enforce_budget: Raise each action to the least ratio from which the budgets can still be met.
        fill_budget: At the last step, lower all ratios together as far as the budgets allow before the
            strategy is scored. Not in AMC: its bound only raises actions, so episodes often end far below the
            budget.
        score_all: Scores several strategies at once, in order, as ``score`` would; None: one after the other.
    """

    space: SearchSpace
    encoder: Encoder
    score: Callable[[Strategy], Trial]
    reward: RewardFunction
    enforce_budget: bool = True
    fill_budget: bool = False
    score_all: Callable[[Sequence[Strategy]], Sequence[Trial]] | None = None

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
    | trial          | last step only: the `Trial`                                                       |

    ## Arguments
    ``gymnasium.make("amc_env/Pruning-v0", handle=EnvHandle(space, encoder, score, reward))``
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 -- declared so by gymnasium.Env

    def __init__(self, handle: EnvHandle | None = None) -> None:
        """Builds the environment around what ``handle`` refers to.

        Raises:
            UserError: There is no handle, or the reward judges missed budgets and the bound would let none occur.
        """
        handle = _given(handle)
        _check_reward(handle)
        self.handle = handle
        self.observation_space, self.action_space = _spaces(handle)
        self._episode: _Episode | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        """Starts at the first decision with nothing removed."""
        super().reset(seed=seed)
        self._episode = _Episode(self.handle)
        return self._episode.observation, {}

    def step(self, action: Action) -> tuple[Observation, float, bool, bool, Info]:
        """Takes one decision; the last one scores the strategy.

        Raises:
            ValueError: The action is not one finite number.
            UserError: The reward of the scored strategy is NaN, or its accuracy is no share.
            gymnasium.error.ResetNeeded: The episode is over, or none was started.
        """
        if self._episode is None or self._episode.over:
            raise gymnasium.error.ResetNeeded("no episode is running: call reset() before step()")
        episode, reward = self._episode, 0.0
        info = episode.decide(episode.ratio(action))
        if episode.over:
            strategy = episode.strategy
            reward = episode.judge(strategy, self.handle.score(strategy), info)
        return episode.observation, reward, episode.over, False, info


class PruningVectorEnv(VectorEnv[Observation, Action, npt.NDArray[Any]]):
    """Several episodes of a `PruningEnv` side by side, whose strategies are scored together.

    All have the same decisions and so end at the same step. What each gives is what `PruningEnv` specifies; spaces and
    results are batched as ``gymnasium.vector.SyncVectorEnv`` does it. The step that ends the episodes also begins the
    next ones (autoreset in the same step): it gives the first observations, and what the episodes ended with is
    in ``infos["final_obs"]`` and ``infos["final_info"]``.

    ## Arguments
    ``gymnasium.make_vec("amc_env/Pruning-v0", num_envs=4, vectorization_mode="vector_entry_point", handle=handle)``
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 -- declared so by gymnasium.vector.VectorEnv
        "render_modes": [],
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(self, handle: EnvHandle | None = None, num_envs: int = 1) -> None:
        """Builds the environments around what ``handle`` refers to.

        Raises:
            UserError: There is no handle, there would be no environment, or the reward judges missed budgets and the
                bound would let none occur.
        """
        handle = _given(handle)
        if num_envs < 1:
            raise UserError(
                f"num_envs={num_envs} must be at least 1: the episodes side by side",
                code="out_of_range",
                field="num_envs",
            )
        _check_reward(handle)
        self.handle, self.num_envs = handle, num_envs
        self.single_observation_space, self.single_action_space = _spaces(handle)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._episodes: list[_Episode] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        """Starts all episodes at the first decision with nothing removed.

        Raises:
            ValueError: Only some are to be started: then they would not end together.
        """
        if not np.all((options or {}).get("reset_mask", True)):
            raise ValueError("options['reset_mask'] leaves out episodes; they begin and end together")
        super().reset(seed=seed)
        self._episodes = [_Episode(self.handle) for _ in range(self.num_envs)]
        return self._observations(), {}

    def step(
        self, actions: Action
    ) -> tuple[Observation, npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], Info]:
        """Takes one decision of each episode; the last ones score the strategies and begin the next episodes.

        Args:
            actions: [environments, 1].

        Raises:
            ValueError: The actions are not one finite number for each environment.
            UserError: The reward of a scored strategy is NaN, or its accuracy is no share.
            gymnasium.error.ResetNeeded: No episodes were started.
        """
        if not self._episodes:
            raise gymnasium.error.ResetNeeded("no episode is running: call reset() before step()")
        if len(actions) != self.num_envs:
            raise ValueError(f"{len(actions)} actions for {self.num_envs} environments; give one for each")
        ratios = [episode.ratio(action) for episode, action in zip(self._episodes, actions, strict=True)]
        given = [episode.decide(ratio) for episode, ratio in zip(self._episodes, ratios, strict=True)]
        over = self._episodes[0].over
        rewards = np.zeros(self.num_envs)
        if over:
            rewards[:] = self._judge(given)
            ends = zip(self._episodes, given, strict=True)
            given = [{"final_obs": episode.observation, "final_info": info} for episode, info in ends]
            self._episodes = [_Episode(self.handle) for _ in given]
        infos: Info = {}
        for i, info in enumerate(given):
            infos = self._add_info(infos, info, i)
        ended = np.full(self.num_envs, over)
        return self._observations(), rewards, ended, np.zeros_like(ended), infos

    def _observations(self) -> Observation:
        return np.stack([episode.observation for episode in self._episodes])

    def _judge(self, infos: Sequence[Info]) -> list[float]:
        """Scores the strategies, adds what is known of them to ``infos`` and returns their rewards."""
        strategies = [episode.strategy for episode in self._episodes]
        if self.handle.score_all is None:
            trials: Sequence[Trial] = [self.handle.score(strategy) for strategy in strategies]
        else:
            trials = self.handle.score_all(strategies)
        ends = zip(self._episodes, strategies, trials, infos, strict=True)
        return [episode.judge(strategy, trial, info) for episode, strategy, trial, info in ends]


def _given(handle: EnvHandle | None) -> EnvHandle:
    """The handle, without which there is no network to prune."""
    if handle is None:
        raise UserError(
            "this environment needs a network and its data: make it with search.make_env(network, train_loader, "
            "val_loader), or give handle=EnvHandle(...)",
            code="missing",
            field="handle",
        )
    return handle


class _Episode:
    """A strategy in the making: the counts chosen so far."""

    def __init__(self, handle: EnvHandle):
        self._handle = handle
        self._chosen: list[int] = []

    @property
    def over(self) -> bool:
        """Whether every decision is taken."""
        return len(self._chosen) == len(self._handle.space.names)

    @property
    def observation(self) -> Observation:
        """Of the decision to be taken; zero when there is none."""
        return np.zeros(len(FEATURES), np.float32) if self.over else self._handle.encoder(self._chosen)

    @property
    def strategy(self) -> Strategy:
        """The counts to score: those chosen, or all lowered together until a budget is used up."""
        space, counts = self._handle.space, self._chosen
        if not self._handle.fill_budget or not space.met(counts):
            return space.strategy(counts)
        return space.strategy(
            space.land([count / total for count, total in zip(counts, space.totals, strict=True)])
        )

    def ratio(self, action: Action) -> float:
        """The one number of an action."""
        values = np.asarray(action, dtype=np.float64).reshape(-1)
        given = f"decision {self._handle.space.names[len(self._chosen)]!r} was given the action {action!r}"
        if values.shape != (1,):
            raise ValueError(f"{given}; one finite pruning ratio is needed")
        if not np.isfinite(values[0]):
            raise diverged(given)
        return float(values[0])

    def decide(self, ratio: float) -> Info:
        """Carries out the next decision and describes it."""
        space, t = self._handle.space, len(self._chosen)
        least = space.least(self._chosen) if self._handle.enforce_budget else 0
        self._chosen.append(max(space.grids[t].snap(ratio), least))
        costs = space.cost(self._chosen + [0] * (len(space.names) - t - 1))
        return {
            "decision": space.names[t],
            "executed_ratio": self._chosen[-1] / space.totals[t],
            "bound": least / space.totals[t],
            "macs": costs["macs"],
        }

    def judge(self, strategy: Strategy, trial: Trial, info: Info) -> float:
        """Adds what is known of the scored strategy to the last step's ``info`` and returns its reward."""
        reward = float(self._handle.reward(trial.score, trial.costs, trial.met))
        if np.isnan(reward):
            raise UserError(
                f"the reward of score {trial.score} and costs {trial.costs} is NaN", code="nan_reward"
            )
        info.update(accuracy=trial.score, met=trial.met, strategy=strategy, trial=trial)
        info.update(executed_ratio=strategy.ratios[-1], macs=trial.costs["macs"])
        return reward


def _check_reward(handle: EnvHandle) -> None:
    if handle.enforce_budget and getattr(handle.reward, "needs_bound_off", False):
        raise UserError(
            f"reward {getattr(handle.reward, 'name', handle.reward)!r} judges strategies that miss the "
            "budget, and the bound on the action never lets one miss it; set enforce_budget=False, or "
            "use reward=error",
            code="conflict",
            field="reward",
        )


def _spaces(handle: EnvHandle) -> tuple[spaces.Space[Observation], spaces.Space[Action]]:
    """Of the observations and the actions of one environment."""
    most = float(np.max(handle.space.maxima))
    return spaces.Box(0.0, 1.0, (len(FEATURES),), np.float32), spaces.Box(0.0, most, (1,), np.float32)
