"""A run from the trained network to the report: search, apply, fine-tune, export, measure, write down."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agents.base import SearchTask
from amc_env.budget import Budget, Problem
from amc_env.costs import Macs, Params
from amc_env.encoding import Encoder, describe
from amc_env.env import EnvHandle, PruningEnv
from amc_env.errors import UserError
from amc_env.evaluator import Evaluator, Scorer, accuracy
from amc_env.latency import measure
from amc_env.layers import LayerGraph
from amc_env.pruning.candidate import Candidates, Keeps
from amc_env.pruning.criteria import rank
from amc_env.pruning.repair import BatchNorm, Both, LeastSquares, NoRepair, Repair, Sequential
from amc_env.pruning.topology import Topology
from search.data import Data, Split
from search.export import check_formats, export_all
from search.journal import Journal
from search.loop import Episode, Loop, Scored
from search.progress import Progress, SearchStatus
from search.settings import RepairSettings, Settings
from search.training import finetune, training_batches

log = logging.getLogger(__name__)

_MAY_GROW = ("config.search.episodes",)


@dataclass(frozen=True)
class Context:
    """Where a run writes, and what it is called.

    Attributes:
        folder: The run folder.
        track: Called with metrics by slash name and their step (episode or epoch).
        model: The model's name.
        config: The resolved configuration, for the journal's header.
        command: The command that started the run.
        begin: Called once, when the folder is ours and nothing has been scored yet.
    """

    folder: Path
    track: Callable[[Mapping[str, float], int], None]
    model: str = "model"
    config: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    begin: Callable[[], object] = lambda: None


@dataclass(frozen=True, eq=False)
class Prepared:
    """A network and data made ready for a search; nothing has been scored yet."""

    model: nn.Module
    data: Data
    graph: LayerGraph
    problem: Problem
    settings: Settings

    def images(self, split: Split, count: int | None = None) -> Tensor:
        """Normalised images of a split on the device, the first ``count`` of them."""
        chosen = split.images if count is None else split.images[:count]
        return self.data.normalise(chosen.to(self.settings.device))


@dataclass(frozen=True, eq=False)
class Finished:
    """What a run ends with.

    Attributes:
        model: The small network, fine-tuned where that was asked for.
        keeps: What stayed of the original's channels.
        strategy: The pruning ratio of each decision.
        result: The content of result.json.
    """

    model: nn.Module
    keeps: Keeps
    strategy: dict[str, float]
    result: dict[str, Any]


def check(settings: Settings) -> None:
    """Finds out whether this machine can do what is asked.

    Raises:
        UserError: The device or an export format is unknown, or not there.
    """
    check_formats(settings.export)
    _check_device(settings.device)


def prepare(model: nn.Module, data: Data, settings: Settings) -> Prepared:
    """Traces the network and poses the problem; mistakes that can be found without scoring are found here.

    Raises:
        UserError: The device is missing, weights are not finite, labels do not fit the outputs, nothing can
            be pruned, or a budget is out of reach.
    """
    check(settings)
    bad = [name for name, value in model.state_dict().items() if not torch.isfinite(value).all()]
    if bad:
        raise UserError(f"weights are not finite (NaN or infinity) in {', '.join(bad[:8])}")
    model = model.to(settings.device).eval()
    example = data.normalise(data.search.images[:2].to(settings.device))
    graph = LayerGraph.trace(model, example)
    with torch.no_grad():
        outputs = model(example)
    if outputs.ndim != 2 or outputs.shape[1] < len(data.classes):
        raise UserError(
            f"the network's output has shape {tuple(outputs.shape)}; one logit for each of the "
            f"{len(data.classes)} classes of {data.name} is needed"
        )
    graph, grids = settings.granularity.decisions(graph)
    if not grids:
        raise UserError(
            f"nothing is left to decide: {'; '.join(f'{w.name}: {w.reason}' for w in graph.whole[:8])}"
        )
    costs = {"macs": Macs(graph), "params": Params(graph)}
    budgets = [
        Budget.of(costs[b.cost], len(grids), ratio=None if b.limit else b.ratio, limit=b.limit)
        for b in settings.budgets
    ]
    return Prepared(model, data, graph, Problem(grids, list(costs.values()), budgets), settings)


def _check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device={device} cannot be used here ({reason}); use device=cpu") from error


def _announce(prepared: Prepared) -> None:
    problem = prepared.problem
    log.info(
        "%d decisions over %d layers; left whole: %d",
        len(problem.grids),
        len(prepared.graph.layers),
        len(prepared.graph.whole),
    )
    for reason in dict.fromkeys(w.reason for w in prepared.graph.whole):
        names = [w.name for w in prepared.graph.whole if w.reason == reason]
        log.info("  %s: %s", ", ".join(names), reason)
    for cost in problem.costs:
        whole = cost([0] * len(problem.grids))
        log.info(
            "%s: %s, least reachable %.1f%%", cost.name, f"{whole:,.0f}", 100 * problem.least_ratio(cost)
        )


def _repairs(prepared: Prepared, candidates: Candidates) -> dict[str, Callable[[], Repair]]:
    """How to make each repair; made when first asked for, since calibration takes time."""
    settings: RepairSettings = prepared.settings.repair
    topology = Topology.of(candidates.original)
    train = prepared.data.train

    def fitted(kind: type[LeastSquares] | type[Sequential]) -> Repair:
        return kind(
            candidates,
            topology,
            prepared.images(train, settings.images),
            per_image=settings.per_image,
            seed=prepared.settings.seed,
            ridge=settings.ridge,
        )

    def norms() -> Repair:
        return BatchNorm(prepared.images(train, settings.norm_images))

    return {
        "none": NoRepair,
        "least_squares": partial(fitted, LeastSquares),
        "batch_norm": norms,
        "both": lambda: Both("both", (fitted(LeastSquares), norms())),
        "sequential": partial(fitted, Sequential),
    }


def make_evaluator(prepared: Prepared, memo: Journal | None = None) -> Evaluator:
    """The evaluator that judges every policy of this run."""
    settings = prepared.settings
    orders = rank(settings.criterion.scores(prepared.model, prepared.graph))
    candidates = Candidates(prepared.model, prepared.graph, orders)
    scorer = Scorer(
        prepared.model,
        prepared.images(prepared.data.search),
        prepared.data.search.labels.to(settings.device),
        batch_size=settings.scoring.batch_size,
        channels_last=settings.scoring.channels_last,
    )
    repairs = _repairs(prepared, candidates)
    return Evaluator(candidates, prepared.problem, scorer, repairs, settings.repair.name, memo)


def _header(prepared: Prepared, context: Context) -> dict[str, Any]:
    """What evaluations depend on."""
    return {
        "config": dict(context.config),
        "weights": _fingerprint(prepared.model),
        "data": prepared.data.fingerprint,
        "threads": torch.get_num_threads(),
        "channels_last": prepared.settings.scoring.channels_last,
        "versions": {name: version(name) for name in ("torch", "numpy", "gymnasium", "stable-baselines3")},
    }


def _fingerprint(model: nn.Module) -> str:
    """Short SHA-256 of all weights."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def search(prepared: Prepared, context: Context, progress: Progress) -> tuple[Scored, Loop]:
    """Runs the agent; what earlier runs in the folder have scored is read back."""
    settings = prepared.settings
    latest: dict[str, float] = {}
    macs = prepared.problem.cost([0] * len(prepared.problem.grids))["macs"]

    def on_episode(episode: Episode) -> None:
        outcome, best = episode.scored.outcome, episode.best
        progress.episode(
            SearchStatus(
                done=episode.number,
                reward=episode.scored.reward,
                best_reward=best.reward,
                best_accuracy=best.outcome.accuracy,
                best_cost_ratio=best.outcome.costs["macs"] / macs,
                evaluations=episode.evaluations,
                cache_hits=episode.cache_hits,
            )
        )
        metrics = {
            "episode/reward": episode.scored.reward,
            "episode/accuracy": outcome.accuracy,
            "episode/macs_ratio": outcome.costs["macs"] / macs,
            "best/reward": best.reward,
            "best/accuracy": best.outcome.accuracy,
        }
        context.track(metrics | latest, episode.number)

    header = _header(prepared, context)
    with Journal(context.folder, header, prepared.problem, may_grow=_MAY_GROW) as journal:
        if journal.replayed:
            log.info("going on with %d evaluations of %s", journal.replayed, context.folder)
        evaluator = make_evaluator(prepared, journal)
        loop = Loop(evaluator, settings.reward, on_episode)
        context.begin()
        encoder = Encoder(describe(prepared.graph, prepared.problem.grids), prepared.problem)
        handle = EnvHandle(
            prepared.problem,
            encoder,
            loop.outcome,
            settings.reward,
            enforce_budget=settings.enforce_budget,
            fill_budget=settings.fill_budget,
        )
        settings.agent.search(
            SearchTask(
                problem=prepared.problem,
                env=PruningEnv(handle),
                score=loop.score,
                episodes=settings.episodes,
                seed=settings.seed,
                on_update=latest.update,
            )
        )
        best = loop.best(settings.finalists.count, settings.finalists.repair)
    return best, loop


