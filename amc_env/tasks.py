"""What a network is for: how its output is read, its loss for fine-tuning, and its score for the search.

A score is in [0, 1], and higher is better. It is computed from sums that are fed batch by batch, on the device. A task of
one's own is a subclass of `Task`, or an `OwnTask` of functions.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from amc_env.errors import UserError
from amc_env.inputs import Inputs, call, count, output_of, to_dtype
from amc_env.validation import Natural, settings

Batches = Iterable[tuple[Inputs, Any]]
"""Inputs and targets of one batch after another."""
Entry = int | str | None
"""Which of a network's outputs counts: an index, a name, or the first (``logits`` where there is such a name)."""
IGNORED = -100
"""The label of pixels that do not count."""


class Tally(ABC):
    """Adds up what a score is made of, without waiting for a graphics processor until the score is read."""

    def __init__(self) -> None:
        self._broken: Tensor | bool = False

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        self._broken = outputs.isnan().any() | self._broken
        self._add(outputs, targets)

    @property
    def score(self) -> float:
        """Of all that was added, in [0, 1].

        Raises:
            UserError: An output is not a number.
        """
        if self._broken:
            raise UserError(
                "the network's outputs are not numbers (NaN): look for NaN in its weights and in the data"
            )
        return self._score()

    @abstractmethod
    def _add(self, outputs: Tensor, targets: Tensor) -> None: ...

    @abstractmethod
    def _score(self) -> float: ...


class Task(ABC):
    """What a network is for.

    Attributes:
        output: Which of the network's outputs counts, where it gives several.
    """

    output: Entry

    @property
    @abstractmethod
    def metric(self) -> str:
        """The name of the score, such as ``accuracy``."""

    def read(self, given: Any) -> Any:
        """What loss and score are given of a network's output.

        Raises:
            UserError: There is no such entry, or it is no tensor.
        """
        return entry_of(given, self.output)

    def targets(self, name: str, given: Any) -> Any:
        """Targets as `loss` and the score take them.

        Args:
            name: Where they come from, such as ``train_loader``.
            given: A batch of them.

        Raises:
            UserError: They do not belong to this task.
        """
        return given

    def check(self, name: str, outputs: Any, targets: Any) -> None:  # noqa: B027 -- a task of one's own need not
        """Compare outputs of a few examples with all targets of a split.

        Raises:
            UserError: They do not fit.
        """

    def classes(self, outputs: Any) -> int:
        """Number of classes that the outputs tell apart; 0 where the task has none."""
        return 0

    @abstractmethod
    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """The loss of a batch, a scalar: the mean over its examples."""

    def losses(self, outputs: Any, targets: Any) -> Tensor:
        """The loss of every example, [N], or the sum of them, a scalar."""
        return self.loss(outputs, targets) * count(targets)

    def root(self, outputs: Tensor, signs: Tensor) -> Tensor:
        """S @ signs for every example, in the shape of its outputs, where S S' is the loss's curvature at its outputs.

        Raises:
            UserError: The task does not know it.
        """
        raise UserError(
            "criterion=obd with hessian=gauss_newton needs the curvature of the loss, which is not known for "
            f"{type(self).__name__}: set criterion.hessian=fisher",
            code="task",
            field="criterion.hessian",
        )

    def teacher_loss(self, outputs: Any, teacher: Any, temperature: float) -> Tensor:
        """How far outputs are from a teacher's, a scalar.

        Raises:
            UserError: The task has no such loss.
        """
        raise UserError(
            f"{type(self).__name__} has no loss for distillation: set {{field}}=0, or give the task a teacher_loss",
            code="task",
            field="distillation",
        )

    @abstractmethod
    def score(self, model: nn.Module | Callable[..., Any], batches: Batches) -> float:
        """The score of a network, in [0, 1]; it is run in the mode it is in."""


class TalliedTask(Task):
    """A task whose score is computed from outputs and targets alone."""

    @abstractmethod
    def tally(self) -> Tally:
        """What adds up a score."""

    def score(self, model: nn.Module | Callable[..., Any], batches: Batches) -> float:
        """The score of a network, in [0, 1]; it is run in the mode it is in."""
        tally = self.tally()
        for inputs, targets in batches:
            tally.add(self.read(call(model, inputs)), targets)
        return tally.score


# ------------------------------------------------------------------------------------------- classification


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
        labels = _tensor(name, given)
        if labels.is_floating_point() or labels.is_complex():
            raise _wrong_targets(
                name,
                f"labels of type {labels.dtype}, but a classifier needs class numbers: integers in [N]; one-hot rows "
                "become class numbers with labels.argmax(1). For other targets set task=regression or task=multi_label",
            )
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels.squeeze(1)
        if labels.ndim != 1:
            raise _wrong_targets(
                name,
                f"labels of shape {list(labels.shape)}, but a classifier needs class numbers in [N]; one-hot rows become "
                "class numbers with labels.argmax(1). For other targets set task=multi_label or task=segmentation",
            )
        return labels.to(torch.int64)

    def check(self, name: str, outputs: Any, targets: Any) -> None:
        """Refuse outputs that are no logits [N, classes], and labels outside of the classes."""
        if outputs.ndim != 2:
            raise _wrong_output(outputs, "a classifier gives logits [N, classes]; for another task set task=")
        if outputs.shape[1] < 2:
            raise UserError(
                "the network has one output, so it is no classifier over classes: give it an output for each class, or "
                "set task=multi_label or task=regression",
                code="outputs",
            )
        _check_range(name, targets, outputs.shape[1])

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
        return _softmax_root(outputs, signs)

    def teacher_loss(self, outputs: Any, teacher: Any, temperature: float) -> Tensor:
        """T^2 KL(teacher || student), both networks' probabilities softened by T; the batch's mean."""
        return _divergence(outputs, teacher, temperature)

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


