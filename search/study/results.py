"""The figures of a run: what goes into result.json and strategy.json."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import repeat
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from amc_env.costs.counts import kept_channels
from amc_env.costs.latency import Latency, Timing, measure, processor, warn_where_busy
from amc_env.costs.storage import Storage, StorageBudget, follows_pattern, params_beside_weights
from amc_env.errors import UserError
from amc_env.evaluation.pruner import ORIGINAL
from amc_env.graph.layers import Layer
from amc_env.pruning.granularity import NM, Channel, FineGrained, Granularity, Kernel, Masked, Vector
from amc_env.space import Strategy, Trial
from search import files
from search.output.export import Exported
from search.output.run_result import (
    BaselineFigures,
    BudgetFigures,
    GranularityFigures,
    LayerFigures,
    LayerRow,
    MaskedFigures,
    NetworkFigures,
    Pattern,
    RunResult,
    SearchFigures,
    SkippedLayer,
)
from search.study.baselines import Beside
from search.study.problem import PruningProblem
from search.study.stages import chain
from search.study.study import Study

log = logging.getLogger(__name__)


def strategy_json(problem: PruningProblem, trial: Trial) -> dict[str, Any]:
    """The content of strategy.json: counts, granularity, criterion and, but for the original, the weights they were cut from.

    Those are named as the chain that led to them: ``["original", "stage 1 (0.5)"]``.
    """
    settings = problem.settings
    made = {"granularity": settings.granularity.name, "criterion": settings.criterion.name}
    return trial.strategy.to_json() | made | _start(problem, trial)


def _start(problem: PruningProblem, trial: Trial) -> dict[str, Any]:
    return {"start": chain(problem.settings, trial.start)} if trial.start != ORIGINAL else {}


def result_of(
    problem: PruningProblem,
    networks: Mapping[str, nn.Module],
    delivered: str,
    best: Trial,
    study: Study,
    exports: Sequence[Exported],
) -> RunResult:
    """The run's result; the test split is read here, once.

    Args:
        problem: The run's network, data and search space.
        networks: ``base``, ``pruned`` and, where there was fine-tuning, ``finetuned``.
        delivered: Which of them is delivered.
        best: The strategy that is delivered.
        study: The search that found it.
        exports: What was exported.
    """
    settings, strategy = problem.settings, best.strategy
    splits = {"search": problem.data.search, "test": problem.data.test}
    figures = _networks(problem, networks, best)
    return RunResult(
        data=problem.data.name,
        granularity=granularity_of(settings.granularity),
        base=figures["base"],
        pruned=figures["pruned"],
        finetuned=figures.get("finetuned"),
        delivered_network=delivered,
        budgets=budget_figures(problem, strategy.removed),
        search=_search(problem, best, study),
        strategy=dict(zip(strategy.names, strategy.ratios, strict=True)),
        shapes=tuple(layer_figures(problem, strategy)),
        images={name: len(part) for name, part in splits.items() if part is not None},
        masked=masked_figures(problem, networks[delivered], strategy),
        skipped=tuple(SkippedLayer(layer.name, layer.reason) for layer in problem.graph.skipped),
        exports=tuple(exports),
        latency_batch=settings.latency.batch,
        latency_runtime=settings.latency.runtime,
        latency_threads=settings.latency.threads or torch.get_num_threads(),
        machine=machine(settings.device),
        metric=settings.task.metric,
    )


def delivered_of(problem: PruningProblem, networks: Mapping[str, nn.Module]) -> str:
    """Which network is delivered: the fine-tuned one, unless that did clearly worse on the search split."""
    if "finetuned" not in networks:
        return "pruned"
    if problem.settings.finetune.keep == "last":
        return "finetuned"
    split = problem.data.search
    before, after = (problem.score(networks[stage], split) for stage in ("pruned", "finetuned"))
    # The standard error of a share of hits, which stands in for that of other scores. Two of them, since the pruned
    # network is the best of many on this split and fine-tuning was not chosen on it.
    error = math.sqrt(max(before * (1 - before), 1 / len(split)) / len(split))
    if after >= before:
        return "finetuned"
    clearly = after < before - 2 * error
    log.warning(
        "fine-tuning lowered the %s on the search split from %.2f%% to %.2f%%: %s",
        problem.settings.task.metric,
        100 * before,
        100 * after,
        "the pruned network is delivered. Lower finetune.lr_fraction or original_lr, train for longer, or set "
        "finetune.keep=last"
        if clearly
        else "that is within two standard errors, and the fine-tuned network is delivered",
    )
    return "pruned" if clearly else "finetuned"


def _networks(
    problem: PruningProblem, networks: Mapping[str, nn.Module], trial: Trial
) -> dict[str, NetworkFigures]:
    data = problem.data
    name, split = ("search", data.search) if data.test is None else ("test", data.test)
    latency = _latency(problem, networks, cut=any(trial.removed) and not problem.masked)
    original = problem.space.cost([0] * len(problem.space.grids))
    dense = {f"dense_{cost}": round(original[cost]) for cost in ("macs", "params") if problem.masked}
    figures = {}
    for stage, network in networks.items():
        costs = original if stage == "base" else trial.costs
        rounded = {c: round(v, 4) if c == "latency" else round(v) for c, v in costs.items()}
        timing = latency.get(stage)
        figures[stage] = NetworkFigures(
            accuracy=problem.score(network, split),
            split=name,
            costs=rounded | dense,
            latency_ms=timing.median_ms if timing else None,
            latency_spread=timing.spread if timing else None,
        )
    return figures


def _latency(problem: PruningProblem, networks: Mapping[str, nn.Module], cut: bool) -> dict[str, Timing]:
    """Measured latency; networks of one architecture are timed once, so that they do not differ by noise.

    All are of one where no channel was cut. Empty where latency is left out, or where the runtime cannot run such
    networks, which does not end the run.
    """
    wanted = problem.settings.latency
    if not wanted.repeats:
        return {}
    alike = {stage: "pruned" if stage != "base" and cut else "base" for stage in networks}
    timed = {stage: networks[stage] for stage in dict.fromkeys(alike.values())}
    example = problem.batch(wanted.batch)
    try:
        found = measure(
            timed, example, runtime=wanted.runtime, threads=wanted.threads, repeats=wanted.repeats
        )
    except UserError as error:
        log.warning("latency was not measured: %s", error)
        return {}
    warn_where_busy(list(found.values()))
    return {stage: found[same] for stage, same in alike.items()}


def budget_figures(problem: PruningProblem, removed: Sequence[int]) -> tuple[BudgetFigures, ...]:
    """Every budget of the run, and what a strategy needs of it."""
    formats = {b.cost: b.format for b in problem.settings.budgets if isinstance(b, StorageBudget)}
    return tuple(
        BudgetFigures(
            cost=budget.cost.name,
            ratio=budget.ratio,
            limit=budget.limit,
            value=budget.cost(removed),
            met=budget.met(removed),
            format=formats.get(budget.cost.name),
        )
        for budget in problem.space.budgets
    )


def baseline_figures(problem: PruningProblem, beside: Sequence[Beside]) -> tuple[BaselineFigures, ...]:
    """What the baselines came to, before fine-tuning; on the split of the final figures, too."""
    split = problem.data.search if problem.data.test is None else problem.data.test
    return tuple(
        BaselineFigures(
            agent=other.name,
            evaluations=other.evaluations,
            reward=other.best.reward,
            search_accuracy=other.best.score,
            accuracy=problem.score(other.evaluator.network(other.best).network, split),
            costs=dict(other.best.costs),
        )
        for other in beside
    )


def layer_figures(problem: PruningProblem, strategy: Strategy) -> Iterator[LayerFigures]:
    """Every layer before and after a strategy, in forward order."""
    if problem.masked:
        for layer in problem.graph.layers:
            decision = strategy.decisions.get(layer.name)
            left = layer.weights * decision.kept // decision.total if decision else layer.weights
            channels = (layer.in_channels, layer.in_channels), (layer.out_channels, layer.out_channels)
            yield _layer(layer, *channels, left)
        return
    sizes, per_unit = kept_channels(problem.graph)
    left_over = sizes - per_unit @ np.array(strategy.removed)
    counts = zip(problem.graph.layers, sizes.tolist(), left_over.tolist(), strict=True)
    for (layer, before, after), ms in zip(counts, _times(problem, strategy), strict=False):
        inputs, outputs = zip(before, after, strict=True)
        per_output = 1 if layer.depthwise else inputs[1] // layer.groups
        yield _layer(layer, inputs, outputs, outputs[1] * per_output * layer.area, ms)


def _times(problem: PruningProblem, strategy: Strategy) -> Iterable[tuple[float, float] | None]:
    """Predicted milliseconds of each layer, before and after; None for each without a latency budget."""
    for cost in problem.space.costs:
        if isinstance(cost, Latency):
            states = [0] * len(strategy.removed), strategy.removed
            return zip(*(cost.by_layer(removed).tolist() for removed in states), strict=True)
    return repeat(None)


def _layer(
    layer: Layer,
    inputs: tuple[int, int],
    outputs: tuple[int, int],
    left: int,
    ms: tuple[float, float] | None = None,
) -> LayerFigures:
    places = 0 if layer.costless else layer.positions
    return LayerFigures(
        layer.name, inputs, outputs, (layer.weights, left), (layer.weights * places, left * places), ms
    )


def _search(problem: PruningProblem, best: Trial, study: Study) -> SearchFigures:
    settings, rounds = problem.settings, problem.settings.schedule.rounds
    return SearchFigures(
        agent=settings.agent.name,
        episodes=study.episodes,
        evaluations=study.evaluations,
        cache_hits=study.cache_hits,
        seconds=round(study.seconds, 2),
        seed=settings.seed,
        best_reward=best.reward,
        search_accuracy=best.score,
        precision=settings.scoring.precision,
        repair=best.repair,
        warmup=getattr(settings.agent, "warmup_episodes", 0),
        start=tuple(_start(problem, best).get("start", ())),
        stages=tuple(settings.stages),
        stage_episodes=settings.episodes if settings.searches and not settings.agent.tunes else None,
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


def granularity_of(granularity: Granularity) -> GranularityFigures:
    """What decisions remove units of, and which hardware gains by it."""
    known = granularity.name, granularity.masked, granularity.speed
    if isinstance(granularity, NM):
        return GranularityFigures(*known, "weights", granularity.n, granularity.m)
    if isinstance(granularity, Vector):
        return GranularityFigures(*known, f"kernel {granularity.axis}s")
    units = {Channel: "channels", FineGrained: "weights", Kernel: "kernels"}
    return GranularityFigures(*known, units.get(type(granularity), "units"))


def masked_figures(ranked: PruningProblem, network: nn.Module, strategy: Strategy) -> MaskedFigures | None:
    """Counts of masked weights; None where channels are cut.

    Args:
        ranked: The run's decisions.
        network: The masked network.
        strategy: What it was masked by.
    """
    if not ranked.masked:
        return None
    weights = {name: _weight(network, name) for name in strategy.names}
    layers = {name: LayerRow(weight.numel(), int(weight.count_nonzero())) for name, weight in weights.items()}
    pattern, granularity = None, ranked.settings.granularity
    if isinstance(granularity, NM):
        chosen = [name for name, decision in strategy.decisions.items() if decision.removed]
        pattern = _pattern({name: weights[name] for name in chosen}, granularity.n, granularity.m)
    return MaskedFigures(layers, stored_sizes(ranked, weights, strategy.removed), pattern)


def _weight(network: nn.Module, layer: str) -> Tensor:
    weight = network.get_submodule(layer).weight
    assert isinstance(weight, Tensor)
    return weight.detach().cpu()


def stored_sizes(
    ranked: PruningProblem, weights: Mapping[str, Tensor], removed: Sequence[int]
) -> dict[str, int]:
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


def _pattern(weights: Mapping[str, Tensor], n: int, m: int) -> Pattern:
    """Whether the pruned weights follow the n:m pattern."""
    holds = all(follows_pattern(weight, n, m) for weight in weights.values())
    return Pattern(n, m, tuple(weights), holds)
