"""Baselines beside the agent: scored by the same evaluator, after the search, in a journal of their own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from agents.base import Agent, SearchTask
from agents.baselines import Random, Uniform
from amc_env.env import PruningVectorEnv
from amc_env.evaluation.evaluator import Evaluator
from amc_env.evaluation.pruner import BaseWeights
from amc_env.space import Trial
from search.output.formatting import duration
from search.output.progress import Progress
from search.settings import Baseline
from search.study.identity import MAY_GROW, identity
from search.study.journal import Journal
from search.study.problem import PruningProblem
from search.study.study import Study

log = logging.getLogger(__name__)

FOLDER = "baselines"
"""Of their journal, within the run folder."""
CHEAP_MACS = 1e9
"""Below so many MACs, of the network times the search images, an evaluation is cheap."""
_AGENTS: dict[str, Callable[[], Agent]] = {"uniform": Uniform, "random": Random}


@dataclass(frozen=True, eq=False)
class Beside:
    """What a baseline came to.

    Attributes:
        name: The baseline's name.
        evaluations: As `Study.evaluations`.
        best: The best of them.
        evaluator: The one that scored it.
    """

    name: str
    evaluations: int
    best: Trial
    evaluator: Evaluator


def chosen(problem: PruningProblem) -> tuple[Baseline, ...]:
    """The baselines of a run: those that are asked for, without the agent itself and without what cannot be done."""
    settings, agent = problem.settings, problem.settings.agent.name
    asked: Sequence[Baseline] = settings.baselines or ()
    if settings.baselines is None:
        images = len(problem.data.search)
        macs = next(cost for cost in problem.space.costs if cost.name == "macs")([0] * len(problem.grids))
        asked = ("uniform", "random") if macs * images < CHEAP_MACS else ("uniform",)
        asked = () if agent in ("given", "uniform") else asked
    possible = asked if problem.space.budgets else [name for name in asked if name != "uniform"]
    return tuple(dict.fromkeys(name for name in possible if name != agent))


def compared(
    problem: PruningProblem, start: BaseWeights, study: Study, folder: Path, progress: Progress
) -> list[Beside]:
    """Runs the baselines: random gets as many evaluations as the agent had.

    Args:
        problem: The run, of a search in stages the last one.
        start: The weights that its strategies were cut from at first.
        study: The agent's search, which is over.
        folder: The run folder.
        progress: Shows them.
    """
    names = chosen(problem)
    if not names:
        return []
    counts = {name: study.scored if name == "random" else 1 for name in names}
    pace = study.seconds / max(1, study.scored)
    log.info(
        "baselines: %s; about %s; baselines=[] leaves them out",
        ", ".join(f"{name} ({count} strateg{'ies' if count > 1 else 'y'})" for name, count in counts.items()),
        duration(pace * sum(counts.values())),
    )
    shown = progress.stage("baselines", sum(counts.values()))
    header, space = identity(problem), problem.space
    with Journal(folder / FOLDER, header, space, may_grow=MAY_GROW, ordered=False) as journal:
        evaluator = study.evaluator.beside(start, journal)
        return [_one(problem, evaluator, name, count, shown.advance) for name, count in counts.items()]


def _one(
    problem: PruningProblem, evaluator: Evaluator, name: Baseline, count: int, done: Callable[[], None]
) -> Beside:
    settings = problem.settings
    study = Study(evaluator, lambda _: done())
    _AGENTS[name]().search(SearchTask(problem.space, _no_envs, study.score, count, settings.seed))
    best = study.best(settings.rescored, settings.finalists.repair)
    return Beside(name, study.evaluations, best, evaluator)


def _no_envs(number: int) -> PruningVectorEnv:
    raise AssertionError("baselines propose whole strategies")
