"""A search in stages: each begins with the network that the stage before pruned and fine-tuned.

AMC's fine-grained search reaches ResNet-50's 20% density so, over 50, 35 and 25% (He et al., ECCV 2018, section 4.2).
Sparse training before anything is cut (regularization.before_epochs) is a stage of the same kind, without a search.
Weights between stages are kept in the run folder: a stopped run does not train them again.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from amc_env.evaluator import ORIGINAL, Evaluator, Outcome, Start
from search.judging import start_of
from search.preparation import posed
from search.ranking import Prepared, Ranked
from search.rounds import finetuned
from search.settings import Settings
from search.starts import FOLDER, Weights, kept, round_name, round_number, start_at
from search.tuning import Tuner

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Stage:
    """One search of a run.

    Attributes:
        number: From 1.
        prepared: The problem with this stage's budget.
        last: Whether its strategy is what the run delivers.
    """

    number: int
    prepared: Prepared
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


def stage_of(prepared: Prepared, number: int, start: Start) -> Stage:
    """The search that is number so-and-so of a run, from 1: its budget, on the weights that it begins with."""
    settings = prepared.settings
    ratios = settings.stages
    budgets = settings.budgets
    if ratios:
        budgets = (replace(budgets[0], ratio=ratios[number - 1], limit=None),)
    here = replace(settings, budgets=budgets)
    ranked = Ranked(prepared.model, prepared.data, here, prepared.graph, prepared.grids)
    vars(ranked)["builder"] = start.candidates  # a cost of stored weights is one of these weights
    return Stage(number, posed(ranked), last=number >= len(ratios))


def first_start(prepared: Prepared, folder: Path, tune: Tuner) -> Start:
    """The weights that the search begins with: the network's own, or those after sparse training."""
    epochs = prepared.settings.regularization.before_epochs
    if not epochs:
        return start_of(prepared, ORIGINAL, prepared.builder)
    log.info("training with the regulariser for %d epochs before anything is cut", epochs)

    def trained() -> Weights:
        return Weights(tune(copy.deepcopy(prepared.model), epochs, regularized=True))

    path = folder / FOLDER / "regularised.safetensors"
    return start_at(prepared, REGULARISED, kept(path, prepared.model, trained, partial(tune.skip, epochs)))


def next_start(stage: Stage, evaluator: Evaluator, best: Outcome, folder: Path, tune: Tuner) -> Start:
    """The weights that the next stage begins with: this stage's best strategy, applied and fine-tuned."""
    prepared, epochs = stage.prepared, stage.prepared.settings.finetune.epochs

    def trained() -> Weights:
        return Weights.after(finetuned(prepared, evaluator, best, tune), prepared.model)

    path = folder / FOLDER / f"stage-{stage.number}.safetensors"
    weights = kept(path, prepared.model, trained, partial(tune.skip, epochs))
    name = _name(stage.number, prepared.settings.stages[stage.number - 1])
    return start_at(prepared, name, weights)
