"""A run from the trained network to the report: search, apply, fine-tune, export, measure, write down."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn

from agents.base import SearchTask
from amc_env.encoding import Encoder, describe
from amc_env.env import EnvHandle, PruningVectorEnv
from amc_env.evaluation.pruner import ORIGINAL, BaseWeights
from amc_env.graph.surgery import Keeps
from amc_env.space import Trial
from search.data.base import Data
from search.output.export import Small, export_all
from search.output.formatting import cost_name
from search.output.progress import Progress, SearchStatus
from search.output.run_result import RunResult
from search.settings import Settings
from search.study.evaluation import make_evaluator, start_of
from search.study.journal import Journal
from search.study.problem import PruningProblem, announce
from search.study.results import result_of, strategy_json, write_json
from search.study.stages import Stage, adopted, first_start, forget, next_start, stage_of
from search.study.study import Study
from search.study.tuning import Tuner, finetuned, penalty_of

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
        result: The content of result.json.
    """

    model: nn.Module
    keeps: Keeps
    result: RunResult


def search(
    stage: Stage, start: BaseWeights, context: Context, progress: Progress, journal: Journal
) -> tuple[Trial, Study]:
    """Runs the agent; what earlier runs in the folder have scored is read back from the journal."""
    prepared, settings = stage.prepared, stage.prepared.settings
    latest: dict[str, float] = {}
    evaluator = make_evaluator(prepared, journal, start)
    before = (stage.number - 1) * settings.episodes
    show = _watcher(prepared, context, progress, latest, before)
    study = Study(
        evaluator,
        lambda trial: show(trial, study),
        lambda trial, number: adopted(prepared, evaluator, trial, number, context.folder),
    )
    task = SearchTask(
        problem=prepared.problem,
        envs=partial(PruningVectorEnv, env_handle(prepared, study)),
        score=study.score,
        episodes=settings.episodes,
        seed=settings.seed,
        on_update=latest.update,
        adopt=study.adopt,
    )
    settings.agent.search(task)
    return study.best(settings.rescored, settings.finalists.repair), study


def env_handle(prepared: PruningProblem, study: Study) -> EnvHandle:
    """What the environments of a search refer to; their last step ends in ``study``."""
    settings, problem = prepared.settings, prepared.problem
    return EnvHandle(
        problem,
        Encoder(describe(prepared.graph, problem.grids), problem),
        study.score_one,
        settings.reward,
        enforce_budget=settings.enforce_budget,
        fill_budget=settings.fill_budget,
        score_all=study.score_all,
    )


def _watcher(
    prepared: PruningProblem, context: Context, progress: Progress, latest: Mapping[str, float], before: int
) -> Callable[[Trial, Study], None]:
    """What is shown and tracked of every episode.

    Args:
        prepared: The run, with the stage's budget.
        context: Tracks.
        progress: Shows.
        latest: The agent's own figures.
        before: Episodes of earlier stages.
    """
    budgets = prepared.problem.budgets
    cost = budgets[0].cost.name if budgets else "macs"
    whole = prepared.problem.cost([0] * len(prepared.problem.grids))

    def show(trial: Trial, study: Study) -> None:
        best, number = study.best_so_far, before + study.episodes
        assert best is not None
        progress.episode(
            SearchStatus(
                done=number,
                reward=trial.reward,
                best_reward=best.reward,
                best_accuracy=best.score,
                best_cost_ratio=best.costs[cost] / whole[cost],
                cost=cost_name(cost, bool(prepared.masked)),
                evaluations=study.evaluations,
                cache_hits=study.cache_hits,
            )
        )
        metrics = {
            "episode/reward": trial.reward,
            "episode/accuracy": trial.score,
            **{f"episode/{name}_ratio": trial.costs[name] / whole[name] for name in whole},
            "best/reward": best.reward,
            "best/accuracy": best.score,
        }
        context.track({**metrics, **latest}, number)

    return show


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
    prepared = PruningProblem.build(model, data, settings)
    announce(prepared)
    refuse_early(prepared)
    head = header(prepared, context)
    # The journal's lock is held to the end: a second run in the folder would write over this one's files.
    with Journal(context.folder, head, prepared.problem, may_grow=_MAY_GROW) as journal:
        context.begin()
        return _run(prepared, context, journal)


