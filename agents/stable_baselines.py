"""The algorithms of Stable-Baselines3 as agents, one decision a step; AMC's own DDPG is in agents/ddpg.py.

Raffin et al., "Stable-Baselines3: Reliable Reinforcement Learning Implementations", JMLR 2021.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import field
from importlib import import_module
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn
from torch import nn

from agents.base import Agent, SearchTask
from agents.exploration import (
    WARMUPS,
    TruncatedNormalNoise,
    Warmup,
    uniform_ratios,
    warn_within_warmup,
)
from agents.isolation import learning
from agents.replay import EpisodeReplayBuffer
from agents.vector import GymnasiumVecEnv, check_rounds
from amc_env.errors import UserError, diverged, first_line, out_of_range
from amc_env.space import SearchSpace
from amc_env.validation import LARGEST_RATE, Count, Natural, NotNegative, Share, settings

Actions = npt.NDArray[Any]
Algorithm = Literal["A2C", "CrossQ", "PPO", "SAC", "TD3", "TQC", "TRPO"]
"""Algorithms for continuous actions; DDPG is `agents.ddpg.DDPGAgent`."""

_CONTRIB = ("CrossQ", "TQC", "TRPO")
"""Those of the package sb3_contrib."""
_OURS = (
    *("policy", "env", "seed", "device", "verbose", "tensorboard_log", "action_noise", "learning_starts"),
    *(
        "train_freq",
        "gradient_steps",
        "buffer_size",
        "replay_buffer_class",
        "replay_buffer_kwargs",
        "n_steps",
    ),
    "_init_setup_model",
)
"""Arguments of algorithms that the agent's own settings decide."""
_INNER = 0.05
"""Least distance of the ratio of action 0 from both ends, as a share of the range."""


