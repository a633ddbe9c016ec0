"""From a Hydra configuration to plain objects: the only place, with the commands, that sees `cfg`."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module, resources
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import hydra
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from amc_env.costs.base import BudgetSettings, budget_on
from amc_env.errors import UserError, did_you_mean, reported_together
from amc_env.validation import Count, Fraction, Listed, Share, check_arguments, settings
from search.data.base import Data
from search.models.checkpoint import read_checkpoint
from search.models.source import ModelSource
from search.models.user_module import FACTORY, dotted
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


_BUILT = {
    "agent": "agent",
    "criterion": "criterion",
    "repair": "repair",
    "reward": "reward",
    "schedule": "schedule",
    "regularization": "regularization",
    "scoring": "evaluator",
    "task": "task",
}
"""Settings that a section's ``_target_`` makes, and the section."""


_MADE: dict[str, Callable[..., Any]] = {
    "finalists": FinalistSettings,
    "short_term": ShortTermSettings,
    "finetune": FinetuneSettings,
    "latency": LatencySettings,
}
"""Sections without a ``_target_``, and what they make."""


_PACKAGES = ("amc_env", "agents", "search")
"""Packages whose classes and functions configurations may name."""


_HOMES = {
    "agent": "agents",
    "budget": "amc_env.costs",
    "criterion": "amc_env.pruning.criteria",
    "data": "search.data",
    "evaluator": "search.settings.ScoringSettings",
    "granularity": "amc_env.pruning.granularity",
    "model": "search.models",
    "regularization": "amc_env.pruning.regularization",
    "repair": "search.settings.RepairSettings",
    "reward": "amc_env.rewards",
    "schedule": "amc_env.pruning.schedule",
    "task": "amc_env.tasks",
    "tracker": "search.output.tracking",
}
"""Where the classes of this project are that a section may name; those of the user's own may be anywhere."""


_BY_FUNCTION = {"data": Data, "model": ModelSource}
"""Sections that name a function of this project, and what it returns."""


_BUILT_LATER = ("model", "data", "tracker")
"""Sections whose objects read files or reach out: their arguments are checked before."""


@settings
class _Search:
    """The section ``search``."""

    episodes: Count = 1
    images: Count | None = None
    stages: Listed[Share] = ()
    budgets: Listed[Fraction] = ()


def built(cfg: DictConfig, section: str, **more: Any) -> Any:
    """What a section's ``_target_`` makes.

    Args:
        cfg: The configuration.
        section: The section's name.
        more: Arguments that are not in the section.

    Raises:
        UserError: An argument is wrong. Other errors are bugs and pass as they are.
    """
    make = _maker(cfg, section)
    with _inside(section, cfg[section]):
        thing = make(**more)
    if thing is None:
        raise UserError("{field} gives nothing", code="wrong_type", field=f"{section}._target_")
    return thing


def made(kind: Callable[..., Built], cfg: DictConfig, section: str) -> Built:
    """What a section without a ``_target_`` holds, as ``kind``."""
    node = _section(cfg, section)
    with _inside(section, node):
        return kind(**_plain(node))


def _maker(cfg: DictConfig, section: str) -> partial[Any]:
    """The function that a section's ``_target_`` names, with the section's arguments, which are checked."""
    node = _section(cfg, section)
    settings = _plain(node)
    for place, name in _targets({"_target_": "", **settings}, section):
        _check_trusted(name, place, cfg)
    target = get_object(settings["_target_"])
    _check_kind(target, section)
    make: partial[Any] = instantiate(node, _partial_=True, _convert_="all")
    if not hasattr(target, "__pydantic_fields__"):  # such a class checks its arguments itself
        with _inside(section, node):
            check_arguments(target, make.keywords)
    return make


