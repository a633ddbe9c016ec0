"""Scores and losses of the tasks, by hand and against scikit-learn and autograd."""

import math
from collections.abc import Callable

import pytest
import torch
from refusals import refused
from sklearn import metrics
from torch import Tensor, nn

from amc_env.errors import UserError
from amc_env.inputs import call
from amc_env.tasks import (
    Classification,
    MultiLabel,
    OwnTask,
    Regression,
    Segmentation,
    Task,
    task_named,
)
from amc_env.tasks.base import TalliedTask


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def score(task: TalliedTask, outputs: Tensor, targets: Tensor, size: int = 4) -> float:
    """In several batches, the outputs being the inputs."""
    pairs = zip(outputs.split(size), task.targets("x", targets).split(size), strict=True)
    return task.score(nn.Identity(), pairs)


LABELS = torch.randint(3, (13,), generator=torch.Generator().manual_seed(1))
MASKS = torch.randint(3, (5, 4, 4), generator=torch.Generator().manual_seed(2))


def test_accuracy() -> None:
    logits = drawn(13, 3)
    assert score(Classification(), logits, LABELS) == metrics.accuracy_score(LABELS, logits.argmax(1))


def test_micro_f1() -> None:
    logits, targets = drawn(13, 5), drawn(13, 5, seed=1) > 0.5
    wanted = metrics.f1_score(targets.int(), (logits > 0).int(), average="micro")
    assert score(MultiLabel(), logits, targets) == pytest.approx(wanted)
    assert score(MultiLabel(), -torch.ones(4, 2), torch.zeros(4, 2)) == 1.0


@pytest.mark.parametrize("shape", [(13,), (13, 1), (13, 3), (13, 2, 4)])
def test_r2(shape: tuple[int, ...]) -> None:
    targets = 1e3 + drawn(*shape)
    outputs = (targets + 0.3 * drawn(*shape, seed=1)).reshape(13, -1)
    rows = targets.reshape(13, -1).numpy()
    wanted = metrics.r2_score(rows, outputs.numpy(), multioutput="variance_weighted")
    assert score(Regression(), outputs, targets) == pytest.approx(wanted, abs=1e-5)
    assert score(Regression(), -targets, targets) == 0.0  # cut off
    assert score(Regression(), torch.ones(5), torch.ones(5)) == 1.0


def test_mean_iou_is_over_the_classes_that_there_are() -> None:
    labels = torch.tensor([[[0, 0, 1, 255]]])
    logits = torch.nn.functional.one_hot(torch.tensor([[[0, 1, 1, 2]]]), 4).movedim(-1, 1).float()
    assert score(Segmentation(), logits, labels) == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert score(Segmentation(), torch.tensor([[[[-1.0, 1, 1, 1]]]]), labels) == pytest.approx(
        (1 / 2 + 1 / 2) / 2
    )
    logits = drawn(5, 3, 4, 4)
    wanted = metrics.jaccard_score(MASKS.flatten(), logits.argmax(1).flatten(), average="macro")
    assert score(Segmentation(), logits, MASKS, size=2) == pytest.approx(wanted)


CASES: list[tuple[TalliedTask, Tensor, Tensor]] = [
    (Classification(), drawn(5, 3), LABELS[:5]),
    (MultiLabel(), drawn(5, 3), (drawn(5, 3, seed=1) > 0).float()),
    (Regression(), drawn(5, 3), drawn(5, 3, seed=1)),
    (Segmentation(), drawn(5, 3, 4, 4), MASKS),
]
ALL = pytest.mark.parametrize(("task", "outputs", "targets"), CASES, ids=lambda x: type(x).__name__)


@ALL
def test_nan_is_refused(task: TalliedTask, outputs: Tensor, targets: Tensor) -> None:
    broken = outputs.clone()
    broken[0, 0] = math.nan
    with refused("not_finite", ""):
        score(task, broken, targets)


@ALL
def test_the_loss_is_the_mean_of_the_examples_losses(
    task: TalliedTask, outputs: Tensor, targets: Tensor
) -> None:
    torch.testing.assert_close(task.losses(outputs, targets).sum() / 5, task.loss(outputs, targets))
    torch.testing.assert_close(
        task.losses(outputs, targets)[1:2].sum(), task.loss(outputs[1:2], targets[1:2])
    )


