"""From YAML to objects: what is checked before anything is built."""

from dataclasses import replace

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf
from refusals import refused

from agents.surrogate import Surrogate
from amc_env.errors import UserError
from search.config import compose as wiring
from search.settings import BudgetSettings, RepairSettings


def config(*overrides: str) -> DictConfig:
    with initialize_config_module("conf", version_base="1.3"):
        return compose("search", overrides=list(overrides))


def test_the_default_configuration_becomes_settings() -> None:
    cfg = config("budget.ratio=0.3", "search.episodes=7", "seed=5", "export=[]", "device=cpu")
    settings = wiring.settings_of(cfg, original_lr=0.2)
    assert isinstance(settings.agent, Surrogate)
    assert settings.budgets == (BudgetSettings("macs", 0.3),)
    assert settings.repair == RepairSettings("least_squares")
    assert (settings.episodes, settings.seed, settings.export, settings.original_lr) == (7, 5, (), 0.2)


def test_problems_of_several_sections_come_in_one_message() -> None:
    cfg = config("agent=ddpg", "budget.ratio=7", "finetune.epochs=-1", "agent.sigma=-1")
    with pytest.raises(UserError) as error:
        wiring.settings_of(cfg, original_lr=0.1)
    for text in ("budget.ratio=7", "finetune.epochs=-1", "agent.sigma=-1"):
        assert text in str(error.value)


def test_types_and_unknown_keys_of_all_sections_come_in_one_error() -> None:
    cfg = config(
        "seed=x",
        "finetune.epochs=1.5",
        "agent=ddpg",
        "agent.hidden=3",
        "+repair.foo=1",
        "data.split_seed=z",
        "channel_multiple=0",
    )
    with pytest.raises(UserError) as error:
        wiring.settings_of(cfg)
    assert {(part.code, part.field) for part in error.value.parts} == {
        ("wrong_type", "seed"),
        ("wrong_type", "finetune.epochs"),
        ("wrong_type", "agent.hidden"),
        ("unknown_key", "repair.foo"),
        ("wrong_type", "data.split_seed"),
        ("out_of_range", "channel_multiple"),
    }


@pytest.mark.parametrize(
    ("target", "code", "field"),
    [
        ("search.settings.nothing", "unknown_target", "reward._target_"),
        ("search.settings.RepairSettings", "wrong_type", "reward"),
    ],
)
def test_a_wrong_target_is_refused(target: str, code: str, field: str) -> None:
    with refused(code, field):
        wiring.settings_of(config(f"reward._target_={target}"))


def takes_config(folder: str, config: dict[str, int]) -> tuple[str, dict[str, int]]:
    return folder, config


def broken() -> None:
    raise ValueError("a bug")


def refusing() -> None:
    raise UserError("not that")


def test_arguments_may_be_called_as_those_of_hydra() -> None:
    cfg = OmegaConf.create({"tracker": {"_target_": f"{__name__}.takes_config", "folder": "here"}})
    assert wiring.built(cfg, "tracker", config={"a": 1}) == ("here", {"a": 1})


def test_only_refusals_are_the_user_s_mistakes() -> None:
    with pytest.raises(UserError, match="not that"):
        wiring.built(OmegaConf.create({"x": {"_target_": f"{__name__}.refusing"}}), "x")
    with pytest.raises(ValueError, match="a bug") as error:
        wiring.built(OmegaConf.create({"x": {"_target_": f"{__name__}.broken"}}), "x")
    assert not isinstance(error.value, UserError)


@pytest.mark.parametrize("name", ["ddpg", "random", "sensitivity", "uniform"])
def test_default_agents(name: str) -> None:
    assert wiring.default_agent(name).name == name


def test_a_default_agent_may_be_said_by_its_difference_to_another() -> None:
    assert wiring.default_agent("ddpg_near_uniform") == replace(
        wiring.default_agent("ddpg"), warmup="near_uniform", warmup_episodes=20, sigma=0.05
    )


def test_an_unknown_default_agent_is_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match="cmaes, ddpg, ddpg_near_uniform, evolution, netadapt"):
        wiring.default_agent("sarsa")
