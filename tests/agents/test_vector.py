"""Gymnasium's vector environments as Stable-Baselines3 has them, and its own algorithms on the pruning environment."""

import math

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3 import PPO, TD3
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

from agents.vector import GymnasiumVecEnv
from amc_env.env import PruningVectorEnv


class Rewards(gymnasium.Env):
    """Episodes of one step, with the reward it was told to give."""

    observation_space = gymnasium.spaces.Box(0.0, 1.0, (1,), np.float32)
    action_space = gymnasium.spaces.Box(0.0, 1.0, (1,), np.float32)

    def __init__(self, reward: float):
        self.value = reward
        self.options = None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {"options": options}

    def step(self, action):
        return np.ones(1, np.float32), self.value, True, False, {"given": self.value}


def same_step(*envs: gymnasium.Env) -> SyncVectorEnv:
    return SyncVectorEnv([lambda env=env: env for env in envs], autoreset_mode=AutoresetMode.SAME_STEP)


def given(*rewards: float, **more: float) -> tuple:
    env = GymnasiumVecEnv(same_step(*map(Rewards, rewards)), **more)
    env.reset()
    return env.step(np.zeros((len(rewards), 1), np.float32))


@pytest.mark.parametrize(("name", "steps"), [("CartPole-v1", 60), ("Pendulum-v1", 7)])
def test_it_gives_what_stable_baselines_own_gives(name: str, steps: int) -> None:
    """Seeds, observations, rewards, ends at different times or by a limit, last observations, infos."""

    def make() -> gymnasium.Env:
        return gymnasium.make(name, max_episode_steps=30 if name == "CartPole-v1" else 5)

    ours, theirs = GymnasiumVecEnv(same_step(make(), make(), make())), DummyVecEnv([make] * 3)
    assert (ours.observation_space, ours.action_space) == (theirs.observation_space, theirs.action_space)
    assert ours.seed(7) == theirs.seed(7)
    assert data_equivalence(ours.reset(), theirs.reset(), exact=True)
    ours.action_space.seed(0)
    ends = 0
    for _ in range(steps):
        actions = np.array([ours.action_space.sample() for _ in range(3)])
        mine = ours.step(actions)
        assert data_equivalence(mine, theirs.step(actions), exact=True)
        assert ours.reset_infos == theirs.reset_infos
        ends += int(mine[2].sum())
    assert ends >= 3


def test_minus_infinity_becomes_the_stand_in_and_nothing_else_changes() -> None:
    _, rewards, dones, infos = given(-math.inf, -0.25, 0.0)
    assert rewards.tolist() == [-2.0, -0.25, 0.0]
    assert rewards.dtype == np.float32
    assert dones.all()
    assert [info["given"] for info in infos] == [-math.inf, -0.25, 0.0]
    assert infos[0]["terminal_observation"].tolist() == [1.0]
    assert given(-math.inf, stand_in=-3.0)[1].tolist() == [-3.0]


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_other_rewards_that_are_no_numbers_are_refused(reward: float) -> None:
    with pytest.raises(ValueError, match=f"reward {reward}; a learner needs a number or -inf"):
        given(0.0, reward)


def test_an_infinite_stand_in_and_another_autoreset_are_refused() -> None:
    with pytest.raises(ValueError, match="it must be finite"):
        given(0.0, stand_in=-math.inf)
    with pytest.raises(ValueError, match=r"autoreset mode is AutoresetMode.NEXT_STEP; .*SAME_STEP"):
        GymnasiumVecEnv(SyncVectorEnv([lambda: Rewards(0.0)]))


def test_the_rest_that_stable_baselines_asks_of_a_vector_environment() -> None:
    env = GymnasiumVecEnv(same_step(Rewards(0.0), Rewards(0.0)))
    env.set_options({"a": 1})
    env.reset()
    assert env.reset_infos == [{"options": {"a": 1}}] * 2
    assert env.get_attr("autoreset_mode", indices=[1]) == [AutoresetMode.SAME_STEP]
    env.set_attr("note", 5)
    assert env.get_attr("note") == [5, 5]
    assert env.env_method("get_attr", "value", indices=0) == [(0.0, 0.0)]
    assert env.env_is_wrapped(gymnasium.Wrapper) == [False, False]
    assert env.has_attr("note")
    assert not env.has_attr("nothing")
    env.close()
    assert env.env.closed


def test_stable_baselines_own_algorithms_learn_on_episodes_side_by_side(toy) -> None:
    for algorithm, settings in (
        (PPO, {"n_steps": 8, "batch_size": 8, "n_epochs": 1}),
        (TD3, {"learning_starts": 8, "train_freq": (4, "step"), "batch_size": 8}),
    ):
        search = toy()
        env = VecMonitor(GymnasiumVecEnv(PruningVectorEnv(search.handle(), 3)))
        learner = algorithm("MlpPolicy", env, device="cpu", seed=0, **settings)
        learner.learn(2 * 8 * 3)  # four rounds of three episodes of four steps
        assert search.batches == [3] * 4
        assert [entry["r"] for entry in learner.ep_info_buffer] == pytest.approx(search.rewards, abs=1e-5)
        mean, _ = evaluate_policy(learner, env, n_eval_episodes=3)
        assert mean == pytest.approx(np.mean(search.rewards[-3:]), abs=1e-5)
