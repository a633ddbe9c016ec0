"""From a Hydra configuration to plain objects: the only place, with the commands, that sees `cfg`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from agents.base import Agent
from amc_env.costs.base import BudgetSettings, budget_on
from amc_env.errors import UserError, require
from search.config.typecheck import check_types
from search.data.base import Data
from search.models.source import ModelSource, read_checkpoint
from search.output.tracking import CsvTracker, Tracker, Trackers
from search.settings import (
    FinalistSettings,
    FinetuneSettings,
    LatencySettings,
    Settings,
    ShortTermSettings,
    channel_multiple,
)

Built = TypeVar("Built")


_NOT_OF_THE_SEARCH = ("tracker", "finalists", "finetune", "schedule", "export", "latency")
"""Sections that by themselves change no evaluation: a run may be gone on with under others."""


_BUILT = {
    "criterion": "criterion",
    "repair": "repair",
    "reward": "reward",
    "schedule": "schedule",
    "regularization": "regularization",
    "scoring": "evaluator",
}
"""Settings that a section's ``_target_`` makes, and the section."""


_MADE: dict[str, Callable[..., Any]] = {
    "finalists": FinalistSettings,
    "short_term": ShortTermSettings,
    "finetune": FinetuneSettings,
    "latency": LatencySettings,
}
"""Sections without a ``_target_``, and what they make."""


def built(node: DictConfig, *, refusal: type[ValueError] = UserError, **more: Any) -> Any:
    """Instantiates a section.

    Args:
        node: The section.
        refusal: What its constructor raises where a setting is wrong.
        more: Arguments that are not in the section.

    Raises:
        UserError: The constructor refused. Its other errors are bugs and pass as they are.
    """
    make = instantiate(node, _partial_=True)  # in two steps, as an argument may be named `config`
    try:
        return make(**more)
    except refusal as error:
        raise UserError(str(error)) from error


def as_search(cfg: DictConfig, name: str, agent: Mapping[str, Any]) -> DictConfig:
    """The configuration of another command as one of amc-search, whose other sections have their defaults.

    Args:
        cfg: The command's configuration.
        name: Its file in conf.
        agent: The section of an agent that does what the command does.

    Raises:
        UserError: There are settings that do not exist, or values of a wrong type; all in one message.
    """
    there = hydra.compose(name)
    unknown = [str(section) for section in cfg if section not in there]
    if unknown:
        raise UserError(f"unknown key {', '.join(unknown)}; there are {', '.join(map(str, there))}")
    whole = hydra.compose("search")
    with open_dict(whole):
        if "search" in cfg:
            own = cfg.search
            whole.search = OmegaConf.merge(whole.search, own) if isinstance(own, DictConfig) else own
        for section in cfg:
            if section in whole and section != "search":
                whole[section] = cfg._get_node(section)
        whole.agent = OmegaConf.create(dict(agent))
    check_types(whole)
    return whole


