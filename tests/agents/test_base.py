"""The finite stand-in for infinite rewards."""

import math

import gymnasium
import numpy as np
import pytest

from agents.base import FiniteReward


class OneReward(gymnasium.Env):
    """Gives the reward it was told to."""

    observation_space = gymnasium.spaces.Box(0.0, 1.0, (1,), np.float32)
    action_space = gymnasium.spaces.Box(0.0, 1.0, (1,), np.float32)

    def __init__(self, reward: float):
        self.value = reward

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), self.value, True, False, {}


@pytest.mark.parametrize(("reward", "told"), [(-math.inf, -2.0), (-0.3, -0.3), (0.0, 0.0)])
def test_minus_infinity_becomes_the_stand_in_and_nothing_else_changes(reward: float, told: float) -> None:
    env = FiniteReward(OneReward(reward))
    env.reset()
    assert env.step(np.zeros(1, np.float32))[1] == told


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_other_rewards_that_are_no_numbers_are_refused(reward: float) -> None:
    env = FiniteReward(OneReward(reward))
    env.reset()
    with pytest.raises(ValueError, match=f"reward {reward}"):
        env.step(np.zeros(1, np.float32))


def test_an_infinite_stand_in_is_refused() -> None:
    with pytest.raises(ValueError, match="must be finite"):
        FiniteReward(OneReward(0.0), -math.inf)
