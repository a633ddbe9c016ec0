"""What a run writes down of itself: result.json and how it is made."""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from amc_env import sparse
from amc_env.costs.latency import Timing, measure, processor
from amc_env.costs.storage import Storage, params_beside_weights
from amc_env.errors import UserError
from amc_env.evaluation.evaluator import Outcome
from amc_env.evaluation.pruner import ORIGINAL
from amc_env.evaluation.scorer import accuracy
from amc_env.pruning.granularity import NM, Channel, FineGrained, Granularity, Kernel, Masked, Vector
from amc_env.space import Strategy
from search.data.base import Split
from search.export import Exported
from search.settings import StorageBudget
from search.study.problem import Prepared, Ranked
from search.study.stages import chain
from search.study.study import Loop, Scored

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
        "granularity": granularity_of(prepared.settings.granularity),
        **_stages(prepared, networks, best.outcome),
        "budget": min(budgets, key=lambda b: b["ratio"], default=None),
        "budgets": budgets,
        "search": _search(prepared, best, loop),
        "strategy": dict(zip(strategy.names, strategy.ratios, strict=True)),
        **sparsity_of(prepared, networks.get("finetuned", networks["pruned"]), strategy),
        "skipped": [{"name": w.name, "reason": w.reason} for w in prepared.graph.skipped],
        "exports": [_export(export) for export in exports],
        "latency_batch": prepared.settings.latency.batch,
        "latency_runtime": prepared.settings.latency.runtime,
        "latency_threads": prepared.settings.latency.threads or torch.get_num_threads(),
        "machine": machine(prepared.settings.device),
    }


def _stages(prepared: Prepared, networks: Mapping[str, nn.Module], outcome: Outcome) -> dict[str, Any]:
    data = prepared.data
    name, split = ("search", data.search) if data.test is None else ("test", data.test)
    latency = _latency(prepared, networks)
    whole = prepared.problem.cost([0] * len(prepared.problem.grids))
    dense = {f"dense_{cost}": round(whole[cost]) for cost in ("macs", "params") if prepared.masked}
    stages: dict[str, Any] = {"base": None, "pruned": None, "finetuned": None}
    for stage, network in networks.items():
        costs = whole if stage == "base" else outcome.costs
        stages[stage] = {
            "accuracy": _accuracy(prepared, network, split),
            **{cost: round(value, 4) if cost == "latency" else round(value) for cost, value in costs.items()},
            **dense,
            "latency_ms": latency[stage].median_ms if latency else None,
            "latency_spread": latency[stage].spread if latency else None,
            "split": name,
        }
    return stages


def _latency(prepared: Prepared, networks: Mapping[str, nn.Module]) -> dict[str, Timing]:
    """Nothing where it is left out, or where the runtime cannot run such networks: the run is worth more than that."""
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


def _budgets(prepared: Prepared, outcome: Outcome) -> list[dict[str, Any]]:
    formats = {
        b.cost: {"format": b.format} for b in prepared.settings.budgets if isinstance(b, StorageBudget)
    }
    return [
        {
            "cost": budget.cost.name,
            "ratio": budget.ratio,
            "limit": budget.limit,
            "value": budget.cost(outcome.strategy.removed),
            "met": budget.met(outcome.strategy.removed),
            **formats.get(budget.cost.name, {}),
        }
        for budget in prepared.problem.budgets
    ]


