"""A task of functions of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from amc_env.errors import UserError
from amc_env.inputs import to_dtype
from amc_env.tasks.base import (
    Batches,
    Entry,
    Task,
)


class OwnTask(Task):
    """A task that consists of functions.

    Args:
        score: Takes a network in eval mode and batches of (inputs, targets) on its device, and gives its score in
            [0, 1]; `amc_env.inputs.call` runs a network on inputs.
        loss: Takes outputs and targets of a batch, and gives the mean loss of its examples, a scalar.
        teacher_loss: Takes outputs, the teacher's outputs and a temperature; only distillation needs it.
        metric: The name of the score.
        output: Which of the network's outputs the functions are given; None: all that the network returns.
    """

    def __init__(
        self,
        score: Callable[[nn.Module, Batches], float],
        loss: Callable[[Any, Any], Tensor],
        teacher_loss: Callable[[Any, Any, float], Tensor] | None = None,
        *,
        metric: str = "score",
        output: Entry = None,
    ):
        self._score, self._loss, self._teacher_loss = score, loss, teacher_loss
        self._metric, self.output = metric, output
        self.functions = ", ".join(map(_name, (score, loss, teacher_loss)))  # part of a run's identity

    @property
    def metric(self) -> str:
        """The name of the score."""
        return self._metric

    @property
    def distils(self) -> bool:
        """Whether a loss for distillation was given."""
        return self._teacher_loss is not None

    def read(self, given: Any) -> Any:
        """All that the network returns, or the entry that was named."""
        return given if self.output is None else super().read(given)

    def targets(self, name: str, given: Any) -> Any:
        """The targets as they are, but for float64, which becomes float32."""
        return to_dtype(given, torch.float32) if isinstance(given, Tensor) else given

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """What the function gives."""
        return self._loss(outputs, targets)

    def teacher_loss(self, outputs: Any, teacher: Any, temperature: float) -> Tensor:
        """What the function gives."""
        if self._teacher_loss is None:
            return super().teacher_loss(outputs, teacher, temperature)
        return self._teacher_loss(outputs, teacher, temperature)

    def score(self, model: nn.Module | Callable[..., Any], batches: Batches) -> float:
        """What the function gives.

        Raises:
            UserError: It is no number in [0, 1].
        """
        found = float(self._score(model, batches))  # type: ignore[arg-type]
        if not 0 <= found <= 1:
            raise UserError(
                f"{{field}} gave {found}: a number in [0, 1] is needed, where higher is better",
                code="out_of_range",
                field="score",
            )
        return found


def _name(function: Any) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', function)}"
