"""AMC's DDPG: its update, its settings and its exploration; test_conformance.py has what every agent promises."""

import math
import tempfile

import numpy as np
import pytest
import torch
from refusals import refused

from agents.ddpg import DDPGAgent
from agents.isolation import DENORMAL, denormals_flushed, one_thread
from amc_env.errors import UserError
from amc_env.rewards import Infinity

SMALL = {"warmup_episodes": 15, "hidden": (64, 64), "warmup": "landing"}


NEAR = {"hidden": (64, 64), "warmup": "near_uniform", "warmup_episodes": 10}


def test_a_search_near_uniform_has_an_actor_that_begins_there(toy) -> None:
    search = toy()
    agent = DDPGAgent(**NEAR | {"warmup_episodes": 2}, sigma=0.0)
    assert search.run(agent, episodes=3).scored == [search.space.project([0.0] * 4)] * 3


@pytest.mark.parametrize("ratio", [0.06, 1.0])
def test_an_actor_that_begins_at_an_end_of_the_range_can_leave_it(toy, ratio: float) -> None:
    search = toy(ratio=ratio)
    learner = DDPGAgent(**NEAR).learner(search.task(20))
    states = torch.rand(5, 11)
    begun = learner.actor.mu(states)
    slopes = 1 - begun.detach() ** 2
    assert float(slopes.min()) > 0.03
    assert float(begun.detach().std()) < 1e-6


def test_learning_begins_after_the_warm_up_with_one_update_a_step(toy) -> None:
    figures: list[dict[str, float]] = []
    search = toy()
    agent = DDPGAgent(**SMALL, updates=3)
    learner = agent.learner(search.task(20, on_update=figures.append))
    learner.learn(15 * 4, log_interval=None)
    assert learner._n_updates == 0
    learner.learn(5 * 4, log_interval=None, reset_num_timesteps=False)
    assert learner._n_updates == 5 * 4 * 3
    assert len(figures) == 5
    assert set(figures[0]) == {"agent/critic_loss", "agent/actor_loss", "agent/sigma", "agent/baseline"}
    assert figures[0]["agent/sigma"] == 0.5
    assert all(math.isfinite(value) for figure in figures for value in figure.values())


def test_actor_and_critic_keep_their_learning_rates(toy) -> None:
    learner = DDPGAgent(**SMALL).learner(toy().task(20))
    learner.learn(18 * 4, log_interval=None)
    assert learner.actor.optimizer.param_groups[0]["lr"] == 1e-4
    assert learner.critic.optimizer.param_groups[0]["lr"] == 1e-3


def test_one_update_is_stable_baselines_update(toy) -> None:
    """The lean update against DDPG's definition in plain operations, from the same batch."""
    learner = DDPGAgent(**SMALL).learner(toy().task(20))
    learner.learn(15 * 4, log_interval=None)
    replay = in_float64(learner)
    copies = {k: v.clone() for k, v in learner.policy.state_dict().items()}
    rng, baseline = replay._rng.bit_generator.state, replay.baseline
    learner.train(1, 64)
    lean = {k: v.clone() for k, v in learner.policy.state_dict().items()}
    replay._rng.bit_generator.state, replay.baseline = rng, baseline
    learner.policy.load_state_dict(copies)
    plain_update(learner, replay.sample(64))
    for key, value in learner.policy.state_dict().items():
        torch.testing.assert_close(value, lean[key], rtol=1e-9, atol=1e-9)


def in_float64(learner):
    """Adam's first step is lr * sign(gradient): in float32 rounding would decide some of the signs."""
    learner.policy.double()
    for name in ("observations", "actions", "next_observations", "rewards", "dones"):
        values = getattr(learner.replay_buffer, name)
        setattr(learner.replay_buffer, name, values.astype(np.float64))
    return learner.replay_buffer


def plain_update(learner, batch) -> None:
    actor, critic = learner.actor.mu, learner.critic.q_networks[0]
    target_actor, target_critic = learner.actor_target.mu, learner.critic_target.q_networks[0]
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3)
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=1e-4)
    critic_optimizer.zero_grad()
    with torch.no_grad():
        then = batch.next_observations
        value = target_critic(torch.cat([then, target_actor(then)], dim=1))
        goal = batch.rewards + (1 - batch.dones) * value
    ((critic(torch.cat([batch.observations, batch.actions], dim=1)) - goal) ** 2).mean().backward()
    critic_optimizer.step()
    actor_optimizer.zero_grad()
    (-critic(torch.cat([batch.observations, actor(batch.observations)], dim=1)).mean()).backward()
    actor_optimizer.step()
    with torch.no_grad():
        for online, target in ((actor, target_actor), (critic, target_critic)):
            for p, q in zip(online.parameters(), target.parameters(), strict=True):
                q.mul_(0.99).add_(0.01 * p)


def test_minus_infinity_is_told_as_the_stand_in_and_learnt_from(toy) -> None:
    search = toy(bounded=False, reward=Infinity())
    agent = DDPGAgent(**SMALL | {"warmup": "uniform"}, infinite_reward=-3.0)
    learner = agent.learner(search.task(20))
    learner.learn(20 * 4, log_interval=None)
    assert -math.inf in search.rewards
    stored = set(learner.replay_buffer.rewards[: learner.replay_buffer.size(), 0].tolist())
    assert -3.0 in stored
    assert all(math.isfinite(reward) for reward in stored)
    assert all(torch.isfinite(p).all() for p in learner.policy.parameters())