def _targets(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """Every name of code within a plain value, with its place: each ``_target_``, and a network's ``factory``."""
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, inner in entries:
        if key == "_target_":
            yield f"{place}._target_", str(inner)
        elif key == FACTORY and isinstance(inner, str):
            yield f"{place}.{key}", dotted(inner)
        else:
            yield from _targets(inner, f"{place}.{key}")


def _import(module: str) -> None:
    """Imports a module for the error that says which optional package it lacks; `get_object` would wrap that.

    Raises:
        UserError: That error; every other is left to `get_object`.
    """
    try:
        import_module(module)
    except UserError:
        raise
    except Exception:
        pass


def _check_trusted(name: str, place: str, cfg: DictConfig) -> None:
    """Refuses a ``_target_`` before its module is imported, and one that is no class or function of its module.

    Raises:
        UserError: It is in no package of this project and in none that ``trusted`` lists, or it cannot be found.
    """
    packages = (*_PACKAGES, *_trusted(cfg))
    untrusted = UserError(
        f"{{field}}={name} is no class or function of {', '.join(packages)}; to call code of your own, list its module in "
        "trusted, like trusted=[my_module]",
        code="untrusted_target",
        field=place,
    )
    if not _is_within(name, packages):
        raise untrusted
    if not _is_within(name, _PACKAGES) and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # at the end: nothing that is installed is hidden
    _import(name.rpartition(".")[0])
    try:
        target = get_object(name)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{{field}}={name} cannot be found: {reason}", code="unknown_target", field=place
        ) from error
    if not (inspect.isclass(target) or inspect.isroutine(target)):
        raise untrusted
    if not _is_within(str(target.__module__), packages):  # imported there from elsewhere
        raise untrusted


def _check_kind(target: Any, section: str) -> None:
    """Refuses, before it is called, a class or function of this project that makes something else than the section's.

    Raises:
        UserError: It does.
    """
    home, module = _HOMES.get(section), str(target.__module__)
    if home is None or not _is_within(module, _PACKAGES):
        return
    if section in _BY_FUNCTION:
        fits = inspect.isfunction(target) and get_type_hints(target).get("return") is _BY_FUNCTION[section]
    else:
        fits = inspect.isclass(target)
    if not fits or not _is_within(f"{module}.{target.__name__}", [home]):
        raise UserError(
            f"{{field}}={module}.{target.__name__} is no {section} of this project; see the options of {section} in --help",
            code="wrong_type",
            field=f"{section}._target_",
        )


def _trusted(cfg: DictConfig) -> tuple[str, ...]:
    check_arguments(_trust, given := _plain(cfg, "trusted") if "trusted" in cfg else {})
    return tuple(given.get("trusted", ()))


def _trust(trusted: Listed[str]) -> None:
    """The type of the setting ``trusted``."""


