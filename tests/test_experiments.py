"""conf/experiment: every ready experiment is a whole configuration that a search takes, and can be changed."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from refusals import refused

from amc_env.pruning.granularity import FineGrained
from search.config import compose as wiring

EXPERIMENTS = sorted(path.stem for path in (Path(__file__).parents[1] / "conf" / "experiment").glob("*.yaml"))
OWN_WEIGHTS = ["plain20_half", "mobilenet_half", "mobilenet_half_latency", "mobilenet_imagenet_half"]
"""Of networks without published weights: these experiments refuse to begin without model.weights=FILE."""
FINE_GRAINED = ["resnet20_fine_grained", "resnet50_fine_grained"]


def config(experiment: str, *overrides: str) -> DictConfig:
    with initialize_config_module("conf", version_base="1.3"):
        return compose("search", overrides=[f"+experiment={experiment}", *overrides])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_a_whole_configuration(name: str) -> None:
    cfg = config(name)
    assert "experiment" not in cfg
    assert wiring.settings_of(cfg, original_lr=0.1).episodes == cfg.search.episodes
    if name in OWN_WEIGHTS:
        with refused("no_weights", "model.weights"):
            wiring.model_source(cfg).check()
    else:
        wiring.model_source(cfg).check()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_command_line_overrules_an_experiment(name: str) -> None:
    cfg = config(name, "agent=random", "search.episodes=7", "repair=none", "preset=default")
    settings = wiring.settings_of(cfg, original_lr=0.1)
    assert settings.agent.name == "random"
    assert settings.episodes == 7
    assert settings.repair.name == "none"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_says_how_it_is_started(name: str) -> None:
    text = (Path(__file__).parents[1] / "conf" / "experiment" / f"{name}.yaml").read_text()
    assert f"# amc-search +experiment={name}" in text


@pytest.mark.parametrize("name", FINE_GRAINED)
def test_the_fine_grained_search_has_amcs_stages(name: str) -> None:
    settings = wiring.settings_of(config(name), original_lr=0.1)
    assert settings.stages == (0.5, 0.35, 0.25, 0.2)
    assert [budget.cost for budget in settings.budgets] == ["params"]
    assert isinstance(settings.granularity, FineGrained)
    assert settings.agent.name == "ddpg"
    assert settings.agent.warmup == "near_uniform"
    assert settings.agent.warmup_episodes < settings.episodes / 2
    assert settings.trains_between


def test_resnet50_is_tuned_as_long_as_amc_says() -> None:
    cfg = config("resnet50_fine_grained")
    settings = wiring.settings_of(cfg, original_lr=cfg.model.original_lr)
    assert settings.finetune.epochs == 30
    assert settings.all_epochs == 120
    assert wiring.model_source(cfg).name == "resnet50"
    assert cfg.data._target_ == "search.data.imagenet.imagenet"
