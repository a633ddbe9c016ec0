"""Finds unknown settings and wrong types in a configuration before anything is built from it."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from amc_env.errors import UserError
from search.settings import (
    FinalistSettings,
    FinetuneSettings,
    LatencySettings,
    ShortTermSettings,
)

_TOP: dict[str, Any] = {
    "seed": int,
    "device": str,
    "channel_multiple": int | None,
    "max_ratio": float,
    "enforce_budget": bool,
    "fill_budget": bool,
    "search.episodes": int,
    "search.images": int | None,
    "search.stages": list[float],
    "export": list[str],
}


_UNTARGETED: dict[str, Callable[..., Any]] = {
    "finalists": FinalistSettings,
    "short_term": ShortTermSettings,
    "finetune": FinetuneSettings,
    "latency": LatencySettings,
}


_SAID = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}


def check_types(cfg: DictConfig) -> None:
    """Refuses settings that do not exist, and values of another type than theirs, all in one message.

    Raises:
        UserError: There are such; or a section is none, or its `_target_` cannot be found.
    """
    problems = list(_sections(cfg))
    if not problems:
        problems = [
            f"{name}={OmegaConf.select(cfg, name)} must be {said(hint)}"
            for name, hint in _TOP.items()
            if not fits(_plain(OmegaConf.select(cfg, name)), hint)
        ]
        for section, node in cfg.items():
            problems += _of_section(str(section), node)
    if problems:
        raise UserError("; ".join(problems))


def _sections(cfg: DictConfig) -> Iterator[str]:
    """What has taken the place of a section."""
    for name in (
        "model",
        "data",
        "agent",
        "budget",
        "reward",
        "evaluator",
        "tracker",
        "search",
        "also",
        *_UNTARGETED,
    ):
        node = cfg.get(name)
        if not isinstance(node, DictConfig):
            yield f"{name}={node} is no section of settings; see --help"


def _of_section(section: str, node: Any) -> list[str]:
    if not isinstance(node, DictConfig):
        return []
    if section == "search":
        known = [name.removeprefix("search.") for name in _TOP if name.startswith("search.")]
        return [
            f"unknown key search.{key}; there are {', '.join(known)}"
            for key in map(str, node)
            if key not in known
        ]
    target = _UNTARGETED.get(section)
    if "_target_" in node:
        try:
            target = get_object(node["_target_"])
        except (ImportError, ValueError) as error:
            reason = " ".join(str(error).split())
            return [f"{section}._target_={node['_target_']} cannot be found: {reason}"]
    values = _plain(node)
    for key in node:
        if values[key] is None and OmegaConf.is_interpolation(node, str(key)):
            del values[key]  # it is null elsewhere, where null has a meaning
    return [] if target is None else _mistakes(section, target, values)


def _mistakes(section: str, target: Callable[..., Any], values: Mapping[str, Any]) -> list[str]:
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:  # a builtin, which has none
        return []
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    hints = _hints(target)
    wrong = []
    for name, value in values.items():
        if name.startswith("_"):  # Hydra's own: _target_, _partial_
            continue
        if name not in parameters and not takes_all:
            wrong.append(f"unknown key {section}.{name}; there are {', '.join(parameters)}")
        elif not fits(value, hints.get(name, Any)):
            wrong.append(f"{section}.{name}={value} must be {said(hints[name])}")
    return wrong


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError):  # annotations of a user's own target that cannot be evaluated: not checked
        return {}


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value may stand where ``hint`` is annotated; what is neither scalar nor list passes."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return any(fits(value, option) for option in inner)
    if kind is Literal:
        return value in inner
    if inspect.isclass(kind) and issubclass(kind, Sequence):
        return isinstance(value, list | tuple) and all(fits(item, inner[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in _SAID else True


def said(hint: Any) -> str:
    """A type in words."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return " or ".join(said(option) for option in inner)
    if kind is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if inspect.isclass(kind) and issubclass(kind, Sequence):
        return f"a list, each of it {said(inner[0])}"
    return _SAID.get(hint, str(hint))


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
