"""One class for each example."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from amc_env.errors import UserError
from amc_env.tasks.base import (
    TalliedTask,
    Tally,
    check_range,
    one_tensor,
    wrong_output,
    wrong_targets,
)
from amc_env.validation import settings


@settings
class Classification(TalliedTask):
    """One class for each example: logits [N, classes] and labels [N]; accuracy and cross entropy.

    Attributes:
        output: Which of the network's outputs counts.
    """

    output: int | str | None = None

    metric: ClassVar[str] = "accuracy"

    def targets(self, name: str, given: Any) -> Tensor:
        """Labels as int64 [N], from any integer type or bool, also of shape [N, 1].

        Raises:
            UserError: They are no class numbers, but targets of a regression or one row for each class.
        """
        labels = one_tensor(name, given)
        if labels.is_floating_point() or labels.is_complex():
            raise wrong_targets(
                name,
                f"labels of type {labels.dtype}, but a classifier needs class numbers: integers in [N]; one-hot rows "
                "become class numbers with labels.argmax(1). For other targets set task=regression or task=multi_label",
            )
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels.squeeze(1)
        if labels.ndim != 1:
            raise wrong_targets(
                name,
                f"labels of shape {list(labels.shape)}, but a classifier needs class numbers in [N]; one-hot rows become "
                "class numbers with labels.argmax(1). For other targets set task=multi_label or task=segmentation",
            )
        return labels.to(torch.int64)

    def check(self, name: str, outputs: Any, targets: Any) -> None:
        """Refuse outputs that are no logits [N, classes], and labels outside of the classes."""
        if outputs.ndim != 2:
            raise wrong_output(outputs, "a classifier gives logits [N, classes]; for another task set task=")
        if outputs.shape[1] < 2:
            raise UserError(
                "the network has one output, so it is no classifier over classes: give it an output for each class, or "
                "set task=multi_label or task=regression",
                code="outputs",
            )
        check_range(name, targets, outputs.shape[1])

    def classes(self, outputs: Any) -> int:
        """Number of logits."""
        return int(outputs.shape[1])

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(outputs, targets)

    def losses(self, outputs: Any, targets: Any) -> Tensor:
        """Cross entropy of every example, [N]."""
        return F.cross_entropy(outputs, targets, reduction="none")

    def root(self, outputs: Tensor, signs: Tensor) -> Tensor:
        """(diag(sqrt(p)) - p sqrt(p)') @ signs for probabilities p."""
        return softmax_root(outputs, signs)

    def teacher_loss(self, outputs: Any, teacher: Any, temperature: float) -> Tensor:
        """T^2 KL(teacher || student), both networks' probabilities softened by T; the batch's mean."""
        return divergence(outputs, teacher, temperature)

    def tally(self) -> Tally:
        """Counts hits."""
        return _Accuracy()


class _Accuracy(Tally):
    """The share of examples whose largest logit is their label."""

    def __init__(self) -> None:
        super().__init__()
        self._examples = 0
        self._hits: Tensor | int = 0

    def _add(self, outputs: Tensor, targets: Tensor) -> None:
        self._hits = (outputs.argmax(1) == targets).sum() + self._hits
        self._examples += len(targets)

    def _score(self) -> float:
        return int(self._hits) / self._examples


def divergence(outputs: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of logits [N, classes, ...], summed over all but the first dimension, its mean."""
    student = F.log_softmax(outputs.float() / temperature, dim=1)
    wanted = F.log_softmax(teacher.float() / temperature, dim=1)
    return temperature**2 * F.kl_div(student, wanted, reduction="batchmean", log_target=True)


def softmax_root(outputs: Tensor, signs: Tensor) -> Tensor:
    """S @ signs with S S' = diag(p) - p p', the curvature of the cross entropy at logits with probabilities p."""
    chances = outputs.softmax(1)
    signs = signs * chances.sqrt()
    return signs - chances * signs.sum(1, keepdim=True)
