"""From YAML to objects: what is checked before anything is built."""

import sys
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
    assert settings.repair == RepairSettings()
    assert (settings.episodes, settings.seed, settings.export, settings.original_lr) == (7, 5, (), 0.2)


def test_problems_of_several_sections_come_in_one_message() -> None:
    cfg = config("agent=ddpg", "budget.ratio=7", "finetune.epochs=-1", "agent.sigma=-1")
    with pytest.raises(UserError) as error:
        wiring.settings_of(cfg, original_lr=0.1)
    for text in ("budget.ratio=7", "finetune.epochs=-1", "agent.sigma=-1"):
        assert text in str(error.value)


def test_several_budgets_are_shares_of_the_one_that_is_chosen() -> None:
    settings = wiring.settings_of(config("search.budgets=[0.75,0.5]", "budget=params"))
    assert (settings.ratios, settings.budgets) == ((0.75, 0.5), (BudgetSettings("params"),))
    with refused("out_of_range", "search.budgets[1]"):
        wiring.settings_of(config("search.budgets=[0.5,0]"))
    with refused("conflict", "search.budgets"):
        wiring.settings_of(config("search.budgets=[0.75,0.5]", "budget.ratio=0.3"))


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
        ("search.settings.RepairSettings", "wrong_type", "reward._target_"),
        ("search.interrupts.scoring_starts", "wrong_type", "reward._target_"),
        ("amc_env.tasks.Classification", "wrong_type", "reward._target_"),
    ],
)
def test_a_wrong_target_is_refused(target: str, code: str, field: str) -> None:
    with refused(code, field):
        wiring.settings_of(config(f"reward._target_={target}"))


@pytest.mark.parametrize(
    "target", ["search.models.checkpoint.read_checkpoint", "search.models.resnet.ResNet"]
)
def test_a_function_that_makes_no_network_is_not_called(target: str) -> None:
    with refused("wrong_type", "model._target_"):
        wiring.settings_of(config(f"model._target_={target}"))


def test_an_own_function_that_gives_nothing_is_refused() -> None:
    with refused("wrong_type", "reward._target_"):
        wiring.built(own("reward", "nothing"), "reward")


def nothing() -> None:
    """Of the user's own, and wrong."""


def takes_config(folder: str, config: dict[str, int]) -> tuple[str, dict[str, int]]:
    return folder, config


def broken() -> None:
    raise ValueError("a bug")


def refusing() -> None:
    raise UserError("not that", code="test")


def own(section: str, function: str, **settings: object) -> DictConfig:
    """A configuration that names a function of this file."""
    return OmegaConf.create(
        {section: {"_target_": f"{__name__}.{function}", **settings}, "trusted": [__name__]}
    )


called: list[str] = []


def notes() -> None:
    called.append("called")


@pytest.mark.parametrize(
    ("target", "trusted"),
    [
        ("builtins.int", []),
        ("os.system", []),
        (f"{__name__}.notes", []),
        (f"{__name__}.notes", [f"{__name__}s", "tests"]),
        ("search.files.os.system", []),
        ("search.files.log", []),
        ("search.files.json.loads", []),
        ("searching.notes", []),
        ("this.s", ["th"]),
    ],
)
def test_code_that_is_not_trusted_is_neither_imported_nor_called(target: str, trusted: list[str]) -> None:
    cfg = OmegaConf.create({"x": {"_target_": target}, "trusted": trusted})
    with refused("untrusted_target", "x._target_"):
        wiring.built(cfg, "x")
    assert not called
    assert "this" not in sys.modules


def test_a_target_inside_a_section_is_checked_too() -> None:
    for place, value in {
        "a": {"_target_": "os.getcwd"},
        "a.b": {"b": {"_target_": "os.getcwd"}},
        "a.0": [{"_target_": "os.getcwd"}],
    }.items():
        cfg = OmegaConf.create({"x": {"_target_": "search.settings.FinetuneSettings", "a": value}})
        with refused("untrusted_target", f"x.{place}._target_"):
            wiring.built(cfg, "x")


def test_arguments_may_be_called_as_those_of_hydra() -> None:
    cfg = own("tracker", "takes_config", folder="here")
    assert wiring.built(cfg, "tracker", config={"a": 1}) == ("here", {"a": 1})


def test_only_refusals_are_the_user_s_mistakes() -> None:
    with refused("test", ""):
        wiring.built(own("x", "refusing"), "x")
    with pytest.raises(ValueError, match="a bug") as error:
        wiring.built(own("x", "broken"), "x")
    assert not isinstance(error.value, UserError)


@pytest.mark.parametrize("name", ["ddpg", "random", "sensitivity", "uniform"])
def test_default_agents(name: str) -> None:
    assert wiring.default_of("agent", name).name == name


def test_a_default_agent_may_be_said_by_its_difference_to_another() -> None:
    assert wiring.default_of("agent", "ddpg_near_uniform") == replace(
        wiring.default_of("agent", "ddpg"), warmup="near_uniform", warmup_episodes=20, sigma=0.05
    )


def test_an_unknown_default_agent_is_refused_with_those_there_are() -> None:
    with refused("unknown_name", "agent"):
        wiring.default_of("agent", "sarsa")