def _is_within(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _section(cfg: DictConfig, name: str) -> DictConfig:
    node = cfg[name]
    if not isinstance(node, DictConfig):
        raise UserError(
            f"{{field}}={node} is no section of settings; see --help", code="wrong_type", field=name
        )
    return node


@contextmanager
def _inside(section: str, node: DictConfig) -> Iterator[None]:
    """Names settings in errors by their section, or by the place that the section takes them from."""
    raw = OmegaConf.to_container(node, resolve=False)
    assert isinstance(raw, dict)

    def path(field: str) -> str:
        if field.startswith(f"{section}."):
            return field
        given = str(raw.get(field))
        return given[2:-1] if given.startswith("${") else f"{section}.{field}"

    try:
        yield
    except UserError as error:
        raise error.renamed(path) from error


def settings_of(
    cfg: DictConfig, original_lr: float = 0.1, parts: Mapping[str, Callable[[], Any]] | None = None
) -> Settings:
    """All settings of a run, checked; problems of different sections are raised together.

    Args:
        cfg: The configuration of a command; what it has no section for has the default.
        original_lr: Peak learning rate of the original training.
        parts: Settings that are not made from a section, and what makes them.

    Raises:
        UserError: Whatever can be seen to be wrong from the configuration alone.
    """
    with reported_together() as attempt:
        for section in _BUILT_LATER:
            if section in cfg:
                attempt(partial(_maker, cfg, section))
        search = attempt(partial(made, _Search, cfg, "search")) or _Search()
        found = {name: attempt(make) for name, make in (_parts(cfg) | dict(parts or {})).items()}
        # What was refused is left at its default, so that the others are checked as well.
        fine = {name: part for name, part in found.items() if part is not None}
        more = scalars(cfg, "keep", "enforce_budget", "fill_budget", "export", "seed", "device")
        more |= {"episodes": search.episodes, "original_lr": original_lr}
        more |= {"stages": search.stages, "ratios": search.budgets}
        more |= _plain(cfg, "baselines") if "baselines" in cfg else {}
        result = attempt(lambda: Settings(**fine, **more))
    assert isinstance(result, Settings)
    return result


def _parts(cfg: DictConfig) -> dict[str, Callable[[], Any]]:
    """How to make what the sections say, by its name in the settings."""
    return {
        "budgets": partial(_budgets, cfg),
        "granularity": lambda: built(resolved(cfg), "granularity"),
        **{name: partial(built, cfg, section) for name, section in _BUILT.items() if section in cfg},
        **{name: partial(made, kind, cfg, name) for name, kind in _MADE.items() if name in cfg},
    }


def scalars(cfg: DictConfig, *names: str) -> dict[str, Any]:
    """Settings at the top of the configuration, as far as it has them; the device as it is chosen here."""
    found = _plain(cfg, *names)
    return found | {"device": _device(found["device"])} if "device" in found else found


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
    section = _section(cfg, "budget")
    main = [built(cfg, "budget")] if "_target_" in section else []
    given = [str(key) for key, value in section.items() if value is not None]
    if not main and given:
        raise UserError(
            "{field} is given and no budget is chosen: add one, like budget=flops",
            code="unknown_key",
            field=f"budget.{given[0]}",
        )
    also = _plain(_section(cfg, "also")) if "also" in cfg else {}  # not every command has it
    return (*main, *(_further(name, ratio) for name, ratio in sorted(also.items()) if ratio is not None))


def _further(name: str, ratio: Any) -> BudgetSettings:
    """A budget of ``also``: the share of a cost's original value that may remain."""
    try:
        return budget_on(name, ratio)
    except UserError as error:
        raise error.renamed({"cost": "also", "ratio": f"also.{name}"}.__getitem__) from error


def expected(section: str, kind: type[Built], thing: Any) -> Built:
    """The thing, which must be of a kind.

    Raises:
        UserError: It is not.
    """
    if not isinstance(thing, kind):
        raise UserError(
            f"{{field}} gives a {type(thing).__name__}, needed is a {kind.__name__}",
            code="wrong_type",
            field=f"{section}._target_",
        )
    return thing


def default_of(section: str, name: str, *overrides: str) -> Any:
    """What an option's file in conf makes, like ``("criterion", "l1")``.

    Args:
        section: The group.
        name: The option.
        overrides: Of settings, as on the command line.

    Raises:
        UserError: There is no option of that name.
    """
    names = sorted(Path(file.name).stem for file in resources.files("conf").joinpath(section).iterdir())
    if name not in names:
        raise UserError(
            f"{{field}}={name!r} is unknown{did_you_mean(name, names)}", code="unknown_name", field=section
        )
    with hydra.initialize_config_module("conf", version_base="1.3"):
        cfg = hydra.compose("search", overrides=[f"{section}={name}", *overrides])
    return built(resolved(cfg), section)


def _plain(node: DictConfig, *names: str) -> dict[str, Any]:
    """The node, or these of its entries, as plain values."""
    plain = OmegaConf.to_container(OmegaConf.masked_copy(node, list(names)) if names else node, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _device(name: Any) -> Any:
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def model_source(cfg: DictConfig) -> ModelSource:
    """Where the network comes from; a file of the user's is read here too, to refuse a wrong one early."""
    source = expected("model", ModelSource, built(cfg, "model"))
    if source.file is not None:
        read_checkpoint(source.file, source.key)
    return source


def data_of(cfg: DictConfig, source: ModelSource) -> Data:
    """The dataset, split; settings that are null are those that the network's weights were trained with, if any."""
    more = {"search_images": cfg.search.images, **_wanted(cfg, source)}
    return expected("data", Data, built(cfg, "data", **more))


def _wanted(cfg: DictConfig, source: ModelSource) -> dict[str, Any]:
    """What the network wants of the data's settings, for those that are null."""
    section = _section(cfg, "data")
    wanted = source.data_settings
    return {name: wanted[name] for name in wanted if name in section and section[name] is None}


def input_of(cfg: DictConfig, source: ModelSource) -> tuple[tuple[int, int, int], int]:
    """The shape of the data's images and the number of classes; nothing is read where the data's module has an INPUT."""
    known = getattr(inspect.getmodule(_maker(cfg, "data").func), "INPUT", None)
    if known is not None:
        (channels, side, _), classes = known
        size = _wanted(cfg, source).get("size", cfg.data.get("size")) or side
        return (channels, size, size), cfg.data.get("classes", classes)
    data = data_of(cfg, source)
    return data.image_shape, len(data.classes)


def text_of(cfg: DictConfig) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(resolved(cfg), resolve=True)


def trackers(cfg: DictConfig, folder: Path) -> Trackers:
    """metrics.csv and the chosen tracker; W&B is given the resolved configuration."""
    chosen: list[Tracker] = [CsvTracker(folder)]
    more: dict[str, Any] = {"folder": folder}
    if "WandbTracker" in cfg.tracker.get("_target_", ""):
        more["config"] = _plain(resolved(cfg))
    chosen.append(built(cfg, "tracker", **more))
    return Trackers(chosen)