class CentredVecEnv(GymnasiumVecEnv):
    """Takes actions in [-1, 1]: 0 is ``centre``, the ends are no and full pruning, linear on either side.

    Untrained policies answer about 0, so a search begins around ``centre``. Each step runs in the context ``outside``.
    """

    def __init__(
        self,
        env: VectorEnv[Any, Any, Any],
        stand_in: float,
        centre: float,
        outside: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Wraps ``env``; ``centre`` is a ratio, the rest as in `GymnasiumVecEnv` and `agents.isolation.learning`."""
        super().__init__(env, stand_in)
        assert isinstance(env.single_action_space, spaces.Box)
        self._high = float(env.single_action_space.high[0])
        self._centre = float(np.clip(centre, _INNER * self._high, (1 - _INNER) * self._high))
        self._outside = outside
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def actions(self, ratios: Actions) -> Actions:
        """The actions that give these ratios."""
        apart = ratios - self._centre
        return np.asarray(np.where(apart < 0, apart / self._centre, apart / (self._high - self._centre)))

    def step_async(self, actions: Actions) -> None:
        """Keeps the ratios for `step_wait`."""
        room = np.where(actions < 0, self._centre, self._high - self._centre)
        super().step_async((self._centre + actions * room).astype(np.float32))

    def step_wait(self) -> VecEnvStepReturn:
        """Steps all environments."""
        with self._outside():
            return super().step_wait()


class Exploring(OffPolicyAlgorithm):
    """Mixed into an off-policy algorithm: a warm-up in whole episodes, and AMC's noise around what the policy samples."""

    explorer: Explorer

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[Actions, Actions]:
        if self.num_timesteps < learning_starts:
            action = self.explorer.warmup_step(self.num_timesteps, n_envs)
        else:
            _, mean = super()._sample_action(0, None, n_envs)
            action = self.explorer.around(mean, self._episode_num)
        return action, action


class Explorer:
    """Draws actions [environments, 1] in [-1, 1] for an off-policy algorithm.

    Args:
        env: What the actions are for.
        warmup: Draws the ratios of a warm-up episode.
        noise: Around the policy's actions; its sigma is in units of these.
        steps: Steps of an episode.
        rng: Of the noise.
    """

    def __init__(
        self,
        env: CentredVecEnv,
        warmup: Warmup,
        noise: TruncatedNormalNoise,
        steps: int,
        rng: np.random.Generator,
    ) -> None:
        self._env, self._warmup, self._noise, self._steps, self._rng = env, warmup, noise, steps, rng
        self._episodes = np.empty((0, 0, 1))

    def warmup_step(self, timestep: int, n_envs: int) -> Actions:
        """The actions at a time step of the warm-up, counted over all environments."""
        step = timestep // n_envs % self._steps
        if step == 0:
            ratios = np.stack([self._warmup() for _ in range(n_envs)], axis=1)[..., None]
            self._episodes = self._env.actions(ratios).astype(np.float32)
        return np.asarray(self._episodes[step])

    def around(self, mean: Actions, episode: int) -> Actions:
        """Noise around the policy's actions."""
        if self._noise.sigma == 0:
            return mean
        low, high = -np.ones(1), np.ones(1)
        return self._noise.draw(mean.astype(np.float64), low, high, episode, self._rng).astype(np.float32)


class _Watch(BaseCallback):
    """Ends the search after so many steps, and reports what the algorithm logs of its updates."""

    def __init__(self, total: int, on_update: Callable[[Mapping[str, float]], None] | None) -> None:
        super().__init__()
        self._total, self._on_update = total, on_update

    def _on_step(self) -> bool:
        return self.model.num_timesteps < self._total

    def _on_rollout_start(self) -> None:
        logged = self.model.logger.name_to_value
        figures = {
            f"agent/{name.removeprefix('train/')}": float(value)
            for name, value in logged.items()
            if name.startswith("train/")
        }
        if figures and self._on_update is not None:
            self._on_update(figures)


@contextmanager
def _diverging(policy: nn.Module) -> Iterator[None]:
    """Say which setting makes the errors that algorithms end in once their weights are no longer finite.

    Raises:
        UserError: There was one.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if isinstance(error, UserError) or all(bool(w.isfinite().all()) for w in policy.parameters()):
            raise
        raise diverged(f"the algorithm ended ({first_line(error)})") from error


@settings
class StableBaselines(Agent):
    """Searches with an algorithm of Stable-Baselines3. Its policy begins around the uniform strategy.

    Off-policy algorithms have AMC's warm-up and replay buffer: every transition is stored with the final reward of its
    episode, less a moving average and divided by the standard deviation of the rewards held.

    Attributes:
        algorithm: Its name, or the class of one for continuous actions.
        options: Further arguments of its constructor, like ``{"learning_rate": 1e-3}``.
        n_envs: Episodes at once, whose strategies are scored together.
        warmup_episodes: Off-policy: episodes of random actions before the first update.
        warmup: Off-policy: how they are drawn, as in `agents.ddpg.DDPGAgent`.
        sigma: Off-policy: standard deviation of the noise around the policy's actions, in their range [-1, 1]; 0 for
            algorithms whose policies are random by themselves.
        sigma_decay: Its factor per episode after the warm-up.
        updates: Off-policy: updates per step of the environment, done at the end of each episode.
        rollout_episodes: On-policy: episodes between updates, in whole rounds of ``n_envs``.
        infinite_reward: The reward that the learner gets in place of minus infinity.
    """

    name: ClassVar[str] = "stable_baselines"
    steps: ClassVar[bool] = True

    algorithm: Algorithm | type[BaseAlgorithm] = "A2C"
    options: dict[str, Any] = field(default_factory=dict)
    n_envs: Count = 1
    warmup_episodes: Natural = 30
    warmup: Literal["uniform", "landing", "near_uniform"] = "landing"
    sigma: NotNegative = 0.0
    sigma_decay: Share = 0.98
    updates: Natural = 2
    rollout_episodes: Count = 8
    infinite_reward: float = -2.0

    def __post_init__(self) -> None:
        """Refuse options that the algorithm does not have, or that other settings decide."""
        known = sorted(set(inspect.signature(self.made_by).parameters) - set(_OURS))
        wrong = [name for name in self.options if name not in known]
        if wrong:
            raise UserError.join(
                UserError(
                    f"unknown key {{field}}; {self.made_by.__name__} takes {', '.join(known)}",
                    code="unknown_key",
                    field=f"options.{name}",
                )
                for name in wrong
            )
        rate = self.options.get("learning_rate", 1e-3)
        if isinstance(rate, int | float) and not 0 < rate <= LARGEST_RATE:
            raise out_of_range("options.learning_rate", rate, f"above 0 and at most {LARGEST_RATE}")

    @property
    def made_by(self) -> type[BaseAlgorithm]:
        """The algorithm's class.

        Raises:
            UserError: Its package is missing, or it is no algorithm that this agent can run.
        """
        found = _class_of(self.algorithm) if isinstance(self.algorithm, str) else self.algorithm
        if not issubclass(found, OnPolicyAlgorithm | OffPolicyAlgorithm) or found.__name__ in ("DQN", "DDPG"):
            raise UserError(
                f"{{field}}={found.__name__} is not run by this agent: it takes on- and off-policy algorithms for "
                "continuous actions, like SAC; for DDPG use agent=ddpg",
                code="out_of_range",
                field="algorithm",
            )
        return found

    def check(self, space: SearchSpace, episodes: int) -> None:
        """Refuse episodes that do not make whole rounds.

        Raises:
            UserError: They do not.
        """
        check_rounds(episodes, self.n_envs)

    def search(self, task: SearchTask) -> None:
        """Runs ``task.episodes`` episodes.

        Raises:
            UserError: They are no multiple of ``n_envs``, or the algorithm refuses its options.
        """
        self.check(task.space, task.episodes)
        if issubclass(self.made_by, OffPolicyAlgorithm):
            warn_within_warmup(task.episodes, self._warmup_whole, self.warmup_episodes)
        total = task.episodes * len(task.space.names)
        with learning() as outside:
            learner = self._learner(task, outside)
            with _diverging(learner.policy):
                learner.learn(total, callback=_Watch(total, task.on_update), log_interval=None)  # type: ignore[arg-type]

    def _learner(
        self, task: SearchTask, outside: Callable[[], AbstractContextManager[None]]
    ) -> BaseAlgorithm:
        """The untrained learner of a task; all it draws comes from the task's seed."""
        steps, kind = len(task.space.names), self.made_by
        centre = float(np.median(uniform_ratios(task.space)))
        env = CentredVecEnv(task.envs(self.n_envs), self.infinite_reward, centre, outside)
        warmup_rng, noise_rng = np.random.default_rng(task.seed).spawn(2)
        given: dict[str, Any] = {"seed": task.seed, "device": "cpu", **deepcopy(self.options)}
        if issubclass(kind, OffPolicyAlgorithm):
            noise = TruncatedNormalNoise(self.sigma, self.sigma_decay, self._warmup_whole)
            warmup = WARMUPS[self.warmup](task.space, TruncatedNormalNoise(0.1, 1.0, 0), warmup_rng)
            kind = type(
                kind.__name__, (Exploring, kind), {"explorer": Explorer(env, warmup, noise, steps, noise_rng)}
            )
            given |= self._off_policy(task, steps)
        else:
            given["n_steps"] = math.ceil(self.rollout_episodes / self.n_envs) * steps
            if "batch_size" in inspect.signature(kind).parameters:  # unless it is given, all of a rollout
                given.setdefault("batch_size", given["n_steps"] * self.n_envs)
        try:
            learner = kind("MlpPolicy", env, **given)
        except (TypeError, ValueError, AssertionError) as error:
            raise UserError(
                f"{{field}}={self.options} are refused by {kind.__name__}: {' '.join(str(error).split())}",
                field="agent.options",
                code="wrong_type",
            ) from error
        learner.set_logger(Logger(folder=None, output_formats=[]))  # the default makes a folder
        return learner

    def _off_policy(self, task: SearchTask, steps: int) -> dict[str, Any]:
        return {
            "buffer_size": task.episodes * steps,
            "learning_starts": self._warmup_whole * steps,
            "train_freq": (steps, "step"),  # all episodes end together
            "gradient_steps": self.updates * steps * self.n_envs,
            "replay_buffer_class": EpisodeReplayBuffer,
            "replay_buffer_kwargs": {"seed": task.seed, "rescale": True},
        }

    @property
    def _warmup_whole(self) -> int:
        return math.ceil(self.warmup_episodes / self.n_envs) * self.n_envs


def _class_of(name: Algorithm) -> type[BaseAlgorithm]:
    package = "sb3_contrib" if name in _CONTRIB else "stable_baselines3"
    try:
        found: type[BaseAlgorithm] = getattr(import_module(package), name)
    except ImportError as error:
        raise UserError(
            f"{{field}}={name} needs the package sb3_contrib: pip install sb3-contrib",
            code="missing_package",
            field="algorithm",
        ) from error
    return found


@settings
class TD3Agent(StableBaselines):
    """TD3: Fujimoto et al., "Addressing Function Approximation Error in Actor-Critic Methods", ICML 2018."""

    name: ClassVar[str] = "td3"

    algorithm: Algorithm | type[BaseAlgorithm] = "TD3"
    sigma: NotNegative = 0.5


@settings
class SACAgent(StableBaselines):
    """SAC: Haarnoja et al., "Soft Actor-Critic", ICML 2018."""

    name: ClassVar[str] = "sac"

    algorithm: Algorithm | type[BaseAlgorithm] = "SAC"


@settings
class PPOAgent(StableBaselines):
    """PPO: Schulman et al., "Proximal Policy Optimization Algorithms", arXiv 1707.06347."""

    name: ClassVar[str] = "ppo"

    algorithm: Algorithm | type[BaseAlgorithm] = "PPO"