def test_one_episode_at_a_time_is_what_it_was(toy) -> None:
    """Strategies of a search before episodes could run side by side: three of warm-up, five learnt."""
    agent = DDPGAgent(**SMALL | {"warmup_episodes": 3}, store="executed")
    assert toy().run(agent, episodes=8).scored == [
        (18, 3, 16, 7),
        (0, 20, 1, 20),
        (16, 13, 12, 6),
        (13, 16, 7, 11),
        (16, 6, 27, 10),
        (10, 21, 14, 7),
        (21, 10, 10, 21),
        (9, 19, 12, 11),
    ]


def test_episodes_at_once_are_scored_together_and_all_learnt_from(toy) -> None:
    search, figures = toy(), []
    agent = DDPGAgent(**SMALL | {"warmup_episodes": 5}, n_envs=4, updates=3, sigma=0.4, sigma_decay=0.5)
    learner = agent.learner(search.task(20, on_update=figures.append))
    learner.learn(20 * 4, log_interval=None)
    assert search.batches == [4] * 5
    assert learner.replay_buffer.size() == 20 * 4
    rewards = [float(np.float32(reward)) for reward in search.rewards]
    assert learner.replay_buffer.rewards[:80:4, 0].tolist() == rewards
    assert (
        learner._n_updates == 3 * 4 * 12
    )  # after two rounds of warm-up, though five episodes were asked for
    assert [figure["agent/sigma"] for figure in figures] == pytest.approx([0.4, 0.4 / 2**4, 0.4 / 2**8])
    alone = toy().run(DDPGAgent(**SMALL), episodes=8)
    assert search.scored[:8] == alone.scored  # the warm-up draws the same, however many at once


@pytest.mark.parametrize(("episodes", "near"), [(50, "48 or 52"), (3, "4")])
def test_episodes_that_make_no_whole_rounds_are_refused(toy, episodes: int, near: str) -> None:
    search = toy()
    with pytest.raises(
        UserError, match=rf"search.episodes={episodes} .*agent.n_envs=4.*search.episodes={near}, or"
    ):
        search.run(DDPGAgent(n_envs=4), episodes)
    assert search.scored == []


def test_a_search_leaves_no_folder_of_logs(toy, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    toy().run(DDPGAgent(**SMALL | {"warmup_episodes": 1}), episodes=2)
    assert list(tmp_path.iterdir()) == []


def test_a_search_without_a_budget_runs(toy) -> None:
    assert len(toy(ratio=None).run(DDPGAgent(**SMALL), episodes=18).scored) == 18


def test_episodes_that_are_all_warm_up_are_warned_of(toy, caplog) -> None:
    toy().run(DDPGAgent(**SMALL), episodes=3)
    assert "agent.warmup_episodes=15" in caplog.text


def test_all_wrong_settings_are_named_at_once() -> None:
    with refused("out_of_range", "warmup", "tau", "store"):
        DDPGAgent(warmup="up", tau=0, store="x")


def test_one_thread_is_given_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with pytest.raises(RuntimeError), one_thread():
        assert torch.get_num_threads() == 1
        raise RuntimeError
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def kept(value: float) -> bool:
    return (torch.tensor(value) * 1).item() != 0


@pytest.mark.parametrize("flushed_before", [True, False])
def test_how_denormals_are_taken_is_given_back(flushed_before: bool) -> None:
    if not torch.set_flush_denormal(flushed_before):
        pytest.skip("this processor computes with denormals alone")
    try:
        with pytest.raises(RuntimeError), denormals_flushed():
            assert not kept(DENORMAL)
            raise RuntimeError
        assert kept(DENORMAL) is not flushed_before
    finally:
        torch.set_flush_denormal(False)


def test_moments_of_silent_units_fade_to_nothing(toy) -> None:
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor computes with denormals alone")
    learner = DDPGAgent(**SMALL | {"warmup_episodes": 2}).learner(toy().task(5))
    learner.learn(5 * learner.steps)
    moments = [state["exp_avg"] for state in learner.critic.optimizer.state.values()]
    for moment in moments:
        moment.fill_(DENORMAL)
    learner.train(1)
    assert any(bool((moment == 0).any()) for moment in moments)
    tiny = torch.finfo(torch.float32).tiny
    assert not any(bool(((moment != 0) & (moment.abs() < tiny)).any()) for moment in moments)


def test_an_actor_that_is_no_longer_finite_names_its_learning_rate(toy, monkeypatch) -> None:
    agent = DDPGAgent(**SMALL)
    made = DDPGAgent.learner

    def broken(self, task, *more):
        learner = made(self, task, *more)
        with torch.no_grad():
            for weight in learner.actor.parameters():
                weight.fill_(torch.nan)
        return learner

    monkeypatch.setattr(DDPGAgent, "learner", broken)
    with refused("diverged", "agent"):
        toy().run(agent, episodes=20)
    with refused("out_of_range", "actor_lr"):
        DDPGAgent(actor_lr=1e38)
