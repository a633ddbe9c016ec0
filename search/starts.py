"""Weights that a run moves to, kept in its folder: a stopped run does not train them again."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from amc_env.evaluator import Evaluator, Outcome, Pruned, Start
from amc_env.pruning.widen import widen
from search import files
from search.judging import start_of
from search.ranking import Prepared, builder_of
from search.settings import SHORT_TERM

FOLDER = "starts"
"""Of these weights, in the run folder."""
_UNITS = "units"


@dataclass(frozen=True, eq=False)
class Weights:
    """A state of the weights that strategies can be cut from.

    Attributes:
        network: In the uncut network's shapes.
        units: The units that earlier cuts left of every channel group; none where nothing was cut out.
    """

    network: nn.Module
    units: tuple[Tensor, ...] = ()

    @classmethod
    def after(cls, pruned: Pruned, original: nn.Module) -> Weights:
        """Those of a pruned network, between zeros where channels were cut out."""
        return cls(widen(pruned.network, pruned.keeps, original), pruned.units)


def kept(
    path: Path, model: nn.Module, make: Callable[[], Weights], skipped: Callable[[], object] = lambda: None
) -> Weights:
    """Weights from a file, or made and written there.

    Args:
        path: The file: a safetensors file of the state, the units in its metadata.
        model: Gives the class and the shapes.
        make: Trains them.
        skipped: Called where the file is there and nothing is trained.
    """
    if path.exists():
        skipped()
        return _read(path, model)
    weights = make()
    state = weights.network.state_dict()
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}
    units = json.dumps([unit.tolist() for unit in weights.units])
    files.write(path, lambda unfinished: save_file(tensors, unfinished, {_UNITS: units}))
    return weights


def _read(path: Path, model: nn.Module) -> Weights:
    network = copy.deepcopy(model)
    network.load_state_dict(load_file(path))
    with safe_open(path, "pt") as file:
        units = json.loads((file.metadata() or {}).get(_UNITS, "[]"))
    return Weights(network.eval(), tuple(torch.tensor(unit, dtype=torch.int64) for unit in units))


def start_at(prepared: Prepared, name: str, weights: Weights, removed: tuple[int, ...] = ()) -> Start:
    """A start with these weights; what is gone of them already goes first.

    Args:
        prepared: The run.
        name: Of the start.
        weights: Its weights.
        removed: The strategy that they were cut to, where it is not to be repaired again.
    """
    return start_of(prepared, name, builder_of(prepared, weights.network, weights.units), removed)


def adopted(prepared: Prepared, evaluator: Evaluator, outcome: Outcome, number: int, folder: Path) -> Start:
    """The start with the weights of an outcome's network, as it was repaired and shortly fine-tuned.

    Args:
        prepared: The run.
        evaluator: The one that scored the outcome.
        outcome: Whose network.
        number: Of the round that it ends, from 1.
        folder: The run folder.
    """
    repair = SHORT_TERM if prepared.settings.short_term_steps else outcome.repair

    def tuned() -> Weights:
        pruned = evaluator.apply(outcome.strategy, start=outcome.start, repair=repair)
        return Weights.after(pruned, prepared.model)

    weights = kept(folder / FOLDER / f"round-{number}.safetensors", prepared.model, tuned)
    return start_at(prepared, round_name(number), weights, outcome.strategy.removed)


def round_name(number: int) -> str:
    """Of the start after so many rounds of an agent that adopts weights."""
    return f"round {number}"


def round_number(start: str) -> int:
    """The number in a `round_name`."""
    return int(start.removeprefix("round "))


def forget(folder: Path) -> None:
    """Removes the weights of an earlier run whose journal is gone: they may be of another configuration."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
