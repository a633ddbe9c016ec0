"""AMC's DDPG, said as what it changes in Stable-Baselines3's.

He et al., "AMC: AutoML for Model Compression and Acceleration on Mobile Devices", ECCV 2018; the numbers that
the paper leaves open are those of the authors' release.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from stable_baselines3 import DDPG
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from agents.base import Agent, SearchTask
from agents.exploration import (
    WARMUPS,
    TruncatedNormalNoise,
    Warmup,
    uniform_ratios,
    warn_within_warmup,
)
from agents.isolation import denormals_flushed, one_thread, random_states_kept
from agents.replay import EpisodeReplayBuffer
from agents.vector import GymnasiumVecEnv, check_rounds
from amc_env.space import SearchSpace
from amc_env.validation import (
    Count,
    LearningRate,
    Natural,
    NotNegative,
    Share,
    ShareOrZero,
    Widths,
    settings,
)

Actions = npt.NDArray[np.float32]

STEEP = 0.98
"""The most, either way, that the actor's tanh begins at: beyond, its slope lets it learn nothing."""


class AMCDDPG(DDPG):
    """DDPG with AMC's exploration, replay and two learning rates.

    What differs from Stable-Baselines3: actions are drawn from a truncated normal in action units; the
    warm-up draws whole episodes and is counted in episodes; the replay buffer is an `EpisodeReplayBuffer`;
    actor and critic have learning rates of their own that no schedule overwrites; `train` says the same
    update with fewer and larger operations. The actor's tanh is AMC's sigmoid up to scale, and the critic's
    first layer sees state and action together, as AMC's does.
    """

    def __init__(
        self,
        env: VecEnv,
        settings: DDPGAgent,
        steps: int,
        warmup: Warmup,
        rng: np.random.Generator,
        *,
        seed: int,
        on_update: Callable[[Mapping[str, float]], None] | None = None,
    ) -> None:
        """Builds the networks.

        Args:
            env: ``settings.n_envs`` environments whose episodes all have ``steps`` steps.
            settings: The numbers.
            steps: Steps of an episode.
            warmup: Draws the actions of a warm-up episode.
            rng: Of the noise.
            seed: Of the networks' initial weights and of the replay buffer.
            on_update: Called with losses, sigma and baseline after each `train`.
        """
        self.settings, self.steps, self.on_update = settings, steps, on_update
        self.noise = settings.noise
        self._warmup, self._warmup_actions, self._noise_rng = warmup, np.empty((0, 0, 1)), rng
        self._mean, self._std = torch.zeros(1), torch.ones(1)
        self._normalised = not settings.normalise
        super().__init__(
            "MlpPolicy",
            env,
            learning_rate=settings.actor_lr,
            buffer_size=settings.replay_transitions or settings.replay_episodes * steps,
            learning_starts=settings.warmup_whole * steps,
            batch_size=settings.batch_size,
            tau=settings.tau,
            gamma=settings.gamma,
            train_freq=(steps, "step"),  # all episodes end together
            gradient_steps=settings.updates * steps * env.num_envs,
            replay_buffer_class=EpisodeReplayBuffer,
            replay_buffer_kwargs={
                "seed": seed,
                "baseline_rate": settings.baseline_rate,
                "store": settings.store,
                "rescale": settings.rescale,
            },
            policy_kwargs={"net_arch": list(settings.hidden)},
            seed=seed,
            device="cpu",
        )
        self.set_logger(Logger(folder=None, output_formats=[]))  # the default makes a folder

    def _setup_model(self) -> None:
        super()._setup_model()
        for network, rate in ((self.actor, self.settings.actor_lr), (self.critic, self.settings.critic_lr)):
            # one fused step over all parameters: the networks are small, and calls cost more than arithmetic
            network.optimizer = torch.optim.Adam(network.parameters(), lr=rate, fused=True)

    def begin_at(self, ratio: float) -> None:
        """Makes the actor answer every state with one ratio until it has learnt better.

        Its last layer starts with weights of 0, which are learnt like any others.
        """
        scaled = float(self.policy.scale_action(np.array([ratio]))[0])
        for actor in (self.actor.mu, self.actor_target.mu):
            last = actor[-2]  # before the tanh
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            nn.init.constant_(last.bias, math.atanh(np.clip(scaled, -STEEP, STEEP)))

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[Actions, Actions]:
        """Draws one action for each environment.

        Returns:
            The actions [environments, 1] in action units, and the same scaled to [-1, 1] for the replay
            buffer.
        """
        assert isinstance(self.action_space, spaces.Box)
        low, high = self.action_space.low.astype(np.float64), self.action_space.high.astype(np.float64)
        if self.num_timesteps < learning_starts:
            action = self._warmup_step(n_envs)
        else:
            assert isinstance(self._last_obs, np.ndarray)
            with torch.no_grad(), one_thread():
                scaled = (
                    self.actor.mu(self._scaled(torch.from_numpy(self._last_obs))).numpy().astype(np.float64)
                )
            mean = low + 0.5 * (scaled + 1.0) * (high - low)
            action = self.noise.draw(mean, low, high, self._episode_num, self._noise_rng)
        return action.astype(np.float32), (2.0 * (action - low) / (high - low) - 1.0).astype(np.float32)

    def _scaled(self, observations: Tensor) -> Tensor:
        """Observations as the networks see them."""
        return (observations - self._mean) / self._std

    def _normalise(self) -> None:
        """Scale each feature to mean 0 and variance 1 over the warm-up's observations, from now on."""
        assert self.replay_buffer is not None
        seen = torch.from_numpy(self.replay_buffer.observations[: self.replay_buffer.size()].copy()).flatten(
            0, 1
        )
        self._mean, self._std = seen.mean(dim=0), seen.std(dim=0).clamp_min(1e-3)
        self._normalised = True

    def _warmup_step(self, n_envs: int) -> npt.NDArray[np.float64]:
        step = self.num_timesteps // n_envs % self.steps
        if step == 0:
            self._warmup_actions = np.stack([self._warmup() for _ in range(n_envs)], axis=1)[..., None]
        actions: npt.NDArray[np.float64] = self._warmup_actions[step]
        return actions

    @one_thread()
    @denormals_flushed()
    def train(self, gradient_steps: int, batch_size: Count = 64) -> None:
        """Updates critic, actor and targets ``gradient_steps`` times."""
        assert isinstance(self.replay_buffer, EpisodeReplayBuffer)
        actor, critic = self.actor.mu, self.critic.q_networks[0]
        target_actor, target_critic = self.actor_target.mu, self.critic_target.q_networks[0]
        online: list[Tensor] = [*critic.parameters(), *actor.parameters()]
        targets: list[Tensor] = [*target_critic.parameters(), *target_actor.parameters()]
        losses = []
        if not self._normalised:
            self._normalise()
        for batch in self.replay_buffer.sample_many(gradient_steps, batch_size):
            goal, now = batch.rewards, self._scaled(batch.observations)
            if self.gamma > 0:
                with torch.no_grad():
                    then = self._scaled(batch.next_observations)
                    goal = goal + (1 - batch.dones) * self.gamma * _value(
                        target_critic, then, target_actor(then)
                    )
            critic_loss = mse_loss(_value(critic, now, batch.actions), goal)
            _descend(critic_loss, critic, self.critic.optimizer)
            actor_loss = -_value(critic, now, actor(now)).mean()
            _descend(actor_loss, actor, self.actor.optimizer)
            with torch.no_grad():
                torch._foreach_lerp_(targets, online, self.tau)
            losses.append((critic_loss.detach(), actor_loss.detach()))
        self._n_updates += gradient_steps
        self._report(losses)

    def _report(self, losses: list[tuple[Tensor, Tensor]]) -> None:
        if self.on_update is None or not losses:
            return
        assert isinstance(self.replay_buffer, EpisodeReplayBuffer)
        critic_loss, actor_loss = (float(torch.stack(column).mean()) for column in zip(*losses, strict=True))
        self.on_update(
            {
                "agent/critic_loss": critic_loss,
                "agent/actor_loss": actor_loss,
                "agent/sigma": self.noise.sigma_at(self._episode_num - self.n_envs),
                "agent/baseline": self.replay_buffer.baseline or 0.0,
            }
        )


