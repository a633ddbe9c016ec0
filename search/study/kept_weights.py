"""Weights that a run starts from later, in files of its folder, so that a resumed run does not train them again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from amc_env.errors import UserError
from amc_env.evaluation.pruner import Pruned
from amc_env.graph.copying import module_copy
from amc_env.pruning.candidate import widen
from search import files
from search.study.journal import Journal

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


class KeptWeights:
    """A run's files of weights. The journal holds the SHA-256 of each.

    Args:
        folder: The run folder.
        journal: The run's journal.
    """

    def __init__(self, folder: Path, journal: Journal):
        self._folder = folder / FOLDER
        self._journal = journal

    def get(
        self,
        name: str,
        model: nn.Module,
        make: Callable[[], Weights],
        skipped: Callable[[], object] = lambda: None,
    ) -> Weights:
        """Weights from their file, or made and written there.

        Args:
            name: The file's name without its suffix: a safetensors file of the state, the units in its metadata.
            model: Gives the class and the shapes.
            make: Trains them.
            skipped: Called where the file is there and nothing is trained.

        Raises:
            UserError: The file is not the one that the run wrote.
        """
        path, known = self._folder / f"{name}.safetensors", self._journal.weights_hash(name)
        if known is None or not path.exists():
            weights = make()
            content = _packed(weights)
            files.write(path, content)
            self._journal.keep_weights_hash(name, _hash(content))
            return weights
        weights = self.read(name, model)
        skipped()
        return weights

    def read(self, name: str, model: nn.Module) -> Weights:
        """Weights from their file.

        Args:
            name: As for `get`.
            model: As for `get`.

        Raises:
            UserError: The file is missing, or is not the one that the run wrote.
        """
        path, known = self._folder / f"{name}.safetensors", self._journal.weights_hash(name)
        with files.reading(path):
            found = _hash(path.read_bytes())
        if found != known:
            raise UserError(
                f"{path} is not the file that this run wrote (SHA-256 {found[:16]}, not {known and known[:16]}): delete it, "
                "and its weights are trained again",
                code="damaged",
            )
        return _read(path, model)

    def forget(self) -> None:
        """Remove the weights of an earlier run whose journal is gone: they may be of another configuration."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _packed(weights: Weights) -> bytes:
    state = weights.network.state_dict()
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}
    return save(tensors, {_UNITS: json.dumps([unit.tolist() for unit in weights.units])})


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read(path: Path, model: nn.Module) -> Weights:
    network = module_copy(model)
    network.load_state_dict(load_file(path))
    with safe_open(path, "pt") as file:
        units = json.loads((file.metadata() or {}).get(_UNITS, "[]"))
    return Weights(network.eval(), tuple(torch.tensor(unit, dtype=torch.int64) for unit in units))
