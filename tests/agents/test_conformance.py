"""Every agent keeps the contract that `check_agent` checks, and the check finds agents that do not."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import pytest

from agents.base import Agent, SearchTask
from agents.baselines import Random, Uniform
from agents.ddpg import DDPGAgent
from agents.evolution import Evolution
from agents.netadapt import NetAdapt
from agents.policy import Policy
from agents.samplers import CmaEs, Tpe
from agents.sensitivity import Sensitivity
from agents.stable_baselines import PPOAgent, SACAgent, StableBaselines, TD3Agent
from agents.surrogate import Surrogate
from agents.testing import check_agent

SMALL = {"warmup_episodes": 15, "hidden": (64, 64), "warmup": "landing", "updates": 2, "actor_lr": 1e-3}
LEARNT = partial(DDPGAgent, **SMALL, sigma_decay=0.9)
NEAR = {"warmup": "near_uniform", "warmup_episodes": 10, "sigma": 0.1, "rescale": True}

OPTIONS = {"learning_rate": 1e-3, "policy_kwargs": {"net_arch": [32, 32]}}
OFF = {"warmup_episodes": 15, "updates": 1}
GREEDY = OPTIONS | {"gamma": 0.0, "batch_size": 64}
ROLLOUT = OPTIONS | {"gae_lambda": 1.0, "policy_kwargs": {"log_std_init": -1.0}}
UNSEEDED = {"seeded": False}  # proposals that no draw affects
NO_OPTIMUM = {"learns": False}  # learns nothing, so it need not find the optimum


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        (LEARNT, {}),
        (partial(LEARNT, n_envs=4), {}),
        (partial(DDPGAgent, **SMALL | NEAR), {}),
        (partial(TD3Agent, **OFF, sigma_decay=0.95, options=GREEDY), {}),
        (partial(SACAgent, **OFF, options=GREEDY | {"ent_coef": 0.02}), {}),
        (partial(PPOAgent, rollout_episodes=4, options=ROLLOUT, n_envs=4), {}),
        (partial(StableBaselines, rollout_episodes=4, options=ROLLOUT), {}),
        (Policy, {}),
        (partial(Policy, budgets=(0.3, 0.7)), {}),
        (NetAdapt, UNSEEDED),
        (partial(NetAdapt, choice="exchange"), UNSEEDED),
        (Sensitivity, UNSEEDED),
        (Evolution, {}),
        (partial(Surrogate, pool=40), {}),
        (CmaEs, {}),
        (Tpe, {}),
        (Random, NO_OPTIMUM),
        (Uniform, NO_OPTIMUM | UNSEEDED),
    ],
    ids=str,
)
def test_an_agent_keeps_its_contract(factory, expected) -> None:
    check_agent(factory, **expected)


@dataclass(frozen=True)
class Broken(Agent):
    """Scores three random strategies, with one fault."""

    name: ClassVar[str] = "broken"
    steps: ClassVar[bool] = False

    fault: str

    def search(self, task: SearchTask) -> None:
        rng = np.random if self.fault == "global" else np.random.default_rng(task.seed)
        if self.fault == "unseeded":
            rng = np.random.default_rng()
        if self.fault == "episodes":
            rng = np.random.default_rng(task.episodes)
        make = task.space.snap if self.fault == "budget" else task.space.land
        high = 0.1 if self.fault == "budget" else 0.5
        proposals = [make(rng.uniform(0.0, high, 4)) for _ in range(8)]
        try:
            task.score(proposals)
        except KeyboardInterrupt:
            if self.fault != "interrupt":
                raise
            task.score(proposals[:0])


@pytest.mark.parametrize(
    ("fault", "learns", "says"),
    [
        ("global", False, "changes the global random state"),
        ("unseeded", False, "does not repeat"),
        ("episodes", False, "does not continue"),
        ("interrupt", False, "swallows"),
        ("budget", False, "misses the budget"),
        ("none", True, "the optimum is 0"),
        ("none", False, None),
    ],
)
def test_the_check_finds_what_is_broken(fault: str, learns: bool, says: str | None) -> None:
    if says is None:
        check_agent(lambda: Broken(fault), learns=learns)
        return
    with pytest.raises(AssertionError, match=says):
        check_agent(lambda: Broken(fault), learns=learns)
