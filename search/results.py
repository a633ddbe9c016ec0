"""What a run writes down of itself: result.json and how it is made."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from amc_env.evaluator import Outcome, accuracy
from amc_env.latency import measure
from search.export import Exported
from search.loop import Loop, Scored
from search.preparation import Prepared


def result_of(
    prepared: Prepared, networks: Mapping[str, nn.Module], best: Scored, loop: Loop, exports: list[Exported]
) -> dict[str, Any]:
    """The content of result.json; the test split is read here, once.

    Args:
        prepared: The run's network, data and problem.
        networks: ``base``, ``pruned`` and, where there was fine-tuning, ``finetuned``.
        best: The strategy that is delivered.
        loop: The search that found it.
        exports: What was exported.
    """
    strategy = best.outcome.strategy
    budgets = _budgets(prepared, best.outcome)
    return {
        "data": prepared.data.name,
        **_stages(prepared, networks, best.outcome),
        "budget": min(budgets, key=lambda b: b["ratio"], default=None),
        "budgets": budgets,
        "search": _search(prepared, best, loop),
        "strategy": dict(zip(strategy.names, strategy.ratios, strict=True)),
        "whole": [{"name": w.name, "reason": w.reason} for w in prepared.graph.whole],
        "exports": [_export(export) for export in exports],
        "latency_batch": prepared.settings.latency.batch,
        "machine": machine(prepared.settings.device),
    }


def _stages(prepared: Prepared, networks: Mapping[str, nn.Module], outcome: Outcome) -> dict[str, Any]:
    settings, data = prepared.settings, prepared.data
    name, split = ("search", data.search) if data.test is None else ("test", data.test)
    images, labels = prepared.images(split), split.labels.to(settings.device)
    example = prepared.images(data.search, settings.latency.batch)
    latency = measure(networks, example, repeats=settings.latency.repeats) if settings.latency.repeats else {}
    whole = prepared.problem.cost([0] * len(prepared.problem.grids))
    stages: dict[str, Any] = {"base": None, "pruned": None, "finetuned": None}
    for stage, network in networks.items():
        costs = whole if stage == "base" else outcome.costs
        stages[stage] = {
            "accuracy": accuracy(network, images, labels),
            **{cost: int(value) for cost, value in costs.items()},
            "latency_ms": latency.get(stage),
            "split": name,
        }
    return stages


def _budgets(prepared: Prepared, outcome: Outcome) -> list[dict[str, Any]]:
    return [
        {
            "cost": budget.cost.name,
            "ratio": budget.ratio,
            "limit": budget.limit,
            "value": budget.cost(outcome.strategy.removed),
            "met": budget.met(outcome.strategy.removed),
        }
        for budget in prepared.problem.budgets
    ]


def _search(prepared: Prepared, best: Scored, loop: Loop) -> dict[str, Any]:
    agent = prepared.settings.agent
    return {
        "agent": agent.name,
        "episodes": loop.episodes,
        "evaluations": loop.evaluations,
        "cache_hits": loop.cache_hits,
        "seconds": round(loop.seconds, 2),
        "seed": prepared.settings.seed,
        "best_reward": best.reward,
        "search_accuracy": best.outcome.accuracy,
        "repair": best.outcome.repair,
        "warmup": getattr(agent, "warmup_episodes", 0),
    }


def _export(export: Exported) -> dict[str, Any]:
    return {
        "format": export.format,
        "path": export.path.name,
        "bytes": export.bytes,
        "max_difference": export.max_difference,
        "error": export.error,
    }


def machine(device: str) -> dict[str, Any]:
    """The machine and versions, for the record."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file in one move, so that a kill leaves the old one or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
