"""The replay buffer: final reward to every transition, uniform draws, the moving baseline."""

import numpy as np
import pytest
from gymnasium import spaces

from agents.replay import EpisodeReplayBuffer

OBSERVATIONS = spaces.Box(0.0, 100.0, (2,), np.float32)
ACTIONS = spaces.Box(0.0, 0.8, (1,), np.float32)


def buffer(size: int = 12, envs: int = 1, **more) -> EpisodeReplayBuffer:
    return EpisodeReplayBuffer(size, OBSERVATIONS, ACTIONS, "cpu", envs, **more)


def add_episode(replay: EpisodeReplayBuffer, reward: float, steps: int = 3, first: float = 0.0) -> None:
    for t in range(steps):
        last = t == steps - 1
        replay.add(
            np.full((1, 2), first + t, np.float32),
            np.full((1, 2), first + t + 1, np.float32),
            np.full((1, 1), -0.5, np.float32),
            np.array([reward if last else 0.0]),
            np.array([last]),
            [{"executed_ratio": 0.6}],
        )


def test_an_episode_is_held_until_its_reward_is_known_and_then_every_transition_has_it() -> None:
    replay = buffer()
    replay.add(np.zeros((1, 2)), np.ones((1, 2)), np.zeros((1, 1)), np.zeros(1), np.zeros(1, bool), [{}])
    assert replay.size() == 0
    replay = buffer()
    add_episode(replay, -0.25)
    assert replay.size() == 3
    assert replay.rewards[:3, 0].tolist() == [-0.25] * 3
    assert replay.dones[:3, 0].tolist() == [0, 0, 1]
    assert replay.observations[:3, 0, 0].tolist() == [0, 1, 2]
    assert replay.next_observations[:3, 0, 0].tolist() == [1, 2, 3]


def test_the_oldest_transitions_go_first() -> None:
    replay = buffer(size=4)
    add_episode(replay, -1.0)
    add_episode(replay, -2.0)
    assert sorted(replay.rewards[:, 0].tolist()) == [-2, -2, -2, -1]


@pytest.mark.parametrize(("store", "expected"), [("raw", -0.5), ("executed", 0.5)])
def test_the_stored_action_is_raw_or_executed(store: str, expected: float) -> None:
    replay = buffer(store=store)
    add_episode(replay, -1.0)
    assert replay.actions[:3, 0, 0] == pytest.approx([expected] * 3)  # 0.6 of [0, 0.8] is 0.5 of [-1, 1]


def test_every_transition_is_drawn_equally_often_first_steps_included() -> None:
    replay = buffer(size=30, baseline_rate=0.0)
    for episode in range(3):
        add_episode(replay, -1.0, steps=10, first=10.0 * episode)
    drawn = np.concatenate([batch.observations[:, 0].numpy() for batch in replay.sample_many(600, 100)])
    counts = np.bincount(drawn.astype(int), minlength=30)
    expected = len(drawn) / 30
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert chi2 < 58.3  # 99.9% quantile at 29 degrees of freedom


def test_the_moving_average_of_the_batches_means_is_subtracted() -> None:
    replay = buffer(baseline_rate=0.5)
    add_episode(replay, -1.0)
    assert replay.sample(4).rewards.numpy() == pytest.approx(np.zeros((4, 1)))
    replay.rewards[:3] = -3.0  # baseline: -1 + 0.5 * (-3 + 1) = -2, then -2.5
    first, second = replay.sample_many(2, 4)
    assert first.rewards.numpy() == pytest.approx(np.full((4, 1), -1.0))
    assert second.rewards.numpy() == pytest.approx(np.full((4, 1), -0.5))
    assert replay.baseline == pytest.approx(-2.5)


def test_many_batches_are_the_same_as_one_at_a_time() -> None:
    one, many = buffer(seed=7), buffer(seed=7)
    for replay in (one, many):
        add_episode(replay, -1.0)
        add_episode(replay, -0.5, first=10.0)
    expected = [one.sample(5) for _ in range(4)]
    for a, b in zip(expected, many.sample_many(4, 5), strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a[:5], b[:5], strict=True))


def test_parallel_environments_share_the_ring() -> None:
    replay = buffer(envs=2)
    for t in range(2):
        replay.add(
            np.array([[t, t], [10 + t, 10 + t]], np.float32),
            np.zeros((2, 2), np.float32),
            np.zeros((2, 1), np.float32),
            np.array([-1.0, -2.0]),
            np.array([t == 1, t == 1]),
            [{}, {}],
        )
    assert replay.observations[:4, 0, 0].tolist() == [0, 1, 10, 11]
    assert replay.rewards[:4, 0].tolist() == [-1, -1, -2, -2]


def test_an_empty_buffer_says_so() -> None:
    with pytest.raises(ValueError, match="no finished episode"):
        buffer().sample(4)
