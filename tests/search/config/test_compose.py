"""From YAML to objects: what is checked before anything is built, and what the journal's header holds."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from agents.ddpg import DDPGAgent
from amc_env.errors import UserError
from search.config import compose as wiring
from search.config.typecheck import check_types, fits, said
from search.settings import BudgetSettings, RepairSettings


def config(*overrides: str) -> DictConfig:
    with initialize_config_module("conf", version_base="1.3"):
        return compose("search", overrides=list(overrides))


def test_the_default_configuration_becomes_settings() -> None:
    cfg = config("budget.ratio=0.3", "search.episodes=7", "seed=5", "export=[]", "device=cpu")
    check_types(cfg)
    settings = wiring.settings_of(cfg, original_lr=0.2)
    assert isinstance(settings.agent, DDPGAgent)
    assert settings.budgets == (BudgetSettings("macs", 0.3),)
    assert settings.repair == RepairSettings("least_squares")
    assert (settings.episodes, settings.seed, settings.export, settings.original_lr) == (7, 5, (), 0.2)


def test_problems_of_several_sections_come_in_one_message() -> None:
    cfg = config("budget.ratio=7", "finetune.epochs=-1", "agent.sigma=-1")
    with pytest.raises(UserError) as error:
        wiring.settings_of(cfg, original_lr=0.1)
    for text in ("budget.ratio=7", "finetune.epochs=-1", "agent.sigma=-1"):
        assert text in str(error.value)


def test_types_are_checked_in_one_message() -> None:
    cfg = config("seed=x", "finetune.epochs=1.5", "agent.hidden=3", "+repair.foo=1", "data.split_seed=z")
    with pytest.raises(UserError) as error:
        check_types(cfg)
    for text in (
        "seed=x must be a whole number",
        "finetune.epochs=1.5 must be a whole number",
        "agent.hidden=3 must be a list, each of it a whole number",
        "unknown key repair.foo; there are name, images",
        "data.split_seed=z must be a whole number",
    ):
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("value", "hint", "fine"),
    [
        (1, int, True),
        (True, int, False),
        (1.0, int, False),
        (1, float, True),
        (True, float, False),
        ("1", float, False),
        (None, float | None, True),
        ([1, 2], tuple[int, ...], True),
        ([1, "b"], Sequence[int], False),
        (3, list[int], False),
        ("all", Literal["all", "producers"], True),
        ("some", Literal["all", "producers"], False),
        ({"a": 1}, dict[str, int], True),
        (object(), Any, True),
    ],
)
def test_what_fits_an_annotation(value: object, hint: Any, fine: bool) -> None:
    assert fits(value, hint) is fine


def test_types_are_said_in_words() -> None:
    assert said(float | None) == "a number or null"
    assert said(tuple[int, ...]) == "a list, each of it a whole number"
    assert said(Literal[1, 2]) == "one of 1, 2"


def takes_config(folder: str, config: dict[str, int]) -> tuple[str, dict[str, int]]:
    return folder, config


def broken() -> None:
    raise ValueError("a bug")


def refusing() -> None:
    raise UserError("not that")


def test_arguments_may_be_called_as_those_of_hydra() -> None:
    node = OmegaConf.create({"_target_": f"{__name__}.takes_config", "folder": "here"})
    assert wiring.built(node, config={"a": 1}) == ("here", {"a": 1})


def test_only_refusals_are_the_user_s_mistakes() -> None:
    with pytest.raises(UserError, match="not that"):
        wiring.built(OmegaConf.create({"_target_": f"{__name__}.refusing"}))
    bug = OmegaConf.create({"_target_": f"{__name__}.broken"})
    with pytest.raises(ValueError, match="a bug") as error:
        wiring.built(bug)
    assert not isinstance(error.value, UserError)
    with pytest.raises(UserError, match="a bug"):
        wiring.built(bug, refusal=ValueError)


def test_the_header_holds_what_evaluations_depend_on_and_no_place() -> None:
    places = ("model=resnet20", "data=cifar10", "model.weights=FILE", "data.path=DIR", "device=cpu")
    header = wiring.header_config(config(*places, "hydra.run.dir=DIR"))
    assert not {"hydra", "tracker", "finetune", "export", "latency"} & set(header)
    assert "FILE" not in str(header)
    assert "DIR" not in str(header)
    assert wiring.header_config(config("finetune.epochs=0", "tracker=wandb")) == wiring.header_config(
        config()
    )
    assert wiring.header_config(config("seed=2")) != wiring.header_config(config())
    assert wiring.header_config(config("device=auto"))["device"] in ("cpu", "cuda")


@pytest.mark.parametrize("name", ["ddpg", "random", "sensitivity", "uniform"])
def test_default_agents(name: str) -> None:
    assert wiring.default_agent(name).name == name


def test_a_default_agent_may_be_said_by_its_difference_to_another() -> None:
    assert wiring.default_agent("ddpg_near_uniform") == replace(
        wiring.default_agent("ddpg"), warmup="near_uniform", warmup_episodes=20, sigma=0.05
    )


def test_an_unknown_default_agent_is_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match="ddpg, ddpg_near_uniform, netadapt, random, sensitivity, uniform"):
        wiring.default_agent("sarsa")