@contextmanager
def at_the_top(names: Iterable[str]) -> Iterator[None]:
    """Says in errors ``name`` for ``agent.name``: what is an agent's in a search is at the top of other commands."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for name in names:
            text = text.replace(f"agent.{name}", name)
        raise UserError(text) from error


def settings_of(cfg: DictConfig, original_lr: float) -> Settings:
    """All settings of a run, checked; problems of different sections are raised together.

    Raises:
        UserError: Whatever can be seen to be wrong from the configuration alone.
    """
    problems: list[str] = []

    def checked(make: Callable[[], Any]) -> Any:
        try:
            return make()
        except UserError as error:
            problems.append(str(error))
            return None

    parts = {name: checked(make) for name, make in _parts(cfg).items()}
    # What was refused is left at its default: so the others are checked as well.
    fine = {"agent": None} | {name: part for name, part in parts.items() if part is not None}
    settings = checked(lambda: Settings(**fine, **_scalars(cfg), original_lr=original_lr))
    if problems:
        raise UserError("; ".join(dict.fromkeys(problems)))  # the granularity may wait for the budgets
    assert isinstance(settings, Settings)
    return settings


def _parts(cfg: DictConfig) -> dict[str, Callable[[], Any]]:
    """How to make what the sections say, by its name in the settings."""
    own: dict[str, Callable[[], Any]] = {
        "budgets": partial(_budgets, cfg),
        "agent": partial(_agent, cfg),
        "granularity": lambda: built(resolved(cfg).granularity),
    }
    return {
        **own,
        **{name: partial(built, cfg[section]) for name, section in _BUILT.items()},
        **{name: partial(_made, kind, cfg[name]) for name, kind in _MADE.items()},
    }


def _made(kind: Callable[..., Any], node: DictConfig) -> Any:
    return kind(**_plain(node))


def _scalars(cfg: DictConfig) -> dict[str, Any]:
    """What stands in no section of its own."""
    return {
        "episodes": cfg.search.episodes,
        "stages": tuple(cfg.search.stages),
        "enforce_budget": cfg.enforce_budget,
        "fill_budget": cfg.fill_budget,
        "export": tuple(cfg.export),
        "seed": cfg.seed,
        "device": _device(cfg.device),
    }


def resolved(cfg: DictConfig) -> DictConfig:
    """The configuration with a number for ``channel_multiple``, where that was left to the budgets.

    Raises:
        UserError: A budget is wrong.
    """
    if cfg.channel_multiple is not None:
        return cfg
    cfg = cfg.copy()
    cfg.channel_multiple = channel_multiple(_budgets(cfg))
    return cfg


def _budgets(cfg: DictConfig) -> tuple[BudgetSettings, ...]:
    main = [built(cfg.budget)] if cfg.budget.get("_target_") else []
    also = cfg.get("also", {})  # not every command has it
    return (*main, *(_further(str(name), ratio) for name, ratio in sorted(also.items()) if ratio is not None))


def _further(name: str, ratio: Any) -> BudgetSettings:
    """A budget of ``also``: the share of a cost's original value that may remain."""
    fine = isinstance(ratio, float | int) and not isinstance(ratio, bool) and 0 < ratio <= 1
    require({f"also.{name}": (fine, ratio, "in (0, 1]")})
    return budget_on(name, ratio, field="also")


def _agent(cfg: DictConfig) -> Agent:
    agent = built(cfg.agent, refusal=ValueError)
    return _expected("agent", Agent, agent)  # type: ignore[type-abstract]


def _expected(section: str, kind: type[Built], thing: Any) -> Built:
    if not isinstance(thing, kind):
        raise UserError(f"{section}._target_ gives a {type(thing).__name__}, needed is a {kind.__name__}")
    return thing


def default_agent(name: str) -> Agent:
    """An agent with the settings of its file in conf/agent.

    Raises:
        UserError: There is no agent of that name.
    """
    names = sorted(Path(file.name).stem for file in resources.files("conf").joinpath("agent").iterdir())
    if name not in names:
        raise UserError(f"unknown agent {name!r}; there are {', '.join(names)}")
    with hydra.initialize_config_module("conf", version_base="1.3"):
        return _agent(hydra.compose("search", overrides=[f"agent={name}"]))


def _plain(node: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(node, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _device(name: str) -> str:
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def model_source(cfg: DictConfig) -> ModelSource:
    """Where the network comes from; a file of the user's is read here too, to refuse a wrong one early."""
    source = _expected("model", ModelSource, built(cfg.model))
    if source.weights is not None:
        read_checkpoint(Path(source.weights))
    return source


def data_of(cfg: DictConfig) -> Data:
    """The dataset, split."""
    return _expected("data", Data, built(cfg.data, search_images=cfg.search.images))


def trackers(cfg: DictConfig, folder: Path, config: Mapping[str, Any]) -> Trackers:
    """metrics.csv and the chosen tracker; where it keeps a configuration, that is ``config``."""
    chosen: list[Tracker] = [CsvTracker(folder)]
    more: dict[str, Any] = {"folder": folder}
    if "WandbTracker" in cfg.tracker.get("_target_", ""):
        more["config"] = config
    chosen.append(built(cfg.tracker, **more))
    return Trackers(chosen)


def header_config(cfg: DictConfig) -> Mapping[str, Any]:
    """The part of the configuration that evaluations depend on.

    Files and folders are left out (fingerprints of weights and data stand for them), and so are the stages
    after the search. The device is the one that was chosen, and so is the multiple of channels.

    Raises:
        UserError: A budget is wrong.
    """
    plain = _plain(resolved(cfg)) | {"device": _device(cfg.device)}
    for section in _NOT_OF_THE_SEARCH:
        plain.pop(section, None)
    for section, key in (
        ("model", "weights"),
        ("model", "url"),
        ("data", "path"),
        ("budget", "table"),
        ("evaluator", "threads"),  # the header states threads itself
    ):
        plain.get(section, {}).pop(key, None)
    return plain
