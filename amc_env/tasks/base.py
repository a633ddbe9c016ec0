"""What a network is for: how its output is read, its loss for fine-tuning, and its score for the search.

A score is in [0, 1], and higher is better. It is computed from sums that are fed batch by batch, on the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from amc_env.errors import UserError
from amc_env.inputs import Inputs, call, count, output_of

Batches = Iterable[tuple[Inputs, Any]]
"""Inputs and targets of one batch after another."""
Entry = int | str | None
"""Which of a network's outputs counts: an index, a name, or the first (``logits`` where there is such a name)."""


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
                "the network's outputs are not numbers (NaN): look for NaN in its weights and in the data",
                code="not_finite",
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

    @property
    def distils(self) -> bool:
        """Whether the task has a `teacher_loss`."""
        return type(self).teacher_loss is not Task.teacher_loss

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


def one_tensor(name: str, given: Any) -> Tensor:
    """Targets that are one tensor.

    Raises:
        UserError: They are not.
    """
    if not isinstance(given, Tensor):
        raise wrong_targets(name, f"targets of type {type(given).__name__}, but one tensor is needed")
    return given


def wrong_targets(name: str, reason: str) -> UserError:
    """Refuses targets."""
    return UserError(f"{name} gives {reason}", code="labels", field=name)


def wrong_output(outputs: Tensor, needed: str) -> UserError:
    """Refuses a network's output."""
    return UserError(f"the network's output has shape {list(outputs.shape)}: {needed}", code="wrong_output")


def check_range(name: str, labels: Tensor, classes: int, ignored: int | None = None) -> None:
    """Checks that labels are in 0..classes-1, or are ``ignored``.

    Raises:
        UserError: They are not.
    """
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
