"""A search in stages: each begins with the network that the stage before pruned and fine-tuned.

AMC's fine-grained search reaches ResNet-50's 20% density so, over 50, 35 and 25% (He et al., ECCV 2018, section 4.2).
Sparse training before anything is cut (regularization.before_epochs) is a stage of the same kind, without a search.
Weights between stages are kept in the run folder: a stopped run does not train them again.
"""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

from amc_env.evaluator import ORIGINAL, Evaluator, Outcome, Start
from amc_env.pruning.widen import widen
from search.cache import write_atomically
from search.preparation import Prepared, Ranked, builder_of, posed, start_of
from search.rounds import finetuned, later_builder
from search.settings import Settings
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
STARTS = "starts"
"""The folder of weights between stages, in the run folder."""


def _name(number: int, ratio: float) -> str:
    return f"stage {number} ({ratio:g})"


def chain(settings: Settings, start: str) -> list[str]:
    """The names of the weights that a run goes through up to ``start``, the original's first."""
    trained = [REGULARISED] if settings.regularization.before_epochs else []
    names = [ORIGINAL, *trained, *(_name(n, ratio) for n, ratio in enumerate(settings.stages, start=1))]
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

    def trained() -> nn.Module:
        return tune(copy.deepcopy(prepared.model), epochs, regularized=True)

    network = kept(folder / STARTS / "regularised.safetensors", prepared.model, trained, tune, epochs)
    return start_of(prepared, REGULARISED, builder_of(prepared, network))


def next_start(stage: Stage, evaluator: Evaluator, best: Outcome, folder: Path, tune: Tuner) -> Start:
    """The weights that the next stage begins with: this stage's best strategy, applied and fine-tuned."""
    prepared, epochs = stage.prepared, stage.prepared.settings.finetune.epochs
    builder = evaluator.builder(best.start)

    def trained() -> nn.Module:
        tuned = finetuned(prepared, evaluator, best, tune)
        return widen(tuned.network, tuned.keeps, prepared.model)

    path = folder / STARTS / f"stage-{stage.number}.safetensors"
    network = kept(path, prepared.model, trained, tune, epochs)
    name = _name(stage.number, prepared.settings.stages[stage.number - 1])
    return start_of(prepared, name, later_builder(prepared, builder, best.strategy, network))


def forget(folder: Path) -> None:
    """Removes the weights of an earlier run whose journal is gone: they may be of another configuration."""
    shutil.rmtree(folder / STARTS, ignore_errors=True)


def kept(path: Path, model: nn.Module, make: Callable[[], nn.Module], tune: Tuner, epochs: int) -> nn.Module:
    """A network in ``model``'s shapes from a file, or made and written there.

    Args:
        path: The file.
        model: Gives the class and the shapes.
        make: Trains the network.
        tune: Is told of the epochs that are not trained again.
        epochs: How many ``make`` trains.
    """
    if path.exists():
        network = copy.deepcopy(model)
        network.load_state_dict(load_file(path))
        tune.skip(epochs)
        return network.eval()
    network = make()
    state = {key: value.detach().cpu().clone().contiguous() for key, value in network.state_dict().items()}
    write_atomically(path, lambda unfinished: save_file(state, unfinished))
    return network
