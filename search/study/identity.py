"""What a run's scores depend on: the header of its journal, the same for every command and for Python."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from amc_env.tasks import Classification
from search.study.problem import PruningProblem

MAY_GROW = ("episodes",)
"""Entries that may be larger when a run is resumed."""
_OF_A_SCORE = ("granularity", "keep", "criterion", "repair", "short_term", "scoring", "seed", "device")
_OF_THE_SEARCH = ("agent", "episodes", "reward", "enforce_budget", "fill_budget")
_OF_TRAINING = ("original_lr", "finetune", "regularization")
_OF_STAGES = ("finalists", "schedule")
_PACKAGES = ("torch", "numpy", "gymnasium", "stable-baselines3")


def identity(problem: PruningProblem) -> dict[str, Any]:
    """Everything that decides which strategies a run scores, and how.

    A run folder may be resumed from the command line or from Python as long as this is equal, apart from `MAY_GROW`.
    Settings that only affect what follows the search (export, measured latency, most of fine-tuning) are left out.
    """
    settings = problem.settings
    found = score_identity(problem) | _described(settings, *_OF_THE_SEARCH)
    found["budgets"] = {budget.cost: describe(budget) for budget in settings.budgets}
    if settings.trains_between:
        found |= _described(settings, *_OF_TRAINING)
    if settings.stages:  # more episodes may find another network, which the next stage starts from
        found |= _described(settings, *_OF_STAGES)
        found["stages"] = {"shares": list(settings.stages), "episodes": settings.episodes}
    if settings.ratios:  # the search for a budget learns from those before it
        found["ratios"] = {"shares": list(settings.ratios), "episodes": settings.episodes}
    return found | _predicted_latency(problem)


def score_identity(problem: PruningProblem) -> dict[str, Any]:
    """Everything that the score of a strategy depends on, whoever asks for it."""
    settings = problem.settings
    names = [*_OF_A_SCORE]
    if (
        settings.task != Classification()
    ):  # left out, so that run folders from before there were tasks can be resumed
        names += ["task"]
    if settings.short_term_steps:  # its learning rate is a fraction of the original one
        names += ["original_lr"]
    return _described(settings, *names) | {
        "weights": weights_fingerprint(problem.model),
        "data": {
            "fingerprint": problem.data.fingerprint,
            "search_images": len(problem.data.search),
            "mean": list(problem.data.mean),
            "std": list(problem.data.std),
        },
        "threads": settings.scoring.threads or torch.get_num_threads(),
        "versions": {name: version(name) for name in _PACKAGES},
    }


def describe(value: Any) -> Any:
    """A setting as JSON: of a dataclass its class and fields, leaving out fields with ``identity=False`` metadata."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.ndarray | np.generic | Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): describe(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [describe(entry) for entry in value]
    if is_dataclass(value) and not isinstance(value, type):
        kept = [entry.name for entry in fields(value) if entry.metadata.get("identity", True)]
        return {"class": _name(type(value)), **_described(value, *kept)}
    if callable(value) and hasattr(value, "__qualname__"):
        return _name(value)
    attributes = getattr(value, "__dict__", {})
    plain = {name: x for name, x in attributes.items() if isinstance(x, bool | int | float | str)}
    return {"class": _name(type(value)), **plain}


def _described(value: Any, *names: str) -> dict[str, Any]:
    return {name: describe(getattr(value, name)) for name in names}


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _predicted_latency(problem: PruningProblem) -> dict[str, Any]:
    """Two predictions, which stand for the latency table that they are made from."""
    space = problem.space
    ends = [0] * len(space.grids), space.most
    predicted = [[cost(end) for end in ends] for cost in space.costs if cost.name == "latency"]
    return {"latency_ms": predicted[0]} if predicted else {}


def weights_fingerprint(model: nn.Module) -> str:
    """Short SHA-256 of all weights and buffers."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
