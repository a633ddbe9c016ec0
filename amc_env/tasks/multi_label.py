"""Any number of labels for each example."""

from __future__ import annotations

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
class MultiLabel(TalliedTask):
    """Any number of labels for each example: logits [N, labels] and targets [N, labels] of 0 and 1.

    The score is micro F1 at a probability of one half: hits count for all labels together, so that the many absent labels
    of each example do not hide the missed ones. The loss is binary cross entropy.

    Attributes:
        output: Which of the network's outputs counts.
    """

    output: int | str | None = None

    metric: ClassVar[str] = "micro F1"

    def targets(self, name: str, given: Any) -> Tensor:
        """Targets as float32 [N, labels], from any type; [N] is one label."""
        found = one_tensor(name, given).to(torch.float32)
        found = found.unsqueeze(1) if found.ndim == 1 else found
        if found.ndim != 2 or not bool(((found == 0) | (found == 1)).all()):
            raise wrong_targets(
                name,
                f"targets of shape {list(found.shape)}, but task=multi_label needs [N, labels] of 0 and 1",
            )
        return found

    def check(self, name: str, outputs: Any, targets: Any) -> None:
        """Refuse outputs that are not of the targets' shape."""
        if outputs.ndim != 2 or outputs.shape[1] != targets.shape[1]:
            raise wrong_output(
                outputs, f"one logit is needed for each of the {targets.shape[1]} labels of {name}"
            )

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Binary cross entropy, the mean over examples and labels."""
        return F.binary_cross_entropy_with_logits(outputs, targets)

    def losses(self, outputs: Any, targets: Any) -> Tensor:
        """Binary cross entropy of every example, [N]: the mean over labels."""
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(1)

    def root(self, outputs: Tensor, signs: Tensor) -> Tensor:
        """sqrt(p (1 - p) / labels) for probabilities p."""
        chances = outputs.sigmoid()
        return signs * (chances * (1 - chances) / outputs.shape[1]).sqrt()

    def teacher_loss(self, outputs: Any, teacher: Any, temperature: float) -> Tensor:
        """T^2 times the binary divergence from the teacher's probabilities, both softened by T."""
        wanted = teacher.float() / temperature
        soft = wanted.sigmoid()
        cross = F.binary_cross_entropy_with_logits(outputs.float() / temperature, soft)
        entropy = F.binary_cross_entropy_with_logits(wanted, soft)
        return temperature**2 * (cross - entropy)

    def tally(self) -> Tally:
        """Counts hits, false alarms and misses."""
        return _MicroF1()


class _MicroF1(Tally):
    """2 hits / (2 hits + false alarms + misses); 1 where there is nothing to find and nothing is found."""

    def __init__(self) -> None:
        super().__init__()
        self._hits: Tensor | int = 0
        self._marked: Tensor | int = 0

    def _add(self, outputs: Tensor, targets: Tensor) -> None:
        found, wanted = outputs > 0, targets > 0.5
        self._hits = (found & wanted).sum() + self._hits
        self._marked = found.sum() + wanted.sum() + self._marked

    def _score(self) -> float:
        return 2 * int(self._hits) / int(self._marked) if int(self._marked) else 1.0
