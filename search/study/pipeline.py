"""A run from the trained network to the report: search, apply, fine-tune, export, measure, write down."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from torch import nn

from agents.base import SearchTask
from amc_env.encoding import Encoder, describe
from amc_env.env import EnvHandle, PruningVectorEnv
from amc_env.evaluation.evaluator import Evaluator
from amc_env.evaluation.pruner import ORIGINAL, BaseWeights, Pruned
from amc_env.graph.copying import module_copy
from amc_env.graph.surgery import Keeps
from amc_env.space import Trial
from search import files
from search.data.base import Data
from search.output.export import Small, export_all
from search.output.formatting import cost_name
from search.output.progress import Progress, SearchStatus
from search.output.run_files import CONFIGURATION, write_layer_errors
from search.output.run_result import BaselineFigures, FrontRow, RunResult
from search.settings import Settings
from search.study.baselines import compared
from search.study.evaluation import layer_errors_of, make_evaluator, start_of
from search.study.identity import MAY_GROW, identity
from search.study.journal import Journal
from search.study.kept_weights import KeptWeights
from search.study.problem import PruningProblem, announce
from search.study.results import baseline_figures, delivered_of, result_of, strategy_json, write_json
from search.study.stages import Stage, adopted, first_start, next_start, round_start, stage_of
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
        models: With several budgets the network of each, by the budget's ratio.
    """

    model: nn.Module
    keeps: Keeps
    result: RunResult
    models: Mapping[float, nn.Module] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Found:
    """What a search found.

    Attributes:
        problem: The run's problem with the search's budget.
        start: The weights that its strategies were cut from at first.
        best: The strategy that is delivered.
        study: The search.
    """

    problem: PruningProblem
    start: BaseWeights
    best: Trial
    study: Study


@dataclass(frozen=True, eq=False)
class Base:
    """What searches from the same weights share.

    Attributes:
        start: The weights.
        evaluator: Scores strategies.
        layer_errors: As in `agents.base.SearchTask`.
        known: Trials of earlier searches.
    """

    start: BaseWeights
    evaluator: Evaluator
    layer_errors: Callable[[], Sequence[NDArray[np.float64]] | None]
    known: tuple[Trial, ...] = ()

    @classmethod
    def of(cls, problem: PruningProblem, start: BaseWeights, journal: Journal) -> Base:
        """For searches from these weights; what earlier runs in the folder have scored is read from the journal."""
        errors = cache(partial(layer_errors_of, problem, start))
        return cls(start, make_evaluator(problem, journal, start), errors)


def search(stage: Stage, base: Base, context: Context, progress: Progress, kept: KeptWeights) -> Found:
    """Runs the agent."""
    problem, settings = stage.problem, stage.problem.settings
    latest: dict[str, float] = {}
    evaluator = base.evaluator.within(problem.space)
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
        layer_errors=partial(_layer_errors, problem, base, context.folder),
        known=base.known,
        adopt=study.adopt,
        save=lambda name, content: files.write(context.folder / name, content),
    )
    settings.agent.search(task)
    return Found(problem, base.start, study.best(settings.rescored, settings.finalists.repair), study)


def _layer_errors(problem: PruningProblem, base: Base, folder: Path) -> Sequence[NDArray[np.float64]] | None:
    """Those of the base; kept in the folder, for the report."""
    errors = base.layer_errors()
    if errors is not None:
        write_layer_errors(folder, problem.space, errors)
    return errors


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
    if settings.ratios:
        settings = settings.at(settings.ratios[-1])
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
    if settings.searches:
        stage_of(problem, len(settings.searches), start)
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
    searches = 1 if settings.agent.tunes else max(1, len(settings.searches))
    planned = settings.agent.planned(problem.space, settings.episodes) * searches
    console = Console(stderr=True, quiet=context.quiet)
    with Progress(episodes=planned, epochs=settings.all_epochs, console=console) as progress:
        tune = Tuner(problem, _epoch_watcher(context, progress), context.folder)
        found = _searched(problem, context, progress, journal, tune)
        folders = [*(front_folder(context.folder, one.problem) for one in found[:-1]), context.folder]
        for one, folder in zip(found, folders, strict=True):
            files.make_folder(folder)
            write_json(folder / "strategy.json", strategy_json(one.problem, one.best))
        beside = _beside(found[-1], context, progress)
        networks, trained = [], tune.done
        for one in found:
            tune.next_network(trained)
            networks.append(_networks(one, progress, tune))
    delivered = [
        _delivered(one, candidates, folder, context)
        for one, candidates, folder in zip(found, networks, folders, strict=True)
    ]
    last = delivered[-1]
    result = replace(last.result, baselines=beside, command=context.command, resumed=journal.replayed > 0)
    models = {}
    if settings.ratios:
        models = {ratio: one.model for ratio, one in zip(settings.ratios, delivered, strict=True)}
        names = [folder.relative_to(context.folder).as_posix() for folder in folders]
        rows = (FrontRow.of(one.result, name) for one, name in zip(delivered, names, strict=True))
        result = replace(result, front=tuple(rows))
    result.write(context.folder)
    tune.forget()
    return Finished(last.model, last.keeps, result, models)