def _value(critic: nn.Module, observations: Tensor, actions: Tensor) -> Tensor:
    """Q [batch, 1]."""
    value: Tensor = critic(torch.cat([observations, actions], dim=1))
    return value


def _descend(loss: Tensor, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step of ``network`` alone: gradients of whatever else the loss runs through are not computed."""
    parameters = list(network.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    optimizer.step()


@settings
class DDPGAgent(Agent):
    """Searches with AMC's DDPG, one decision a step. The defaults are the numbers of AMC's release.

    Attributes:
        warmup_episodes: Episodes of random actions before the first update.
        warmup: How they are drawn: "uniform" over the action range (AMC), "landing" on the budget, or
            "near_uniform": around the uniform strategy, as far as ``sigma`` goes; the actor begins there too.
        sigma: Standard deviation of the noise before truncation, in action units.
        sigma_decay: Its factor per episode after the warm-up.
        actor_lr: Adam's learning rate for the actor.
        critic_lr: Adam's learning rate for the critic.
        tau: Weight of the new network in the target network, per update.
        gamma: Discount. 1 is AMC's; since every transition already carries the episode's final reward, 0 fits
            the critic to that reward itself, without bootstrapping.
        batch_size: Transitions per update.
        updates: Updates per step of the environment, done at the end of each episode.
        replay_episodes: Episodes that the replay buffer holds.
        replay_transitions: Its size in transitions; overrules ``replay_episodes``.
        store: The action that is learnt from: "raw" as the policy gave it, or "executed" after the bound.
        baseline_rate: Weight of the newest batch in the moving average subtracted from rewards; 0 for none.
        rescale: Divide rewards by the standard deviation of those in the replay buffer; not in AMC.
        normalise: Scale the state's features to mean 0 and variance 1 over the warm-up's states; not in AMC.
        hidden: Hidden layers of actor and critic.
        infinite_reward: The reward that the learner gets in place of minus infinity.
        n_envs: Episodes at once, whose strategies are scored together. The warm-up takes as many whole rounds of them as
            it needs; ``updates`` and ``sigma_decay`` still count a step and an episode, the episodes of a round sharing
            the sigma of the first.
    """

    name: ClassVar[str] = "ddpg"
    steps: ClassVar[bool] = True

    warmup_episodes: Count = 100
    warmup: Literal["uniform", "landing", "near_uniform"] = "uniform"
    sigma: NotNegative = 0.5
    sigma_decay: Share = 0.95
    actor_lr: LearningRate = 1e-4
    critic_lr: LearningRate = 1e-3
    tau: Share = 0.01
    gamma: ShareOrZero = 1.0
    batch_size: Count = 64
    updates: Natural = 1
    replay_episodes: Count = 100
    replay_transitions: Count | None = None
    store: Literal["raw", "executed"] = "raw"
    baseline_rate: ShareOrZero = 0.5
    rescale: bool = False
    normalise: bool = False
    hidden: Widths = (300, 300)
    infinite_reward: float = -2.0
    n_envs: Count = 1

    @property
    def noise(self) -> TruncatedNormalNoise:
        """Of the actions."""
        return TruncatedNormalNoise(self.sigma, self.sigma_decay, self.warmup_whole)

    @property
    def warmup_whole(self) -> int:
        """Episodes of the warm-up in whole rounds."""
        return math.ceil(self.warmup_episodes / self.n_envs) * self.n_envs

    def check(self, space: SearchSpace, episodes: int) -> None:
        """Refuses episodes that do not make whole rounds.

        Raises:
            UserError: They do not.
        """
        check_rounds(episodes, self.n_envs)

    def search(self, task: SearchTask) -> None:
        """Runs ``task.episodes`` episodes.

        Raises:
            UserError: They are no multiple of ``n_envs``.
        """
        self.check(task.space, task.episodes)
        warn_within_warmup(task.episodes, self.warmup_whole, self.warmup_episodes)
        steps = len(task.space.names)
        with random_states_kept():
            self.learner(task).learn(task.episodes * steps, log_interval=None)  # type: ignore[arg-type]

    def learner(self, task: SearchTask) -> AMCDDPG:
        """Returns the untrained learner of a task; all it draws comes from the task's seed."""
        warmup_rng, noise_rng = np.random.default_rng(task.seed).spawn(2)
        learner = AMCDDPG(
            GymnasiumVecEnv(task.envs(self.n_envs), self.infinite_reward),
            self,
            steps=len(task.space.names),
            warmup=WARMUPS[self.warmup](task.space, self.noise, warmup_rng),
            rng=noise_rng,
            seed=task.seed,
            on_update=task.on_update,
        )
        if self.warmup == "near_uniform":
            learner.begin_at(float(np.median(uniform_ratios(task.space))))
        return learner