def run(model: nn.Module, data: Data, settings: Settings, context: Context) -> Finished:
    """The main job, end to end.

    Args:
        model: The trained network.
        data: Training, search and (where there is one) test split.
        settings: The run's settings.
        context: Folder, tracker and names.

    Returns:
        The small network, its strategy and the content of result.json. The folder then holds all the rest.
    """
    prepared = prepare(model, data, settings)
    _announce(prepared)
    with Progress(episodes=settings.episodes, epochs=settings.finetune.epochs) as progress:
        best, loop = search(prepared, context, progress)
        write_json(context.folder / "strategy.json", best.outcome.strategy.to_json())
        pruned, keeps = loop.evaluator.network(best.outcome)
        stages = {"base": prepared.model, "pruned": pruned}
        if settings.finetune.epochs:
            stages["finetuned"] = _finetuned(prepared, pruned, context, progress)
    small = stages.get("finetuned", pruned)
    exports = _exports(prepared, small, keeps, context)
    result = _result(prepared, context, stages, best, loop)
    result["exports"] = exports
    write_json(context.folder / "result.json", result)
    return Finished(small, keeps, result["strategy"], result)


def _finetuned(prepared: Prepared, pruned: nn.Module, context: Context, progress: Progress) -> nn.Module:
    settings = prepared.settings
    network = copy.deepcopy(pruned)

    def on_epoch(epoch: int, loss: float, lr: float, seconds: float) -> None:
        progress.epoch(epoch, loss)
        context.track({"finetune/loss": loss, "finetune/lr": lr}, epoch)

    chosen = settings.finetune
    finetune(
        network,
        training_batches(prepared.data, chosen.batch_size, settings.seed, settings.device),
        epochs=chosen.epochs,
        lr=chosen.lr_fraction * settings.original_lr,
        momentum=chosen.momentum,
        weight_decay=chosen.weight_decay,
        seed=settings.seed,
        device=settings.device,
        on_epoch=on_epoch,
    )
    return network.eval()


