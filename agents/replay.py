"""A replay buffer for searches whose only reward comes at the end of an episode."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

Floats = npt.NDArray[np.float32]
Transition = tuple[Floats, Floats, Floats, bool]


class EpisodeReplayBuffer(ReplayBuffer):
    """Holds an episode until its reward is known, then stores every transition with that final reward.

    Differs from Stable-Baselines3's buffer in four things, as AMC has them: the final reward goes to each
    transition; a moving average of the sampled batches' mean rewards is subtracted from them; transitions are
    drawn uniformly, first steps included, by a generator of the buffer's own; and the stored action may be
    the one that the environment carried out. Parallel environments share one ring: their episodes enter it
    one after the other.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Box,
        action_space: spaces.Box,
        device: torch.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        *,
        seed: int = 0,
        baseline_rate: float = 0.5,
        store: str = "raw",
        rescale: bool = False,
    ) -> None:
        """Builds an empty buffer.

        Args:
            buffer_size: Transitions kept; the oldest go first.
            observation_space: Of the environment.
            action_space: Of the environment.
            device: Where samples go.
            n_envs: Environments that step at once.
            optimize_memory_usage: Accepted for Stable-Baselines3's sake; transitions are always stored whole.
            seed: Of the sampling.
            baseline_rate: Weight of the newest batch in the moving average; 0 subtracts nothing.
            rescale: Divide rewards, less the baseline, by the standard deviation of those held, so that late
                and small differences teach as much as early and large ones.
            store: "raw", the action as the policy gave it (AMC's release), or "executed", info's
                executed_ratio.
        """
        super().__init__(
            buffer_size, observation_space, action_space, device, n_envs=1, handle_timeout_termination=False
        )
        self.baseline_rate = baseline_rate
        self.rescale = rescale
        self.baseline: float | None = None
        self._rng = np.random.default_rng(seed)
        self._executed = store == "executed"
        self._range = (action_space.low, action_space.high)
        self._running: list[list[Transition]] = [[] for _ in range(n_envs)]

    def add(
        self,
        obs: npt.NDArray[Any],
        next_obs: npt.NDArray[Any],
        action: npt.NDArray[Any],
        reward: npt.NDArray[Any],
        done: npt.NDArray[Any],
        infos: list[dict[str, Any]],
    ) -> None:
        """Holds one step of each environment; an episode that ends is stored with its last reward.

        Args:
            obs: [environments, features].
            next_obs: [environments, features].
            action: [environments, 1], scaled to [-1, 1].
            reward: [environments]; counted at an episode's last step only.
            done: [environments].
            infos: One for each environment.
        """
        for i, running in enumerate(self._running):
            taken = self._scaled(infos[i]["executed_ratio"]) if self._executed else action[i]
            running.append((obs[i].copy(), next_obs[i].copy(), np.array(taken), bool(done[i])))
            if done[i]:
                self._store(running, float(reward[i]))
                running.clear()

    def _scaled(self, executed: float) -> Floats:
        low, high = self._range
        return np.asarray(2.0 * (executed - low) / (high - low) - 1.0, dtype=np.float32)

    def _store(self, episode: list[Transition], reward: float) -> None:
        for obs, next_obs, action, done in episode:
            super().add(obs[None], next_obs[None], action[None], np.array([reward]), np.array([done]), [{}])

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """Returns one batch, rewards less the baseline."""
        return self.sample_many(1, batch_size)[0]

    def sample_many(self, batches: int, batch_size: int) -> list[ReplayBufferSamples]:
        """Returns batches drawn one after the other, with the baseline moved on before each; gathered at
        once.

        Raises:
            ValueError: No episode has ended yet.
        """
        if self.size() == 0:
            raise ValueError(
                "the replay buffer holds no finished episode; learning must start after the first"
            )
        index = self._rng.integers(0, self.size(), (batches, batch_size))
        rewards = self.rewards[index, 0]
        rewards -= self._baselines(rewards.mean(axis=1))[:, None]
        if self.rescale:
            rewards /= max(float(self.rewards[: self.size()].std()), 1e-6)
        columns = (
            self.observations[index, 0],
            self.actions[index, 0],
            self.next_observations[index, 0],
            self.dones[index, 0][..., None],
            rewards[..., None],
        )
        tensors = [self.to_torch(column, copy=False) for column in columns]
        return [ReplayBufferSamples(*batch) for batch in zip(*tensors, strict=True)]

    def _baselines(self, means: npt.NDArray[Any]) -> Floats:
        """The moving average as it stands at each batch; the first batch begins it."""
        baselines = np.zeros(len(means), dtype=np.float32)
        for i, mean in enumerate(means if self.baseline_rate > 0 else ()):
            last = float(mean) if self.baseline is None else self.baseline
            self.baseline = last + self.baseline_rate * (float(mean) - last)
            baselines[i] = self.baseline
        return baselines
