"""Knowledge distillation: a pruned network learns from the original's outputs as well as from the labels.

Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, section 2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from amc_env.errors import UserError, out_of_range
from amc_env.graph.copying import module_copy
from amc_env.graph.memory_format import fastest_format
from amc_env.inputs import Inputs, call, device_of, in_format
from amc_env.tasks import Classification, Task
from search.training.mixed_precision import in_float32


def distillation_loss(
    outputs: Any,
    teacher: Any,
    targets: Any,
    share: float,
    temperature: float,
    task: Task | None = None,
) -> Tensor:
    """(1 - a) loss + a teacher_loss of a task; of a classifier (1 - a) CE + a T^2 KL(teacher || student).

    T^2 keeps the gradient of the second term of one size whatever T is.

    Args:
        outputs: the student's, as the task reads them.
        teacher: the teacher's.
        targets: of the examples.
        share: a, in [0, 1].
        temperature: T, above 0.
        task: says what the losses are; by default those of a classifier.
    """
    task = task or Classification()
    return (1 - share) * task.loss(outputs, targets) + share * task.teacher_loss(
        outputs, teacher, temperature
    )


class Teacher:
    """A frozen copy of a network, in eval mode and in the memory layout that is fastest for it."""

    def __init__(
        self, network: nn.Module, example: Inputs, share: float, temperature: float, task: Task | None = None
    ) -> None:
        """Copy `network` to where `example` lies, which is two of its inputs."""
        self.network = module_copy(network).to(device_of(example)).requires_grad_(False)
        self.layout = fastest_format(self.network, example)
        self.share = share
        self.temperature = temperature
        self.task = task or Classification()

    def loss(self, inputs: Inputs, outputs: Any, targets: Any) -> Tensor:
        """The distillation loss of a student that gave `outputs` for `inputs`."""
        with torch.no_grad():
            soft = in_float32(self.task.read(call(self.network, in_format(inputs, self.layout))))
        return distillation_loss(outputs, soft, targets, self.share, self.temperature, self.task)


def distillation_problems(share: float, temperature: float, teacher: nn.Module | None) -> list[UserError]:
    """What is wrong with the settings, a message each."""
    problems = []
    if not 0 <= share <= 1:
        problems.append(out_of_range("distillation", share, "in [0, 1]"))
    elif share > 0 and teacher is None:
        problems.append(out_of_range("distillation", share, "0 without a teacher"))
    if not 0 < temperature < math.inf:
        problems.append(out_of_range("temperature", temperature, "a finite number above 0"))
    return problems
