"""The figures of a run: what goes into result.json and strategy.json."""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amc_env.errors import UserError
from amc_env.evaluator import ORIGINAL, Outcome, accuracy
from amc_env.latency import Timing, measure, processor
from search import files
from search.data import Split
from search.loop import Loop, Scored
from search.output.export import Exported
from search.output.run_result import BudgetFigures, NetworkFigures, RunResult, SearchFigures, SkippedLayer
from search.ranking import Prepared
from search.settings import StorageBudget
from search.sparsity import granularity_of, masked_figures
from search.stages import chain

log = logging.getLogger(__name__)


def strategy_json(prepared: Prepared, outcome: Outcome) -> dict[str, Any]:
    """The content of strategy.json: counts, granularity, criterion and, but for the original, the weights they were cut from.

    Those are named as the chain that led to them: ``["original", "stage 1 (0.5)"]``.
    """
    settings = prepared.settings
    made = {"granularity": settings.granularity.name, "criterion": settings.criterion.name}
    return outcome.strategy.to_json() | made | _start(prepared, outcome)


def _start(prepared: Prepared, outcome: Outcome) -> dict[str, Any]:
    return {"start": chain(prepared.settings, outcome.start)} if outcome.start != ORIGINAL else {}


def result_of(
    prepared: Prepared,
    networks: Mapping[str, nn.Module],
    best: Scored,
    loop: Loop,
    exports: Sequence[Exported],
) -> RunResult:
    """The run's result; the test split is read here, once.

    Args:
        prepared: The run's network, data and problem.
        networks: ``base``, ``pruned`` and, where there was fine-tuning, ``finetuned``.
        best: The strategy that is delivered.
        loop: The search that found it.
        exports: What was exported.
    """
    settings, strategy = prepared.settings, best.outcome.strategy
    figures = _networks(prepared, networks, best.outcome)
    return RunResult(
        data=prepared.data.name,
        granularity=granularity_of(settings.granularity),
        base=figures["base"],
        pruned=figures["pruned"],
        finetuned=figures.get("finetuned"),
        budgets=budget_figures(prepared, strategy.removed),
        search=_search(prepared, best, loop),
        strategy=dict(zip(strategy.names, strategy.ratios, strict=True)),
        masked=masked_figures(prepared, networks.get("finetuned", networks["pruned"]), strategy),
        skipped=tuple(SkippedLayer(layer.name, layer.reason) for layer in prepared.graph.whole),
        exports=tuple(exports),
        latency_batch=settings.latency.batch,
        latency_runtime=settings.latency.runtime,
        latency_threads=settings.latency.threads or torch.get_num_threads(),
        machine=machine(settings.device),
    )


def _networks(
    prepared: Prepared, networks: Mapping[str, nn.Module], outcome: Outcome
) -> dict[str, NetworkFigures]:
    data = prepared.data
    name, split = ("search", data.search) if data.test is None else ("test", data.test)
    latency = _latency(prepared, networks)
    original = prepared.problem.cost([0] * len(prepared.problem.grids))
    dense = {f"dense_{cost}": round(original[cost]) for cost in ("macs", "params") if prepared.masked}
    figures = {}
    for stage, network in networks.items():
        costs = original if stage == "base" else outcome.costs
        rounded = {c: round(v, 4) if c == "latency" else round(v) for c, v in costs.items()}
        timing = latency.get(stage)
        figures[stage] = NetworkFigures(
            accuracy=_accuracy(prepared, network, split),
            split=name,
            costs=rounded | dense,
            latency_ms=timing.median_ms if timing else None,
            latency_spread=timing.spread if timing else None,
        )
    return figures


def _latency(prepared: Prepared, networks: Mapping[str, nn.Module]) -> dict[str, Timing]:
    """Empty where it is left out, or where the runtime cannot run such networks, which does not end the run."""
    wanted = prepared.settings.latency
    if not wanted.repeats:
        return {}
    example = prepared.batch(wanted.batch)
    try:
        return measure(
            networks, example, runtime=wanted.runtime, threads=wanted.threads, repeats=wanted.repeats
        )
    except UserError as error:
        log.warning("latency was not measured: %s", error)
        return {}


def _accuracy(prepared: Prepared, network: nn.Module, split: Split) -> float:
    """Of a split that may be larger than the memory: its images are normalised batch by batch."""
    device = prepared.settings.device

    def logits(pixels: Tensor) -> Tensor:
        found: Tensor = network(prepared.data.normalise(pixels.to(device)))
        return found

    return accuracy(logits, split.images, split.labels.to(device))


def budget_figures(prepared: Prepared, removed: Sequence[int]) -> tuple[BudgetFigures, ...]:
    """Every budget of the run, and what a strategy needs of it."""
    formats = {b.cost: b.format for b in prepared.settings.budgets if isinstance(b, StorageBudget)}
    return tuple(
        BudgetFigures(
            cost=budget.cost.name,
            ratio=budget.ratio,
            limit=budget.limit,
            value=budget.cost(removed),
            met=budget.met(removed),
            format=formats.get(budget.cost.name),
        )
        for budget in prepared.problem.budgets
    )


def _search(prepared: Prepared, best: Scored, loop: Loop) -> SearchFigures:
    settings, rounds = prepared.settings, prepared.settings.schedule.rounds
    return SearchFigures(
        agent=settings.agent.name,
        episodes=loop.episodes,
        evaluations=loop.evaluations,
        cache_hits=loop.cache_hits,
        seconds=round(loop.seconds, 2),
        seed=settings.seed,
        best_reward=best.reward,
        search_accuracy=best.outcome.accuracy,
        precision=settings.scoring.precision,
        repair=best.outcome.repair,
        warmup=getattr(settings.agent, "warmup_episodes", 0),
        start=tuple(_start(prepared, best.outcome).get("start", ())),
        stages=tuple(settings.stages),
        stage_episodes=settings.episodes if settings.stages else None,
        schedule=settings.schedule.shape if rounds > 1 else None,
        rounds=rounds if rounds > 1 else None,
    )


def machine(device: str) -> dict[str, Any]:
    """The machine and versions, for the record."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file in one step."""
    files.write(path, json.dumps(content, indent=2) + "\n")
