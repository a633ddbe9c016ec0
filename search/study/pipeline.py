"""A run from the trained network to the report: search, apply, fine-tune, export, measure, write down."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import count
from pathlib import Path

from rich.console import Console
from torch import nn

from agents.base import SearchTask
from amc_env.encoding import Encoder, describe
from amc_env.env import EnvHandle, PruningVectorEnv
from amc_env.evaluation.pruner import ORIGINAL, BaseWeights
from amc_env.graph.copying import module_copy
from amc_env.graph.surgery import Keeps
from amc_env.space import Trial
from search import files
from search.data.base import Data
from search.output.export import Small, export_all
from search.output.formatting import cost_name
from search.output.progress import Progress, SearchStatus
from search.output.run_files import CONFIGURATION
from search.output.run_result import RunResult
from search.settings import Settings
from search.study.baselines import compared
from search.study.evaluation import layer_errors_of, make_evaluator, start_of
from search.study.identity import MAY_GROW, identity
from search.study.journal import Journal
from search.study.kept_weights import KeptWeights
from search.study.problem import PruningProblem, announce
from search.study.results import baseline_figures, delivered_of, result_of, strategy_json, write_json
from search.study.stages import Stage, adopted, first_start, next_start, stage_of
from search.study.study import Study
from search.study.tuning import Tuner, finetuned, penalty_of

log = logging.getLogger(__name__)

_TRIED = 0.3
"""Pruning ratio of the network that a step of training is tried on."""


@dataclass(frozen=True)
class Context:
    """Where a run writes, and what it is called.

    Attributes:
        folder: The run folder.
        track: Called with metrics by slash name and their step (episode or epoch).
        model: The model's name.
        command: The command that started the run.
        configuration: The resolved configuration as YAML or JSON text, which is kept in the folder.
        begin: Called once, when the folder is ours and nothing has been scored yet.
        quiet: Whether progress is not shown.
    """

    folder: Path
    track: Callable[[Mapping[str, float], int], None]
    model: str = "model"
    command: str = ""
    configuration: str = ""
    begin: Callable[[], object] = lambda: None
    quiet: bool = False

    def start(self) -> None:
        """Write down the configuration and open the trackers; to be called once the folder is locked."""
        files.write(self.folder / CONFIGURATION, self.configuration)
        self.begin()


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
    problem, settings = stage.problem, stage.problem.settings
    latest: dict[str, float] = {}
    evaluator, kept = make_evaluator(problem, journal, start), KeptWeights(context.folder, journal)
    before = (stage.number - 1) * settings.episodes
    show = _watcher(problem, context, progress, latest, before)
    study = Study(
        evaluator,
        lambda trial: show(trial, study),
        lambda trial, number: adopted(problem, evaluator, trial, number, kept),
    )
    task = SearchTask(
        space=problem.space,
        envs=partial(PruningVectorEnv, env_handle(problem, study)),
        score=study.score,
        episodes=settings.episodes,
        seed=settings.seed,
        on_update=latest.update,
        layer_errors=cache(partial(layer_errors_of, problem, start)),
        adopt=study.adopt,
    )
    settings.agent.search(task)
    return study.best(settings.rescored, settings.finalists.repair), study


def env_handle(problem: PruningProblem, study: Study) -> EnvHandle:
    """What the environments of a search refer to; their last step ends in ``study``."""
    settings, space = problem.settings, problem.space
    return EnvHandle(
        space,
        Encoder(describe(problem.graph, space.grids), space),
        study.score_one,
        settings.reward,
        enforce_budget=settings.enforce_budget,
        fill_budget=settings.fill_budget,
        score_all=study.score_all,
    )


def _watcher(
    problem: PruningProblem, context: Context, progress: Progress, latest: Mapping[str, float], before: int
) -> Callable[[Trial, Study], None]:
    """What is shown and tracked of every episode.

    Args:
        problem: The run, with the stage's budget.
        context: Tracks.
        progress: Shows.
        latest: The agent's own figures.
        before: Episodes of earlier stages.
    """
    budgets = problem.space.budgets
    cost = budgets[0].cost.name if budgets else "macs"
    unpruned = problem.space.cost([0] * len(problem.space.grids))

    def show(trial: Trial, study: Study) -> None:
        best, number = study.best_so_far, before + study.episodes
        assert best is not None
        progress.episode(
            SearchStatus(
                done=number,
                reward=trial.reward,
                best_reward=best.reward,
                best_accuracy=best.score,
                best_cost_ratio=best.costs[cost] / unpruned[cost],
                cost=cost_name(cost, bool(problem.masked)),
                metric=problem.settings.task.metric,
                evaluations=study.evaluations,
                cache_hits=study.cache_hits,
            )
        )
        metrics = {
            "episode/reward": trial.reward,
            "episode/accuracy": trial.score,
            **{f"episode/{name}_ratio": trial.costs[name] / unpruned[name] for name in unpruned},
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
    problem = PruningProblem.build(model, data, settings)
    announce(problem)
    refuse_early(problem)
    # The journal's lock is held to the end: a second run in the folder would write over this one's files.
    with Journal(context.folder, identity(problem), problem.space, may_grow=MAY_GROW) as journal:
        context.start()
        return _run(problem, context, journal)


def refuse_early(problem: PruningProblem) -> None:
    """Finds what cannot be done before anything is trained or scored.

    Raises:
        UserError: The agent cannot do the search, a stage is out of reach, the criterion or the regulariser does not
            fit the network, or a pruned network cannot be trained.
    """
    settings = problem.settings
    settings.agent.check(problem.space, settings.episodes)
    start = start_of(problem, ORIGINAL, problem.builder)
    if settings.stages:
        stage_of(problem, len(settings.stages), start)
    if settings.regularization.before_epochs or settings.regularization.during:
        penalty_of(problem, problem.model)
    if settings.finetune.epochs:
        removed = problem.space.project([_TRIED] * len(problem.grids))
        network = module_copy(start.candidates.cut(removed))
        Tuner(problem, lambda *_: None).try_step(network, start.candidates.masks(removed))


def _run(problem: PruningProblem, context: Context, journal: Journal) -> Finished:
    settings = problem.settings
    if journal.replayed:
        log.info("resuming with %d evaluations of %s", journal.replayed, context.folder)
    else:
        KeptWeights(context.folder, journal).forget()
    planned = settings.agent.planned(problem.space, settings.episodes) * max(1, len(settings.stages))
    console = Console(stderr=True, quiet=context.quiet)
    with Progress(episodes=planned, epochs=settings.all_epochs, console=console) as progress:
        tune = Tuner(problem, _epoch_watcher(context, progress), context.folder)
        last, start, best, study = _searched(problem, context, progress, journal, tune)
        write_json(context.folder / "strategy.json", strategy_json(last, best))
        beside = compared(last, start, study, context.folder, progress)
        candidates = {"pruned": study.evaluator.network(best)}
        if settings.finetune.epochs:
            progress.start("fine-tune")
            candidates["finetuned"] = finetuned(last, study.evaluator, best, tune)
    networks = {"base": problem.model} | {stage: pruned.network for stage, pruned in candidates.items()}
    delivered = delivered_of(problem, networks)
    chosen = candidates[delivered]
    example = problem.inputs(problem.data.search, 4)
    small = Small(chosen.network, example, chosen.keeps, context.model, problem.model, settings.task.output)
    exports = export_all(small, context.folder, settings.export)
    result = replace(
        result_of(last, networks, delivered, best, study, exports),
        baselines=baseline_figures(last, beside),
        model=context.model,
        command=context.command,
        resumed=journal.replayed > 0,
    )
    result.write(context.folder)
    tune.forget()
    return Finished(chosen.network, chosen.keeps, result)


def _searched(
    problem: PruningProblem, context: Context, progress: Progress, journal: Journal, tune: Tuner
) -> tuple[PruningProblem, BaseWeights, Trial, Study]:
    """All searches of a run; the last stage, its first weights, its best strategy and the study that found it."""
    kept = KeptWeights(context.folder, journal)
    start = first_start(problem, kept, tune)
    for number in count(1):
        stage = stage_of(problem, number, start)
        progress.start("search")
        best, study = search(stage, start, context, progress, journal)
        if stage.last:
            break
        start = next_start(stage, study.evaluator, best, kept, tune)
    return stage.problem, start, best, study


def _epoch_watcher(context: Context, progress: Progress) -> Callable[[int, float, float, float], None]:
    def on_epoch(epoch: int, loss: float, lr: float, score: float) -> None:
        progress.epoch(epoch, loss, score)
        context.track({"finetune/loss": loss, "finetune/lr": lr, "finetune/accuracy": score}, epoch)

    return on_epoch
