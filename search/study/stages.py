"""A search in stages: each starts from the network that the stage before pruned and fine-tuned.

AMC's fine-grained search reaches ResNet-50's 20% density so, over 50, 35 and 25% (He et al., ECCV 2018, section 4.2).
Sparse training before anything is cut (regularization.before_epochs) is a stage of the same kind, without a search.
Weights between stages are kept in the run folder: a stopped run does not train them again.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

from amc_env.evaluation.evaluator import Evaluator
from amc_env.evaluation.pruner import ORIGINAL, BaseWeights
from amc_env.graph.copying import module_copy
from amc_env.pruning.candidate import Candidates, MaskedCandidates
from amc_env.space import Trial
from search.settings import SHORT_TERM, Settings
from search.study.evaluation import start_of
from search.study.kept_weights import KeptWeights, Weights
from search.study.problem import PruningProblem, builder_of
from search.study.tuning import Tuner, finetuned

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Stage:
    """One search of a run.

    Attributes:
        number: From 1.
        problem: The run's problem with this stage's budget.
        last: Whether its strategy is what the run delivers.
    """

    number: int
    problem: PruningProblem
    last: bool


REGULARISED = "regularised"
"""The start after sparse training."""


def _name(number: int, ratio: float) -> str:
    return f"stage {number} ({ratio:g})"


def chain(settings: Settings, start: str) -> list[str]:
    """The names of the weights that a run goes through up to ``start``, the original's first."""
    trained = [REGULARISED] if settings.regularization.before_epochs else []
    staged = [_name(n, ratio) for n, ratio in enumerate(settings.stages, start=1)]
    names = [ORIGINAL, *trained, *staged]
    if start not in names:  # of an agent that adopts weights
        return [*names, *(round_name(n) for n in range(1, round_number(start) + 1))]
    return names[: names.index(start) + 1]


def stage_of(problem: PruningProblem, number: int, start: BaseWeights) -> Stage:
    """Build the problem of stage ``number`` (from 1): its budget and its initial weights."""
    settings = problem.settings
    ratios = settings.searches
    here = settings.at(ratios[number - 1]) if ratios else settings
    # a cost of stored weights is one of these weights
    problem = replace(
        problem, settings=here, candidates=cast(Candidates | MaskedCandidates, start.candidates)
    )
    problem.space  # noqa: B018 -- an unreachable budget is refused now
    return Stage(number, problem, last=number >= len(ratios))


def first_start(problem: PruningProblem, kept: KeptWeights, tune: Tuner) -> BaseWeights:
    """The weights that the search starts from: the network's own, or those after sparse training."""
    epochs = problem.settings.regularization.before_epochs
    if not epochs:
        return start_of(problem, ORIGINAL, problem.builder)
    log.info("training with the regulariser for %d epochs before anything is cut", epochs)

    def trained() -> Weights:
        return Weights(tune(module_copy(problem.model), epochs, regularized=True))

    weights = kept.get("regularised", problem.model, trained, partial(tune.skip, epochs))
    return start_at(problem, REGULARISED, weights)


def next_start(
    stage: Stage, evaluator: Evaluator, best: Trial, kept: KeptWeights, tune: Tuner
) -> BaseWeights:
    """The weights that the next stage starts from: this stage's best strategy, applied and fine-tuned."""
    problem, epochs = stage.problem, stage.problem.settings.finetune.epochs

    def trained() -> Weights:
        return Weights.after(finetuned(problem, evaluator, best, tune), problem.model)

    weights = kept.get(f"stage-{stage.number}", problem.model, trained, partial(tune.skip, epochs))
    name = _name(stage.number, problem.settings.stages[stage.number - 1])
    return start_at(problem, name, weights)


def start_at(
    problem: PruningProblem, name: str, weights: Weights, removed: tuple[int, ...] = ()
) -> BaseWeights:
    """A start with these weights; what is gone of them already goes first.

    Args:
        problem: The run.
        name: Of the start.
        weights: Its weights.
        removed: The strategy that they were cut to, where it is not to be repaired again.
    """
    return start_of(problem, name, builder_of(problem, weights.network, weights.units), removed)


def adopted(
    problem: PruningProblem, evaluator: Evaluator, trial: Trial, number: int, kept: KeptWeights
) -> BaseWeights:
    """The start with the weights of an trial's network, as it was repaired and shortly fine-tuned.

    Args:
        problem: The run.
        evaluator: The one that scored the trial.
        trial: Whose network.
        number: Of the round that it ends, from 1.
        kept: The run's files of weights.
    """
    repair = SHORT_TERM if problem.settings.short_term_steps else trial.repair

    def tuned() -> Weights:
        pruned = evaluator.apply(trial.strategy, start=trial.start, repair=repair)
        return Weights.after(pruned, problem.model)

    weights = kept.get(f"round-{number}", problem.model, tuned)
    return start_at(problem, round_name(number), weights, trial.removed)


def round_start(
    problem: PruningProblem, name: str, removed: tuple[int, ...], kept: KeptWeights
) -> BaseWeights:
    """The weights after an earlier round, from their file.

    Args:
        problem: The run.
        name: Of the start, as `round_name` gives it.
        removed: The strategy that they were cut to.
        kept: The run's files of weights.
    """
    weights = kept.read(f"round-{round_number(name)}", problem.model)
    return start_at(problem, name, weights, removed)


def round_name(number: int) -> str:
    """Of the start after so many rounds of an agent that adopts weights."""
    return f"round {number}"


def round_number(start: str) -> int:
    """The number in a `round_name`."""
    return int(start.removeprefix("round "))