def _divergence(outputs: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    student = F.log_softmax(outputs.float() / temperature, dim=1)
    wanted = F.log_softmax(teacher.float() / temperature, dim=1)
    return temperature**2 * F.kl_div(student, wanted, reduction="batchmean", log_target=True)


def _softmax_root(outputs: Tensor, signs: Tensor) -> Tensor:
    chances = outputs.softmax(1)
    signs = signs * chances.sqrt()
    return signs - chances * signs.sum(1, keepdim=True)


# ---------------------------------------------------------------------------------------------- multi-label


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
        found = _tensor(name, given).to(torch.float32)
        found = found.unsqueeze(1) if found.ndim == 1 else found
        if found.ndim != 2 or not bool(((found == 0) | (found == 1)).all()):
            raise _wrong_targets(
                name,
                f"targets of shape {list(found.shape)}, but task=multi_label needs [N, labels] of 0 and 1",
            )
        return found

    def check(self, name: str, outputs: Any, targets: Any) -> None:
        """Refuse outputs that are not of the targets' shape."""
        if outputs.ndim != 2 or outputs.shape[1] != targets.shape[1]:
            raise _wrong_output(
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


# ----------------------------------------------------------------------------------------------- regression


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
        found = _tensor(name, given).to(torch.float32)
        if not bool(found.isfinite().all()):
            raise _wrong_targets(name, "targets that are infinite or not numbers (NaN)")
        return found

    def check(self, name: str, outputs: Any, targets: Any) -> None:
        """Refuse outputs that hold another number of values than the targets of an example."""
        if outputs[0].numel() != targets[0].numel():
            raise _wrong_output(
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


# --------------------------------------------------------------------------------------------- segmentation


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
        labels = _tensor(name, given)
        if labels.is_floating_point() or labels.ndim < 3:
            raise _wrong_targets(
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
            raise _wrong_output(
                outputs,
                f"logits [N, classes, H, W] are needed for the labels {list(targets.shape)} of {name}",
            )
        _check_range(name, targets, outputs.shape[1], IGNORED)

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
        return _softmax_root(outputs, signs) / math.sqrt(outputs[0, 0].numel())

    def teacher_loss(self, outputs: Any, teacher: Any, temperature: float) -> Tensor:
        """T^2 KL(teacher || student) of a pixel, the mean over pixels."""
        total = _divergence(outputs, teacher, temperature)
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


# ---------------------------------------------------------------------------------------------- one's own


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


TASKS: dict[str, Callable[[], Task]] = {
    "classification": Classification,
    "multi_label": MultiLabel,
    "regression": Regression,
    "segmentation": Segmentation,
}
"""The tasks that have a name."""


def task_named(task: str | Task) -> Task:
    """The task of a name; a task is taken as it is.

    Raises:
        UserError: There is no such task.
    """
    if isinstance(task, Task):
        return task
    if task not in TASKS:
        raise UserError(
            f"{{field}}={task!r} must be one of {', '.join(TASKS)}, or a Task",
            code="out_of_range",
            field="task",
        )
    return TASKS[task]()


def entry_of(given: Any, entry: Entry) -> Tensor:
    """`amc_env.inputs.output_of` with a refusal in place of its errors."""
    try:
        return output_of(given, entry)
    except (KeyError, TypeError, StopIteration) as error:
        reason = str(error.args[0]) if error.args else "it returns nothing"
        there = f"; it returns {', '.join(map(str, given))}" if isinstance(given, dict) else ""
        raise UserError(
            f"the network's output cannot be read: {reason}{there}. Name the entry that counts by {{field}}, an index or a "
            "name",
            code="output",
            field="task.output",
        ) from error


def _tensor(name: str, given: Any) -> Tensor:
    if not isinstance(given, Tensor):
        raise _wrong_targets(name, f"targets of type {type(given).__name__}, but one tensor is needed")
    return given


def _wrong_targets(name: str, reason: str) -> UserError:
    return UserError(f"{name} gives {reason}", code="labels", field=name)


def _wrong_output(outputs: Tensor, needed: str) -> UserError:
    return UserError(f"the network's output has shape {list(outputs.shape)}: {needed}", code="wrong_output")


def _check_range(name: str, labels: Tensor, classes: int, ignored: int | None = None) -> None:
    wrong = (labels < 0) | (labels >= classes)
    if ignored is not None:
        wrong &= labels != ignored
    if bool(wrong.any()):
        place = wrong.nonzero()[0].tolist()
        raise UserError(
            f"{name}: {int(wrong.sum())} labels outside 0..{classes - 1}, the first is {int(labels[tuple(place)])} at "
            f"row {place[0]}",
            code="labels",
            field=name,
        )