@ALL
def test_a_root_of_the_loss_s_curvature(task: TalliedTask, outputs: Tensor, targets: Tensor) -> None:
    """S S' summed over the columns of S, which unit vectors pick, is the Hessian of cross entropies and squares."""
    one, target = outputs[:1].double(), targets[:1]
    target = target.double() if target.is_floating_point() else target
    size = one.numel()
    columns = [task.root(one, unit.view_as(one)).flatten() for unit in torch.eye(size, dtype=torch.float64)]
    s = torch.stack(columns, 1)
    wanted = torch.autograd.functional.hessian(lambda z: task.losses(z, target).sum(), one).view(size, size)
    torch.testing.assert_close(s @ s.T, wanted, rtol=1e-5, atol=1e-7)


@ALL
def test_nothing_is_to_be_learnt_from_oneself(task: TalliedTask, outputs: Tensor, targets: Tensor) -> None:
    student = outputs.clone().requires_grad_()
    loss = task.teacher_loss(student, outputs, 3.0)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert gradient.abs().max() < 1e-6
    assert task.teacher_loss(outputs + drawn(*outputs.shape, seed=5), outputs, 3.0) > 1e-3


@pytest.mark.parametrize(
    ("task", "targets"),
    [
        (Classification(), torch.rand(4)),
        (Classification(), torch.eye(4).long()),
        (MultiLabel(), torch.tensor([[0.5, 1.0]])),
        (MultiLabel(), torch.zeros(2, 3, 4)),
        (Regression(), torch.tensor([math.inf])),
        (Segmentation(), torch.zeros(2, 4, 4)),
        (Segmentation(), torch.zeros(2, dtype=torch.int64)),
    ],
)
def test_targets_of_another_task_are_refused(task: Task, targets: Tensor) -> None:
    with refused("labels", "train_loader"):
        task.targets("train_loader", targets)


@pytest.mark.parametrize(
    ("task", "outputs", "targets", "code"),
    [
        (Classification(), torch.zeros(2, 3, 4), torch.tensor([0, 1]), "wrong_output"),
        (Classification(), torch.zeros(2, 1), torch.tensor([0, 1]), "outputs"),
        (Classification(), torch.zeros(2, 3), torch.tensor([0, 3]), "labels"),
        (MultiLabel(), torch.zeros(2, 3), torch.zeros(2, 4), "wrong_output"),
        (Regression(), torch.zeros(2, 3), torch.zeros(2), "wrong_output"),
        (Segmentation(), torch.zeros(2, 3, 4, 4), torch.zeros(2, 2, 2), "wrong_output"),
        (Segmentation(), torch.zeros(2, 3, 1, 1), torch.full((2, 1, 1), 3), "labels"),
    ],
)
def test_outputs_that_do_not_fit_the_targets_are_refused(
    task: Task, outputs: Tensor, targets: Tensor, code: str
) -> None:
    with pytest.raises(UserError) as caught:
        task.check("val", outputs, targets)
    assert caught.value.code == code


@pytest.mark.parametrize("given", [{"a": 1}, (), None, {}, "text"])
def test_outputs_without_a_tensor_are_refused(given: object) -> None:
    with refused("output", "task.output"):
        Classification().read(given)


def test_the_entry_that_counts_is_read() -> None:
    a, b = torch.zeros(2), torch.ones(2)
    assert Regression().read((a, b)) is a
    assert Regression(output=1).read((a, b)) is b
    assert Regression().read({"loss": a, "logits": b}) is b
    assert Regression(output="loss").read({"loss": a, "logits": b}) is a


def own(function: Callable[..., float]) -> OwnTask:
    return OwnTask(function, lambda outputs, targets: (outputs - targets).mean(), metric="luck")


def test_a_task_of_functions() -> None:
    task = own(lambda model, batches: float(sum(call(model, x).sum() for x, _ in batches)))
    assert (task.metric, task.score(nn.Identity(), [(torch.full((2,), 0.25), None)])) == ("luck", 0.5)
    assert task.losses(torch.ones(4), torch.zeros(4)) == 4
    with refused("out_of_range", "score"):
        own(lambda model, batches: 2.0).score(nn.Identity(), [])
    with refused("task", "distillation"):
        task.teacher_loss(torch.ones(1), torch.ones(1), 1.0)
    with refused("task", "criterion.hessian"):
        task.root(torch.ones(1), torch.ones(1))


def test_tasks_have_names() -> None:
    assert task_named("regression") == Regression()
    with refused("out_of_range", "task"):
        task_named("divination")