def _search(prepared: Prepared, best: Scored, loop: Loop) -> dict[str, Any]:
    agent, settings = prepared.settings.agent, prepared.settings
    more: dict[str, Any] = _start(prepared, best.outcome)
    if settings.stages:  # counts below are those of the last
        more |= {"stages": list(settings.stages), "stage_episodes": settings.episodes}
    if settings.schedule.rounds > 1:
        more |= {"schedule": settings.schedule.shape, "rounds": settings.schedule.rounds}
    return {
        "agent": agent.name,
        "episodes": loop.episodes,
        "evaluations": loop.evaluations,
        "cache_hits": loop.cache_hits,
        "seconds": round(loop.seconds, 2),
        "seed": prepared.settings.seed,
        "best_reward": best.reward,
        "search_accuracy": best.outcome.accuracy,
        "precision": settings.scoring.precision,
        "repair": best.outcome.repair,
        "warmup": getattr(agent, "warmup_episodes", 0),
        **more,
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
        "processor": processor(),
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


def granularity_of(granularity: Granularity) -> dict[str, Any]:
    """What decisions remove units of, for result.json, and which hardware gains by it."""
    known = {"name": granularity.name, "masked": granularity.masked, "speed": granularity.speed}
    if isinstance(granularity, NM):
        return known | {"unit": "weights", "n": granularity.n, "m": granularity.m}
    if isinstance(granularity, Vector):
        return known | {"unit": f"kernel {granularity.axis}s"}
    units = {Channel: "channels", FineGrained: "weights", Kernel: "kernels"}
    return known | {"unit": units.get(type(granularity), "units")}


def sparsity_of(ranked: Ranked, network: nn.Module, strategy: Strategy) -> dict[str, Any]:
    """The entries of result.json for masked weights; nothing where channels are cut.

    Args:
        ranked: The run's decisions.
        network: The masked network.
        strategy: What it was masked by.
    """
    if not ranked.masked:
        return {}
    weights = {name: _weight(network, name) for name in strategy.names}
    layers = {
        name: {"weights": weight.numel(), "nonzero": int(weight.count_nonzero())}
        for name, weight in weights.items()
    }
    found: dict[str, Any] = {"layers": layers, "storage": stored_sizes(ranked, weights, strategy.removed)}
    granularity = ranked.settings.granularity
    if isinstance(granularity, NM):
        chosen = [name for name, decision in strategy.decisions.items() if decision.removed]
        found["pattern"] = _pattern({name: weights[name] for name in chosen}, granularity.n, granularity.m)
    return found


def _weight(network: nn.Module, layer: str) -> Tensor:
    weight = network.get_submodule(layer).weight
    assert isinstance(weight, Tensor)
    return weight.detach().cpu()


def stored_sizes(ranked: Ranked, weights: Mapping[str, Tensor], removed: Sequence[int]) -> dict[str, int]:
    """Bytes of a masked network by format, each layer dense where that is smaller; see `Storage`.

    The zeros are those of ``weights``: after stages or rounds they lie elsewhere than where the search began.

    Args:
        ranked: The run's decisions.
        weights: The weights of their layers.
        removed: Units removed from each.

    Returns:
        ``dense_fp32`` and at as many bits ``csr`` and, for n:m, ``nm``; ``dense_4bit`` and at as many bits ``eie``.
    """
    graph, grids, granularity = ranked.graph, ranked.grids, cast(Masked, ranked.settings.granularity)
    # What is not zero stays longest: so every unit that was kept has a place before those that were removed.
    removal_rank = {
        name: granularity.removal_rank((weight != 0).double(), graph.layer(name))
        for name, weight in weights.items()
    }

    def size(format: str, counts: Sequence[int]) -> int:
        return round(Storage(graph.layers, grids, removal_rank, params_beside_weights(graph), format)(counts))

    nothing = [0] * len(grids)
    sizes = {"dense_fp32": size("csr", nothing), "csr": size("csr", removed)}
    if isinstance(ranked.settings.granularity, NM):
        sizes["nm"] = size("nm", removed)
    return sizes | {"dense_4bit": size("eie", nothing), "eie": size("eie", removed)}


def _pattern(weights: Mapping[str, Tensor], n: int, m: int) -> dict[str, Any]:
    """Whether weights that are to have the n:m pattern have it, packed and unpacked to the bit."""
    holds = all(
        sparse.check(weight, n, m) and torch.equal(sparse.unpack(sparse.pack(weight, n, m)), weight)
        for weight in weights.values()
    )
    return {"n": n, "m": m, "layers": list(weights), "holds": holds}