def refuse_early(prepared: PruningProblem) -> None:
    """Finds what cannot be done before anything is trained or scored.

    Raises:
        UserError: The agent cannot do the search, a stage is out of reach, or the criterion or the regulariser
            does not fit the network.
    """
    settings = prepared.settings
    settings.agent.check(prepared.problem, settings.episodes)
    start = start_of(prepared, ORIGINAL, prepared.builder)
    if settings.stages:
        stage_of(prepared, len(settings.stages), start)
    if settings.regularization.before_epochs or settings.regularization.during:
        penalty_of(prepared, prepared.model)


def _run(prepared: PruningProblem, context: Context, journal: Journal) -> Finished:
    settings = prepared.settings
    if journal.replayed:
        log.info("going on with %d evaluations of %s", journal.replayed, context.folder)
    else:
        forget(context.folder)
    planned = settings.agent.planned(prepared.problem, settings.episodes) * max(1, len(settings.stages))
    with Progress(episodes=planned, epochs=settings.all_epochs) as progress:
        tune = Tuner(prepared, _epoch_watcher(context, progress))
        last, best, study = _searched(prepared, context, progress, journal, tune)
        write_json(context.folder / "strategy.json", strategy_json(last, best))
        pruned = study.evaluator.network(best)
        networks = {"base": prepared.model, "pruned": pruned.network}
        if settings.finetune.epochs:
            progress.start("fine-tune")
            pruned = finetuned(last, study.evaluator, best, tune)
            networks["finetuned"] = pruned.network
    example = prepared.images(prepared.data.search, 4)
    small = Small(pruned.network, example, pruned.keeps, context.model, prepared.model)
    exports = export_all(small, context.folder, settings.export)
    result = replace(
        result_of(last, networks, best, study, exports),
        model=context.model,
        command=context.command,
        resumed=journal.replayed > 0,
    )
    result.write(context.folder)
    return Finished(pruned.network, pruned.keeps, result)


def _searched(
    prepared: PruningProblem, context: Context, progress: Progress, journal: Journal, tune: Tuner
) -> tuple[PruningProblem, Trial, Study]:
    """All searches of a run; the last stage with its best strategy and the study that found it."""
    start = first_start(prepared, context.folder, tune)
    for number in count(1):
        stage = stage_of(prepared, number, start)
        progress.start("search")
        best, study = search(stage, start, context, progress, journal)
        if stage.last:
            break
        start = next_start(stage, study.evaluator, best, context.folder, tune)
    return stage.prepared, best, study


def _epoch_watcher(context: Context, progress: Progress) -> Callable[[int, float, float], None]:
    def on_epoch(epoch: int, loss: float, lr: float) -> None:
        progress.epoch(epoch, loss)
        context.track({"finetune/loss": loss, "finetune/lr": lr}, epoch)

    return on_epoch


def header(prepared: PruningProblem, context: Context) -> dict[str, Any]:
    """What evaluations depend on."""
    return {
        "config": dict(context.config),
        "weights": _fingerprint(prepared.model),
        "data": prepared.data.fingerprint,
        "threads": prepared.settings.scoring.threads or torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "numpy", "gymnasium", "stable-baselines3")},
        **_training(prepared.settings),
        **_table(prepared),
    }


def _table(prepared: PruningProblem) -> dict[str, Any]:
    """Two predictions, which stand for the latency table that they are made from."""
    problem = prepared.problem
    ends = [0] * len(problem.grids), problem.most
    return {cost.name: [cost(end) for end in ends] for cost in problem.costs if cost.name == "latency"}


def _training(settings: Settings) -> dict[str, Any]:
    """What evaluations depend on further where the weights that they begin with are trained within the run."""
    found: dict[str, Any] = {}
    if settings.trains_between or settings.short_term_steps:  # rates are fractions of it
        found["original_lr"] = settings.original_lr
    if settings.trains_between:
        found |= {"training": asdict(settings.finetune), "regularization": repr(settings.regularization)}
    if settings.stages:  # a stage begins with the best of the one before: more episodes may find another
        found["stages"] = {
            "shares": list(settings.stages),
            "episodes": settings.episodes,
            "finalists": asdict(settings.finalists),
            "schedule": asdict(settings.schedule),
        }
    return found


def _fingerprint(model: nn.Module) -> str:
    """Short SHA-256 of all weights."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
