"""Numbers for each example."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from amc_env.tasks.base import (
    TalliedTask,
    Tally,
    one_tensor,
    wrong_output,
    wrong_targets,
)
from amc_env.validation import settings


@settings
class Regression(TalliedTask):
    """Numbers for each example: outputs and targets of one shape, [N], [N, D] or any other; R2 and squared error.

    R2 is 1 - sum (y - f)^2 / sum (y - mean)^2, cut off at 0, with a mean for each of several outputs and both sums over
    all of them.

    Attributes:
        output: Which of the network's outputs counts.
    """

    output: int | str | None = None

    metric: ClassVar[str] = "R2"

    def targets(self, name: str, given: Any) -> Tensor:
        """Targets as float32.

        Raises:
            UserError: They are not finite.
        """
        found = one_tensor(name, given).to(torch.float32)
        if not bool(found.isfinite().all()):
            raise wrong_targets(name, "targets that are infinite or not numbers (NaN)")
        return found

    def check(self, name: str, outputs: Any, targets: Any) -> None:
        """Refuse outputs that hold another number of values than the targets of an example."""
        if outputs[0].numel() != targets[0].numel():
            raise wrong_output(
                outputs,
                f"the targets of {name} have shape {list(targets.shape)}; both must hold the same values",
            )

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """The mean squared error."""
        return F.mse_loss(outputs, targets.reshape(outputs.shape))

    def losses(self, outputs: Any, targets: Any) -> Tensor:
        """The mean squared error of every example, [N]."""
        errors: Tensor = outputs - targets.reshape(outputs.shape)
        return errors.square().reshape(len(outputs), -1).mean(1)

    def root(self, outputs: Tensor, signs: Tensor) -> Tensor:
        """sqrt(2 / values of an example)."""
        return signs * math.sqrt(2 / outputs[0].numel())

    def teacher_loss(self, outputs: Any, teacher: Any, temperature: float) -> Tensor:
        """The mean squared error to the teacher's outputs; the temperature does not matter."""
        return F.mse_loss(outputs, teacher)

    def tally(self) -> Tally:
        """Adds up squares."""
        return _R2()


class _R2(Tally):
    """Squared errors, and squared deviations of the targets from their means; in float64."""

    def __init__(self) -> None:
        super().__init__()
        self._errors: Tensor | float = 0.0
        self._deviations: Tensor | float = 0.0
        self._mean: Tensor | float = 0.0
        self._examples = 0

    def _add(self, outputs: Tensor, targets: Tensor) -> None:
        wanted = targets.double().flatten(1) if targets.ndim > 1 else targets.double()[:, None]
        errors = outputs.double().reshape(wanted.shape) - wanted
        self._errors = errors.square().sum() + self._errors
        # The means of both parts are joined as by Chan et al., "Algorithms for Computing the Sample Variance", 1983.
        mean, here = wanted.mean(0), len(wanted)
        gap, total = mean - self._mean, self._examples + here
        between = gap.square().sum() * (self._examples * here / total)
        self._deviations = (wanted - mean).square().sum() + between + self._deviations
        self._mean = gap * (here / total) + self._mean
        self._examples = total

    def _score(self) -> float:
        errors, deviations = float(self._errors), float(self._deviations)
        if deviations == 0:
            return float(errors == 0)
        return max(0.0, 1 - errors / deviations)
