"""The state of a training after each epoch, in a file, so that a killed training continues at the epoch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from amc_env.errors import UserError
from search import files

log = logging.getLogger(__name__)


class TrainingFile:
    """Weights, optimizer and random state after the last epoch that was finished.

    Args:
        path: The file.
        key: Names all that the training depends on; the state of a training with another key is not used.
    """

    def __init__(self, path: Path, key: str):
        self._path, self._key = path, key
        self._state: dict[str, Any] = {}

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> int:
        """Put the state on file into model, optimizer and scaler.

        Returns:
            The epochs that it has been trained for; 0 where there is no such state, and nothing was changed.
        """
        if not self._path.exists():
            return 0
        before = {name: value.clone() for name, value in model.state_dict().items()}
        try:
            with files.reading(self._path, "the training starts again"):
                state = torch.load(self._path, weights_only=True)
                if state["key"] != self._key:
                    return 0
                epoch, _ = int(state["epoch"]), state["random"].shape
                model.load_state_dict(state["model"])
                optimizer.load_state_dict(state["optimizer"])
                scaler.load_state_dict(state["scaler"])
        except UserError as error:
            log.warning("%s", error)
            model.load_state_dict(before)
            return 0
        self._state = state
        log.info("fine-tuning continues after epoch %d", epoch)
        return epoch

    def restore_random_state(self) -> None:
        """Set torch's random state to that on file, which `load` has read."""
        torch.set_rng_state(self._state["random"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(self._state["cuda"])

    def save(
        self,
        epoch: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
    ) -> None:
        """Write the state after ``epoch`` epochs.

        Raises:
            UserError: The file cannot be written.
        """
        state = {
            "key": self._key,
            "epoch": epoch,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "random": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        files.write(self._path, lambda path: torch.save(state, path))
