"""What a network is for. A task of one's own is a subclass of `Task`, or an `OwnTask` of functions."""

from __future__ import annotations

from collections.abc import Callable

from amc_env.errors import UserError
from amc_env.tasks.base import Task
from amc_env.tasks.classification import Classification
from amc_env.tasks.multi_label import MultiLabel
from amc_env.tasks.own import OwnTask
from amc_env.tasks.regression import Regression
from amc_env.tasks.segmentation import Segmentation

__all__ = [
    "TASKS",
    "Classification",
    "MultiLabel",
    "OwnTask",
    "Regression",
    "Segmentation",
    "Task",
    "task_named",
]

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
