"""conf/: every option of every group composes into a whole configuration, and is documented."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from amc_env.errors import UserError
from amc_env.pruning.criteria import CRITERIA, Criterion
from search.config import compose as wiring
from search.models.source import ModelSource

CONF = Path(__file__).parents[1] / "conf"
OPTIONS = sorted((path.parent.name, path.stem) for path in CONF.glob("*/*.yaml"))


def config(*overrides: str) -> DictConfig:
    with initialize_config_module("conf", version_base="1.3"):
        return compose("search", overrides=list(overrides))


def needed(group: str, option: str) -> list[str]:
    """What an option cannot do without."""
    return {
        ("reward", "infinity"): ["enforce_budget=false"],
        ("model", "torchvision"): ["model.name=squeezenet1_1"],
        ("model", "timm"): ["model.name=resnet10t"],
        ("model", "module"): ["model.factory=search.models.resnet:ResNet", "model.arguments={depth: 8}"],
    }.get((group, option), [])


PACKAGES = {"torchvision": "torchvision", "timm": "timm", "hf": "transformers"}
"""What options of ``model`` need beside the product's dependencies."""


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=str)
def test_every_option_composes_checks_and_instantiates(
    group: str, option: str, optional: Callable[[str], Any], request: pytest.FixtureRequest
) -> None:
    if group == "model" and option in PACKAGES:
        optional(PACKAGES[option])
    overrides = needed(group, option)
    if (group, option) == ("model", "hf"):
        overrides = [f"model.name={request.getfixturevalue('tiny_vit')}"]
    added = "+" if group == "experiment" else ""  # it is no section: it sets others
    cfg = config(f"{added}{group}={option}", *overrides)
    settings = wiring.settings_of(cfg, original_lr=0.1)
    assert settings.episodes == cfg.search.episodes
    source = wiring.model_source(cfg)
    assert isinstance(source, ModelSource)
    if group == "model":
        assert sum(p.numel() for p in source.build((3, 32, 32), 10).parameters()) > 1000
    if group in ("tracker", "data"):  # these reach out when called: a run does that, in tests of their own
        assert callable(get_object(cfg[group]._target_))
    elif "_target_" in cfg.get(group, {}):
        assert instantiate(wiring.resolved(cfg)[group], _convert_="all") is not None


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda criterion: criterion.name)
def test_a_criterion_s_file_makes_it_and_masks_take_what_fits_them(criterion: Criterion) -> None:
    cfg = config(f"criterion={criterion.name}", "granularity=fine_grained")
    if "fine_grained" in criterion.granularities:
        assert wiring.settings_of(cfg, original_lr=0.1).criterion.name == criterion.name
    else:
        with pytest.raises(
            UserError, match=f"criterion={criterion.name} does not fit granularity=fine_grained"
        ):
            wiring.settings_of(cfg, original_lr=0.1)


def test_every_option_begins_with_what_it_is_and_no_file_names_a_place_on_a_machine() -> None:
    def texts(node: Any) -> list[str]:
        if isinstance(node, dict):
            return [text for value in node.values() for text in texts(value)]
        return [node] if isinstance(node, str) else []

    assert [path for path in CONF.glob("*/*.yaml") if not path.read_text().startswith("# ")] == []
    for path in CONF.rglob("*.yaml"):
        plain = OmegaConf.to_container(OmegaConf.load(path))
        assert not [text for text in texts(plain) if text.startswith("/")], path


def test_the_names_that_scripts_count_on_are_there() -> None:
    groups: dict[str, set[str]] = {}
    for group, option in OPTIONS:
        groups.setdefault(group, set()).add(option)
    assert {"digits_cnn", "digits_mlp", "resnet20", "resnet56", "mobilenet"} <= groups["model"]
    assert groups["budget"] == {"none", "flops", "params", "latency", "memory", "storage", "cycles"}
    assert {"ddpg", "uniform", "random", "sensitivity"} <= groups["agent"]
    assert groups["granularity"] == {"channel", "fine_grained", "nm", "vector", "kernel"}
    assert groups["criterion"] == {criterion.name for criterion in CRITERIA}
    assert {"resnet20_fine_grained", "resnet50_fine_grained"} <= groups["experiment"]
    assert groups["schedule"] == {"one_shot", "linear", "cubic"}
    assert groups["regularization"] == {"none", "l1", "l2", "bn_scale", "group_lasso"}
    assert groups["repair"] == {"none", "least_squares", "batch_norm", "both", "sequential"}
    assert groups["tracker"] == {"none", "wandb", "tensorboard"}
    assert groups["preset"] == {"default", "amc_paper", "amc_release"}


def test_the_page_of_options_is_up_to_date() -> None:
    """`python scripts/write_configuration.py` renews it."""
    script = runpy.run_path(str(CONF.parent / "scripts" / "write_configuration.py"))
    text = script["page"]()
    assert script["PAGE"].read_text(encoding="utf-8") == text
    assert "| `budget.ratio` | `0.5` |" in text
    assert all(f"`{group}={option}`" in text for group, option in OPTIONS)