def _beside(found: Found, context: Context, progress: Progress) -> tuple[BaselineFigures, ...]:
    """What the baselines come to under the tightest budget."""
    problem, study = found.problem, found.study
    with closing(study.evaluator):
        return baseline_figures(problem, compared(problem, found.start, study, context.folder, progress))


def _networks(found: Found, progress: Progress, tune: Tuner) -> dict[str, Pruned]:
    """The network of the best strategy as it was scored and, where that was asked for, fine-tuned."""
    evaluator = found.study.evaluator
    candidates = {"pruned": evaluator.network(found.best)}
    if found.problem.settings.finetune.epochs:
        progress.start("fine-tune")
        candidates["finetuned"] = finetuned(found.problem, evaluator, found.best, tune)
    return candidates


def _delivered(found: Found, candidates: Mapping[str, Pruned], folder: Path, context: Context) -> Finished:
    """Chooses, exports and measures what is delivered for a budget."""
    problem, settings = found.problem, found.problem.settings
    networks = {"base": problem.model} | {stage: pruned.network for stage, pruned in candidates.items()}
    delivered = delivered_of(problem, networks)
    chosen = candidates[delivered]
    example = problem.inputs(problem.data.search, 4)
    small = Small(chosen.network, example, chosen.keeps, context.model, problem.model, settings.task.output)
    exports = export_all(small, folder, settings.export)
    result = result_of(problem, networks, delivered, found.best, found.study, exports)
    return Finished(chosen.network, chosen.keeps, replace(result, model=context.model))


def _searched(
    problem: PruningProblem, context: Context, progress: Progress, journal: Journal, tune: Tuner
) -> list[Found]:
    """All searches of a run: what is delivered for each budget, the last of which is the tightest."""
    kept = KeptWeights(context.folder, journal)
    start = first_start(problem, kept, tune)
    if problem.settings.ratios:
        progress.start("search")
        base = Base.of(problem, start, journal)
        stages = [stage_of(problem, number, start) for number in range(1, len(problem.settings.ratios) + 1)]
        run = _in_rounds if problem.settings.agent.tunes else _in_turn
        with closing(base.evaluator):
            return run(stages, base, context, progress, kept)
    for number in count(1):
        stage = stage_of(problem, number, start)
        progress.start("search")
        base = Base.of(stage.problem, start, journal)
        with closing(base.evaluator):
            found = search(stage, base, context, progress, kept)
        if stage.last:
            break
        start = next_start(stage, found.study.evaluator, found.best, kept, tune)
    return [found]


def _in_turn(
    stages: Sequence[Stage], base: Base, context: Context, progress: Progress, kept: KeptWeights
) -> list[Found]:
    """A search for each budget; each knows the trials of those before."""
    found: list[Found] = []
    for stage in stages:
        found.append(search(stage, base, context, progress, kept))
        base = replace(base, known=(*base.known, *found[-1].study.trials))
    return found


def _in_rounds(
    stages: Sequence[Stage], base: Base, context: Context, progress: Progress, kept: KeptWeights
) -> list[Found]:
    """One search for the tightest budget, whose rounds pass the others: of those the first state within each."""
    last = search(replace(stages[-1], number=1), base, context, progress, kept)
    found = []
    for stage in stages[:-1]:
        problem = stage.problem
        best = next(trial for trial in last.study.states if problem.space.met(trial.removed))
        evaluator = base.evaluator.within(problem.space)
        evaluator.add(round_start(problem, best.start, best.removed, kept))
        study = last.study.until(best, evaluator)
        found.append(Found(problem, base.start, replace(best, met=True), study))
    return [*found, last]


def front_folder(folder: Path, problem: PruningProblem) -> Path:
    """Where the network of one of several budgets goes, but for the tightest one's."""
    ratio = problem.settings.budgets[0].ratio
    return folder / "budgets" / f"{ratio:g}"


def _epoch_watcher(context: Context, progress: Progress) -> Callable[[int, float, float, float], None]:
    def on_epoch(epoch: int, loss: float, lr: float, score: float) -> None:
        progress.epoch(epoch, loss, score)
        context.track({"finetune/loss": loss, "finetune/lr": lr, "finetune/accuracy": score}, epoch)

    return on_epoch
