"""Algorithms of Stable-Baselines3 as agents; test_conformance.py has what every agent promises."""

import numpy as np
import pytest
import stable_baselines3
import torch
from refusals import refused

from agents.isolation import learning
from agents.stable_baselines import CentredVecEnv, PPOAgent, SACAgent, StableBaselines, TD3Agent
from amc_env.errors import UserError

TINY = {"policy_kwargs": {"net_arch": [8]}}


def test_action_0_is_the_uniform_ratio_and_the_ends_are_the_ends(toy) -> None:
    search = toy()
    with learning() as outside:
        env = CentredVecEnv(search.task(1).envs(1), -2.0, 0.3, outside)
        high = float(env.env.single_action_space.high[0])
        ratios = np.array([0.0, 0.3, high])
        np.testing.assert_allclose(env.actions(ratios), [-1.0, 0.0, 1.0])
        env.reset()
        env.step_async(np.array([[0.0]]))
        _, _, _, (info,) = env.step_wait()
    assert info["executed_ratio"] == pytest.approx(0.3, abs=0.5 / 32)


def test_scoring_computes_as_the_caller_does() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with learning() as outside:
            torch.manual_seed(3)
            state = torch.get_rng_state()
            assert torch.get_num_threads() == 1
            with outside():
                torch.rand(5)
                assert torch.get_num_threads() == 2
            assert torch.equal(torch.get_rng_state(), state)
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_figures_of_updates_are_reported_and_options_are_left_alone(toy) -> None:
    figures, options = [], {"policy_kwargs": {"net_arch": [8]}}
    agent = SACAgent(warmup_episodes=2, options=options)
    agent.search(toy().task(5, on_update=figures.append))
    assert {"agent/actor_loss", "agent/critic_loss", "agent/ent_coef"} <= set(figures[-1])
    assert options == {"policy_kwargs": {"net_arch": [8]}}


def test_an_on_policy_search_ends_within_a_rollout(toy) -> None:
    assert len(toy().run(PPOAgent(options=TINY, rollout_episodes=4), episodes=6).scored) == 6


def test_a_class_stands_for_its_name(toy) -> None:
    named, given = (StableBaselines(algorithm=kind, options=TINY) for kind in ("A2C", stable_baselines3.A2C))
    assert toy().run(named, 10).scored == toy().run(given, 10).scored


def test_what_the_algorithm_does_not_take_is_refused(toy) -> None:
    with refused("unknown_key", "options.tauu", "options.seed"):
        SACAgent(options={"tauu": 1, "seed": 3})
    with refused("out_of_range", "algorithm"):
        StableBaselines(algorithm=stable_baselines3.DQN)
    search = toy()
    with pytest.raises(UserError) as caught:
        search.run(SACAgent(options={"ent_coef": "much"}), 10)
    assert (caught.value.field, search.scored) == ("agent.options", [])


@pytest.mark.parametrize("rate", [0, -1.0, 1e38])
def test_learning_rates_that_no_search_can_have_are_refused(rate: float) -> None:
    with refused("out_of_range", "options.learning_rate"):
        PPOAgent(options={"learning_rate": rate})


@pytest.mark.parametrize("kind", [TD3Agent, PPOAgent], ids=lambda kind: kind.__name__)
def test_a_policy_that_is_no_longer_finite_names_its_learning_rate(toy, monkeypatch, kind) -> None:
    agent = kind(options=TINY, warmup_episodes=2, rollout_episodes=2)
    made = kind._learner

    def broken(*given):
        learner = made(*given)
        with torch.no_grad():
            for weight in learner.policy.parameters():
                weight.fill_(torch.nan)
        return learner

    monkeypatch.setattr(kind, "_learner", broken)
    with refused("diverged", "agent"):
        toy().run(agent, episodes=8)
