"""The YAML of agents, rewards and presets: each composes, instantiates and says what it should."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from agents.base import Agent
from agents.ddpg import DDPGAgent
from amc_env.rewards import REWARDS

CONF = Path(__file__).parents[2] / "conf"
NEAR = "ddpg_near_uniform"  # differences to ddpg
PRESETS = ("default", "amc_paper", "amc_release")


def load(group: str, option: str) -> DictConfig:
    config = OmegaConf.load(CONF / group / f"{option}.yaml")
    assert isinstance(config, DictConfig)
    return config


def ddpg(preset: str) -> DDPGAgent:
    """agent=ddpg with a preset on top, which may override existing keys only."""
    base = OmegaConf.load(CONF / "search.yaml")
    groups = {"agent": "ddpg", "criterion": "l2", "repair": "sequential"}
    base = OmegaConf.merge(base, {group: load(group, option) for group, option in groups.items()})
    OmegaConf.set_struct(base, True)
    agent = instantiate(OmegaConf.merge(base, load("preset", preset)).agent)
    assert isinstance(agent, DDPGAgent)
    return agent


@pytest.mark.parametrize(
    "option", sorted(path.stem for path in (CONF / "agent").glob("*.yaml") if path.stem != NEAR)
)
def test_every_agent_instantiates_and_names_all_its_settings(option: str) -> None:
    config = load("agent", option)
    agent = instantiate(config, _convert_="all")
    assert isinstance(agent, Agent)
    assert agent.name == option
    assert set(config) == {"_target_"} | {f.name for f in fields(agent) if f.init}  # type: ignore[arg-type]


@pytest.mark.parametrize("option", sorted(REWARDS))
def test_every_reward_instantiates(option: str) -> None:
    assert instantiate(load("reward", option)).name == option


def test_no_reward_is_without_its_file() -> None:
    assert {path.stem for path in (CONF / "reward").glob("*.yaml")} == set(REWARDS)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_composes_onto_existing_keys_as_a_global_package(preset: str) -> None:
    assert (CONF / "preset" / f"{preset}.yaml").read_text().startswith("# @package _global_\n")
    assert ddpg(preset).name == "ddpg"


def test_the_default_preset_changes_nothing() -> None:
    assert ddpg("default") == instantiate(load("agent", "ddpg"))


def test_the_release_preset_is_the_fact_sheet() -> None:
    expected: dict[str, Any] = {
        "warmup_episodes": 100,
        "warmup": "uniform",
        "sigma": 0.5,
        "sigma_decay": 0.95,
        "actor_lr": 1e-4,
        "critic_lr": 1e-3,
        "tau": 0.01,
        "gamma": 1.0,
        "batch_size": 64,
        "replay_episodes": 100,
        "replay_transitions": None,
        "store": "raw",
        "baseline_rate": 0.5,
        "hidden": (300, 300),
    }
    assert expected.items() <= asdict(ddpg("amc_release")).items()
    more = load("preset", "amc_release")
    assert (more.channel_multiple, more.max_ratio, more.search.episodes) == (8, 0.8, 800)


def test_the_paper_differs_from_the_release_in_replay_and_length_only() -> None:
    paper, release = asdict(ddpg("amc_paper")), asdict(ddpg("amc_release"))
    assert {key for key in paper if paper[key] != release[key]} == {"replay_transitions"}
    assert (paper["replay_transitions"], load("preset", "amc_paper").search.episodes) == (2000, 400)


@pytest.mark.parametrize("preset", PRESETS)
def test_hydra_composes_every_preset(preset: str) -> None:
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("search", overrides=["agent=ddpg", f"preset={preset}"])
    assert instantiate(config.agent) == ddpg(preset)
    if preset != "default":
        assert (config.channel_multiple, config.max_ratio) == (8, 0.8)
        assert config.search.episodes == load("preset", preset).search.episodes
