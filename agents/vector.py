"""Gymnasium's vector environments for Stable-Baselines3, which has a kind of its own."""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers.vector import DictInfoToList
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from amc_env.errors import UserError


class GymnasiumVecEnv(VecEnv):
    """A vector environment of Gymnasium's as Stable-Baselines3's, with finite rewards.

    A value function cannot be fitted to minus infinity. What the learner gets in its place must be worse than any
    finite reward: the default -2 is twice the worst ``-error``; a reward on another scale needs its own. The outcome
    in ``infos`` and all that is recorded of the search keep the -inf.

    The environments are one object here: their attributes and methods are that object's, whatever ``indices`` say.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], stand_in: float = -2.0) -> None:
        """Wraps ``env``.

        Args:
            env: Begins the next episode in the step that ends one (autoreset in the same step).
            stand_in: For a reward of minus infinity.

        Raises:
            ValueError: It begins episodes at another time, or ``stand_in`` is not finite.
        """
        mode = env.metadata.get("autoreset_mode")
        if mode is not AutoresetMode.SAME_STEP:
            raise ValueError(
                f"the vector environment's autoreset mode is {mode}; Stable-Baselines3 needs AutoresetMode.SAME_STEP"
            )
        if not math.isfinite(stand_in):
            raise ValueError(
                f"the stand-in for an infinite reward is {stand_in}; it must be finite, like -2.0"
            )
        self.env = env
        self.stand_in = stand_in
        self._listed = DictInfoToList(env)
        self._actions: npt.NDArray[Any] | None = None
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> VecEnvObs:
        """Begins all episodes; seeds count on from the first environment's, and the first one's options hold for all."""
        observations: VecEnvObs
        observations, self.reset_infos = self._listed.reset(
            seed=self._seeds[0], options=self._options[0] or None
        )
        self._reset_seeds()
        self._reset_options()
        return observations

    def step_async(self, actions: npt.NDArray[Any]) -> None:
        """Keeps the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Steps all environments.

        Raises:
            ValueError: A reward is NaN or plus infinity.
        """
        observations, rewards, terminated, truncated, infos = self._listed.step(self._actions)
        dones = terminated | truncated
        given = [_plain(info) for info in infos]
        for i in np.flatnonzero(dones):
            last, final = _plain(given[i].pop("final_info", {})), given[i].pop("final_obs")
            self.reset_infos[i], given[i] = given[i], last | {"terminal_observation": final}
        for info, cut in zip(given, truncated & ~terminated, strict=True):
            info["TimeLimit.truncated"] = bool(cut)
        return observations, self._finite(rewards), dones, given

    def _finite(self, rewards: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        given = np.where(rewards == -np.inf, self.stand_in, rewards)
        if not np.isfinite(given).all():
            raise ValueError(
                f"the environment gave the reward {given[~np.isfinite(given)][0]}; a learner needs a number or -inf"
            )
        return given.astype(np.float32)

    def close(self) -> None:
        """Closes the environments."""
        self.env.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The environments' common attribute, once for each."""
        return [getattr(self.env, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Sets the environments' common attribute."""
        setattr(self.env, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Calls the environments' common method; its result, once for each."""
        result = getattr(self.env, method_name)(*method_args, **method_kwargs)
        return [result for _ in self._get_indices(indices)]

    def env_is_wrapped(
        self, wrapper_class: type[gymnasium.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """None is wrapped by itself."""
        return [False for _ in self._get_indices(indices)]


def check_rounds(episodes: int, n_envs: int) -> None:
    """Refuse episodes that do not make whole rounds of environments side by side.

    Raises:
        UserError: They do not.
    """
    below = episodes // n_envs * n_envs
    if below != episodes:
        near = " or ".join(str(count) for count in (below, below + n_envs) if count)
        raise UserError(
            f"search.episodes={episodes} is no multiple of agent.n_envs={n_envs}, the episodes at once; "
            f"set search.episodes={near}, or agent.n_envs=1",
            code="out_of_range",
            field="search.episodes",
        )


def _plain(info: dict[str, Any]) -> dict[str, Any]:
    """An environment's info as it would be alone: Python's numbers, where batching made NumPy's of them."""
    return {key: value.item() if isinstance(value, np.generic) else value for key, value in info.items()}
