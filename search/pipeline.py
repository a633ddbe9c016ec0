"""A run from the trained network to the report: search, apply, fine-tune, export, measure, write down."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from agents.base import SearchTask
from amc_env.encoding import Encoder, describe
from amc_env.env import EnvHandle, PruningEnv
from amc_env.pruning.candidate import Keeps
from search.data import Data
from search.export import export_all
from search.journal import Journal
from search.loop import Episode, Loop, Scored
from search.preparation import Prepared, announce, make_evaluator, prepare
from search.progress import Progress, SearchStatus
from search.results import result_of, write_json
from search.settings import Settings
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


def search(prepared: Prepared, context: Context, progress: Progress, journal: Journal) -> tuple[Scored, Loop]:
    """Runs the agent; what earlier runs in the folder have scored is read back from the journal."""
    settings = prepared.settings
    latest: dict[str, float] = {}
    if journal.replayed:
        log.info("going on with %d evaluations of %s", journal.replayed, context.folder)
    evaluator = make_evaluator(prepared, journal)
    loop = Loop(evaluator, settings.reward, _watcher(prepared, context, progress, latest))
    settings.agent.search(
        SearchTask(
            problem=prepared.problem,
            env=PruningEnv(env_handle(prepared, loop)),
            score=loop.score,
            episodes=settings.episodes,
            seed=settings.seed,
            on_update=latest.update,
        )
    )
    return loop.best(settings.finalists.count, settings.finalists.repair), loop


def env_handle(prepared: Prepared, loop: Loop) -> EnvHandle:
    """What the environment of a search refers to; its last step ends in ``loop``."""
    settings, problem = prepared.settings, prepared.problem
    return EnvHandle(
        problem,
        Encoder(describe(prepared.graph, problem.grids), problem),
        loop.outcome,
        settings.reward,
        enforce_budget=settings.enforce_budget,
        fill_budget=settings.fill_budget,
    )


def _watcher(
    prepared: Prepared, context: Context, progress: Progress, latest: Mapping[str, float]
) -> Callable[[Episode], None]:
    """What is shown and tracked of every episode; ``latest`` holds the agent's own figures."""
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
        context.track({**metrics, **latest}, episode.number)

    return on_episode


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
    announce(prepared)
    header = _header(prepared, context)
    # The journal's lock is held to the end: a second run in the folder would write over this one's files.
    with Journal(context.folder, header, prepared.problem, may_grow=_MAY_GROW) as journal:
        context.begin()
        return _run(prepared, context, journal)


def _run(prepared: Prepared, context: Context, journal: Journal) -> Finished:
    settings = prepared.settings
    with Progress(episodes=settings.episodes, epochs=settings.finetune.epochs) as progress:
        progress.start("search")
        best, loop = search(prepared, context, progress, journal)
        write_json(context.folder / "strategy.json", best.outcome.strategy.to_json())
        pruned, keeps = loop.evaluator.network(best.outcome)
        networks = {"base": prepared.model, "pruned": pruned}
        if settings.finetune.epochs:
            progress.start("fine-tune")
            networks["finetuned"] = _finetuned(prepared, pruned, context, progress)
    small = networks.get("finetuned", pruned)
    example = prepared.images(prepared.data.search, 4)
    exports = export_all(
        small, keeps, example, context.folder, settings.export, context.model, original=prepared.model
    )
    result = {"model": context.model, "command": context.command}
    result |= result_of(prepared, networks, best, loop, exports)
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


def _header(prepared: Prepared, context: Context) -> dict[str, Any]:
    """What evaluations depend on."""
    return {
        "config": dict(context.config),
        "weights": _fingerprint(prepared.model),
        "data": prepared.data.fingerprint,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "numpy", "gymnasium", "stable-baselines3")},
    }


def _fingerprint(model: nn.Module) -> str:
    """Short SHA-256 of all weights."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
