"""Knowledge distillation: a pruned network learns from the original's outputs as well as from the labels.

Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, section 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from amc_env.errors import UserError, out_of_range
from amc_env.graph.copying import module_copy
from amc_env.graph.memory_format import fastest_format


def distillation_loss(
    logits: Tensor, soft: Tensor, labels: Tensor, share: float, temperature: float
) -> Tensor:
    """(1 - a) CE + a T^2 KL(teacher || student), both networks' probabilities softened by T; the batch's mean.

    T^2 keeps the gradient of the second term of one size whatever T is.

    Args:
        logits: the student's, [N, classes].
        soft: the teacher's, [N, classes].
        labels: int64 [N].
        share: a, in [0, 1].
        temperature: T, above 0.
    """
    student = F.log_softmax(logits.float() / temperature, dim=1)
    target = F.log_softmax(soft.float() / temperature, dim=1)
    divergence = F.kl_div(student, target, reduction="batchmean", log_target=True)
    return (1 - share) * F.cross_entropy(logits, labels) + share * temperature**2 * divergence


class Teacher:
    """A frozen copy of a network, in eval mode and in the memory layout that is fastest for it."""

    def __init__(self, network: nn.Module, example: Tensor, share: float, temperature: float) -> None:
        """Copy `network` to where `example` lies, which is two of its inputs."""
        self.network = module_copy(network).to(example.device).requires_grad_(False)
        self.layout = fastest_format(self.network, example)
        self.share = share
        self.temperature = temperature

    def loss(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """The distillation loss of a student that gave `logits` for `images`."""
        with torch.no_grad():
            soft = self.network(images.contiguous(memory_format=self.layout))
        return distillation_loss(logits, soft, labels, self.share, self.temperature)


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
