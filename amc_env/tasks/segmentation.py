"""A class for each pixel."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from amc_env.tasks.base import (
    TalliedTask,
    Tally,
    check_range,
    one_tensor,
    wrong_output,
    wrong_targets,
)
from amc_env.tasks.classification import divergence, softmax_root
from amc_env.validation import Natural, settings

IGNORED = -100
"""The label of pixels that do not count."""


@settings
class Segmentation(TalliedTask):
    """A class for each pixel: logits [N, classes, H, W] and labels [N, H, W]; mean IoU and cross entropy.

    One channel of logits tells two classes apart: the second is chosen where they are above 0. The score is the mean
    over classes of intersection / union, over the classes that there are in the labels.

    Attributes:
        ignore_index: The label of pixels that do not count, as well as -100.
        output: Which of the network's outputs counts.
    """

    ignore_index: Natural = 255
    output: int | str | None = None

    metric: ClassVar[str] = "mean IoU"

    def read(self, given: Any) -> Tensor:
        """Logits [N, classes, H, W]; one channel becomes two."""
        found: Tensor = super().read(given)
        if found.ndim > 2 and found.shape[1] == 1:
            return torch.cat([torch.zeros_like(found), found], 1)
        return found

    def targets(self, name: str, given: Any) -> Tensor:
        """Labels as int64 [N, H, W], -100 where they do not count; also from [N, 1, H, W].

        Raises:
            UserError: They are no integers, or of another shape.
        """
        labels = one_tensor(name, given)
        if labels.is_floating_point() or labels.ndim < 3:
            raise wrong_targets(
                name,
                f"targets of type {labels.dtype} and shape {list(labels.shape)}, but task=segmentation needs class numbers "
                "of pixels: integers in [N, H, W], such as masks.long()",
            )
        if labels.ndim == 4 and labels.shape[1] == 1:
            labels = labels.squeeze(1)
        labels = labels.to(torch.int64)
        return labels.masked_fill(labels == self.ignore_index, IGNORED)

    def check(self, name: str, outputs: Any, targets: Any) -> None:
        """Refuse outputs of another size than the labels, and labels outside of the classes."""
        if outputs.ndim != targets.ndim + 1 or outputs.shape[2:] != targets.shape[1:]:
            raise wrong_output(
                outputs,
                f"logits [N, classes, H, W] are needed for the labels {list(targets.shape)} of {name}",
            )
        check_range(name, targets, outputs.shape[1], IGNORED)

    def classes(self, outputs: Any) -> int:
        """Number of channels of logits."""
        return int(outputs.shape[1])

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Cross entropy, the mean over the pixels that count."""
        total: Tensor = F.cross_entropy(outputs, targets, ignore_index=IGNORED, reduction="sum")
        pixels: Tensor = (targets != IGNORED).sum()
        return total / pixels.clamp_min(1)

    def losses(self, outputs: Any, targets: Any) -> Tensor:
        """Cross entropy of every example, [N]: the mean over its pixels."""
        pixels: Tensor = F.cross_entropy(outputs, targets, ignore_index=IGNORED, reduction="none")
        per_example: Tensor = pixels.flatten(1).mean(1)
        return per_example

    def root(self, outputs: Tensor, signs: Tensor) -> Tensor:
        """That of classification for every pixel, by the root of their number."""
        return softmax_root(outputs, signs) / math.sqrt(outputs[0, 0].numel())

    def teacher_loss(self, outputs: Any, teacher: Any, temperature: float) -> Tensor:
        """T^2 KL(teacher || student) of a pixel, the mean over pixels."""
        total = divergence(outputs, teacher, temperature)
        return total / int(outputs[0, 0].numel())

    def tally(self) -> Tally:
        """Fills a confusion matrix."""
        return _MeanIoU()


class _MeanIoU(Tally):
    """A confusion matrix, [classes, classes]: labels by predictions."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: Tensor | int = 0
        self._classes = 0

    def _add(self, outputs: Tensor, targets: Tensor) -> None:
        self._classes = outputs.shape[1]
        valid = targets != IGNORED
        pairs = targets[valid] * self._classes + outputs.argmax(1)[valid]
        self._counts = pairs.bincount(minlength=self._classes**2) + self._counts

    def _score(self) -> float:
        assert isinstance(self._counts, Tensor)
        counts = self._counts.double().view(self._classes, self._classes)
        hits, there = counts.diagonal(), counts.sum(1)
        present = there > 0
        union = (there + counts.sum(0) - hits)[present]
        return float((hits[present] / union).mean()) if len(union) else 1.0