def _exports(prepared: Prepared, small: nn.Module, keeps: Keeps, context: Context) -> list[dict[str, Any]]:
    example = prepared.images(prepared.data.search, 4)
    done = export_all(
        small,
        keeps,
        example,
        context.folder,
        prepared.settings.export,
        context.model,
        original=prepared.model,
    )
    return [
        {
            "format": e.format,
            "path": e.path.name,
            "bytes": e.bytes,
            "max_difference": e.max_difference,
            "error": e.error,
        }
        for e in done
    ]


def _result(
    prepared: Prepared, context: Context, stages: Mapping[str, nn.Module], best: Scored, loop: Loop
) -> dict[str, Any]:
    settings, problem = prepared.settings, prepared.problem
    outcome = best.outcome
    nothing = [0] * len(problem.grids)
    costs = {"base": problem.cost(nothing), "pruned": dict(outcome.costs), "finetuned": dict(outcome.costs)}
    split_name = "search" if prepared.data.test is None else "test"
    split = prepared.data.search if prepared.data.test is None else prepared.data.test
    images, labels = prepared.images(split), split.labels.to(settings.device)
    example = prepared.images(prepared.data.search, settings.latency.batch)
    latency = measure(stages, example, repeats=settings.latency.repeats) if settings.latency.repeats else {}
    sizes: dict[str, Any] = {"pruned": None, "finetuned": None}
    for name, network in stages.items():
        sizes[name] = {
            "accuracy": accuracy(network, images, labels),
            **{key: int(value) for key, value in costs[name].items()},
            "latency_ms": latency.get(name),
            "split": split_name,
        }
    budgets = [
        {
            "cost": b.cost.name,
            "ratio": b.ratio,
            "limit": b.limit,
            "value": b.cost(outcome.strategy.removed),
            "met": outcome.met,
        }
        for b in problem.budgets
    ]
    return {
        "model": context.model,
        "data": prepared.data.name,
        **sizes,
        "budget": min(budgets, key=lambda b: b["ratio"], default=None),
        "budgets": budgets,
        "search": {
            "agent": settings.agent.name,
            "episodes": loop.episodes,
            "evaluations": loop.evaluations,
            "cache_hits": loop.cache_hits,
            "seconds": round(loop.seconds, 2),
            "seed": settings.seed,
            "best_reward": best.reward,
            "search_accuracy": outcome.accuracy,
            "repair": outcome.repair,
            "warmup": getattr(settings.agent, "warmup_episodes", 0),
        },
        "strategy": dict(zip(outcome.strategy.names, outcome.strategy.ratios, strict=True)),
        "whole": [{"name": w.name, "reason": w.reason} for w in prepared.graph.whole],
        "latency_batch": settings.latency.batch,
        "machine": machine(settings.device),
        "command": context.command,
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
