"""Training: fine-tuning of a pruned network, and the first training of the small ones.

Only training images are read here: neither the search nor the test split.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from amc_env.errors import UserError, out_of_range
from amc_env.evaluation.precision import TrainingPrecision
from amc_env.graph.copying import forget_activations
from amc_env.graph.memory_format import training_format
from amc_env.inputs import Inputs, call, count, in_format, pieces
from amc_env.pruning.regularization import LossTerm
from amc_env.system import memory_for, out_of_memory, using_threads
from amc_env.tasks import Classification, Task
from search.data.base import Data
from search.data.loaders import seeded
from search.training.batches import AugmentedBatches, Batches
from search.training.distillation import Teacher, distillation_problems
from search.training.mixed_precision import in_float32, mixed_precision
from search.training.train_mode import callers_of_train_only, set_training
from search.training.training_file import TrainingFile

# A look at the loss makes a GPU wait for it, so not at every step.
STEPS_BETWEEN_CHECKS = 20
_LEAST_HALVED = 4
"""Examples of a batch that may be halved: batch norms need two."""

log = logging.getLogger(__name__)

_CLASSIFIER = Classification()
OnEpoch = Callable[[int, float, float, float], None]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained from random weights.

    Attributes:
        lr: peak learning rate, reached after `warmup_epochs`, then along a cosine to 0.
        seed: of the first weights, the order of images and dropout.
    """

    epochs: int
    lr: float
    batch_size: int = 64
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_epochs: int = 2
    seed: int = 0


def finetune(
    model: nn.Module,
    batches: Batches,
    *,
    epochs: int,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    warmup_epochs: float = 0.0,
    clip: float | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    on_epoch: OnEpoch | None = None,
    penalty: LossTerm | None = None,
    teacher: nn.Module | None = None,
    distillation: float = 0.0,
    temperature: float = 4.0,
    masks: Mapping[str, Tensor] | None = None,
    file: TrainingFile | None = None,
    task: Task = _CLASSIFIER,
    precision: TrainingPrecision | None = None,
) -> None:
    """SGD in place, cosine schedule by step down to 0; the last epoch's weights are kept, in eval mode.

    Layers that run in train mode only, as auxiliary heads do, are left out. The global random state is left as it was;
    dropout draws from `seed`. On the CPU the same seed, batches, thread count and processor give the same weights to the
    bit.

    Args:
        batches: on `device`, where the model is brought too.
        lr: peak learning rate, absolute.
        warmup_epochs: epochs in which the rate rises linearly to `lr`.
        clip: largest norm of the gradient of all weights together; None: 1 for networks without batch norms, whose
            repaired weights may be large, and no limit for others.
        on_epoch: called with (epoch from 1, mean loss with all its terms, learning rate of its last step,
            seconds).
        penalty: a term of the loss, of the model as it is at each step; in full precision.
        teacher: a network that the model learns from as well; a copy is used, in eval mode.
        distillation: the teacher's share of the loss, in [0, 1]; see `distillation_loss`. At 0 it is not run.
        temperature: that both networks' logits are divided by in the teacher's share.
        masks: for layers by name, a bool tensor like their weight: where it is False the weight is exactly 0
            from before the first step to after the last, whatever momentum and weight decay would do.
        file: keeps the state after each epoch; a killed training continues from there, to the same bits.
        task: says what the loss is; by default that of a classifier.
        precision: what the network computes in; weights and losses stay in float32. None: float16 on CUDA, elsewhere
            float32.

    Raises:
        UserError: a setting out of range, nothing to train, or a loss that is no longer finite.
        ValueError: a mask of a layer that is not there, or of another shape or type.
    """
    steps = len(batches)
    weights = [parameter for parameter in model.to(device).parameters() if parameter.requires_grad]
    _check_settings(epochs, lr, steps, len(weights), distillation, temperature, teacher)
    optimizer = torch.optim.SGD(weights, lr, momentum, 0, weight_decay, nesterov=momentum > 0)
    layout = training_format(model, batches.example)
    in_eval = callers_of_train_only(model, in_format(batches.example, layout))
    zeros = _Zeros(model, masks or {})
    source = _source(teacher, batches.example, distillation, temperature, task)
    place = torch.device(device)
    step = _Step(model, optimizer, layout, place, precision, zeros, penalty, task, source, clip)
    schedule = LearningRate(lr, epochs * steps, round(warmup_epochs * steps))
    with seeded(seed):
        for epoch in range(_resumed(file, step, batches), epochs):
            started = time.perf_counter()
            set_training(model, in_eval)
            loss = _epoch(step, batches, schedule, epoch)
            if on_epoch is not None:
                on_epoch(epoch + 1, loss, schedule((epoch + 1) * steps - 1), time.perf_counter() - started)
            if file is not None:
                file.save(epoch + 1, model, optimizer, step.scaler)
    forget_activations(model)
    model.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]


def _source(
    network: nn.Module | None, example: Inputs, share: float, temperature: float, task: Task
) -> Teacher | None:
    return Teacher(network, example, share, temperature, task) if network and share else None


def _dtype(precision: TrainingPrecision | None, device: torch.device) -> torch.dtype:
    if precision is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def _largest_gradient(model: nn.Module) -> float:
    return math.inf if any(isinstance(module, _BatchNorm) for module in model.modules()) else 1.0


@dataclass(frozen=True)
class LearningRate:
    """Learning rate of each step, from 0: linear to `peak` over `warmup` steps, then along a cosine to 0."""

    peak: float
    steps: int
    warmup: int

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class _Zeros:
    """Weights that are held at zero."""

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        modules = dict(model.named_modules())
        self.held: list[tuple[Tensor, Tensor]] = []
        for name, mask in masks.items():
            weight = getattr(modules.get(name), "weight", None)
            if weight is None or mask.dtype != torch.bool or mask.shape != weight.shape:
                has = "no weight" if weight is None else f"a weight of shape {list(weight.shape)}"
                raise ValueError(
                    f"mask of {name}: {mask.dtype} {list(mask.shape)}, but the layer of that name has {has}; "
                    "a bool tensor of its shape is needed"
                )
            # On the weight's device and in its memory layout.
            self.held.append((weight, torch.empty_like(weight, dtype=torch.bool).copy_(~mask)))
        self.hold()

    @torch.no_grad()
    def hold(self) -> None:
        """Zero what is masked, in place."""
        for weight, gone in self.held:
            weight.masked_fill_(gone, 0)


@dataclass(eq=False)
class _Step:
    """One step of SGD.

    Where memory is used up, a batch goes through the network in two halves, in this and all later steps. The gradient
    is that of the batch; batch norms take the statistics of each half.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    layout: torch.memory_format
    device: torch.device
    precision: TrainingPrecision | None
    zeros: _Zeros
    penalty: LossTerm | None
    task: Task
    teacher: Teacher | None
    clip: float | None
    halved: bool = False

    def __post_init__(self) -> None:
        self.limit = _largest_gradient(self.model) if self.clip is None else self.clip
        self.dtype = _dtype(self.precision, self.device)
        self.scaler = torch.amp.GradScaler(enabled=self.dtype is torch.float16)

    def __call__(self, inputs: Inputs, targets: Any, lr: float) -> Tensor:
        """The batch's mean loss, before the step."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self._gradients(inputs, targets)
        if math.isfinite(self.limit):
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.limit)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.zeros.hold()
        return loss

    def _gradients(self, inputs: Inputs, targets: Any) -> Tensor:
        """The batch's mean loss, whose gradients are added up in the weights."""
        if not self.halved and count(inputs) >= _LEAST_HALVED:
            self.optimizer.zero_grad(set_to_none=True)
            try:
                return self._backward(inputs, targets, 1.0)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            self.halved = True
            torch.cuda.empty_cache()
            log.warning("out of memory: batches of %d are trained on in two halves", count(inputs))
        self.optimizer.zero_grad(set_to_none=True)
        size = -(-count(inputs) // 2) if count(inputs) >= _LEAST_HALVED else count(inputs)
        with memory_for("training", "batch_size"):
            parts = zip(pieces(inputs, size), pieces(targets, size), strict=True)
            losses = [self._backward(*part, count(part[0]) / count(inputs)) for part in parts]
        return torch.stack(losses).sum()

    def _backward(self, inputs: Inputs, targets: Any, share: float) -> Tensor:
        """Adds the gradients of a batch's mean loss, or of this share of it."""
        with mixed_precision(self.device, self.dtype):
            loss = share * self._loss(inputs, targets)
        if self.penalty is not None:
            loss = loss + share * self.penalty(self.model)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _loss(self, inputs: Inputs, targets: Any) -> Tensor:
        outputs = in_float32(self.task.read(call(self.model, in_format(inputs, self.layout))))
        if self.teacher is None:
            return self.task.loss(outputs, targets)
        return self.teacher.loss(inputs, outputs, targets)


def _resumed(file: TrainingFile | None, step: _Step, batches: Batches) -> int:
    """Takes up the training on file, if there is one; the number of its epochs."""
    done = file.load(step.model, step.optimizer, step.scaler) if file is not None else 0
    for _ in range(
        done
    ):  # the batches that were trained on are drawn again, so that the next ones are the same
        deque(islice(batches, len(batches)), maxlen=0)
    if file is not None and done:
        file.restore_random_state()
    return done


def _epoch(step: _Step, batches: Batches, schedule: LearningRate, epoch: int) -> float:
    """One pass over the batches; the mean loss."""
    total = torch.zeros((), device=step.device)
    steps = len(batches)
    done = 0
    for inputs, targets in islice(batches, steps):
        total += step(inputs, targets, schedule(epoch * steps + done))
        done += 1
        if done % STEPS_BETWEEN_CHECKS == 0:
            _check_loss(float(total), epoch, done, schedule.peak)
    if done == 0:
        raise UserError(
            f"the training data gave no batch in epoch {epoch + 1}: its loader must start again each time",
            code="empty",
        )
    _check_loss(float(total), epoch, done, schedule.peak)
    return float(total) / done


def _check_loss(total: float, epoch: int, done: int, lr: float) -> None:
    if not math.isfinite(total):
        raise UserError(
            f"the loss is no longer finite by step {done} of epoch {epoch + 1}: "
            f"the learning rate {lr:g} is too large, or the data holds NaN; lower {{field}}",
            code="diverged",
            field="lr_fraction",
        )


def _check_settings(
    epochs: int,
    lr: float,
    steps: int,
    weights: int,
    distillation: float,
    temperature: float,
    teacher: nn.Module | None,
) -> None:
    problems = distillation_problems(distillation, temperature, teacher)
    if epochs < 0:
        problems.append(out_of_range("epochs", epochs, "at least 0"))
    if not 0 < lr < math.inf:
        problems.append(out_of_range("lr", lr, "a finite number above 0"))
    if steps == 0:
        problems.append(UserError("the training data gives no batches: at least one is needed", code="empty"))
    if weights == 0:
        problems.append(
            UserError("no parameter of the network requires gradients: nothing to train", code="cannot_train")
        )
    if problems:
        raise UserError.join(problems)


def forget_weights(model: nn.Module, seed: int) -> None:
    """New random weights in place, as the modules' classes draw them; what is frozen stays.

    Raises:
        UserError: a module has parameters that its class does not draw.
    """
    with seeded(seed):
        for name, module in model.named_modules():
            own = list(module.parameters(recurse=False))
            if own and not any(parameter.requires_grad for parameter in own):
                continue
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            elif own:
                raise UserError(
                    f"finetune.from_scratch=true: {name or type(module).__name__} has parameters and no "
                    "reset_parameters to initialise them",
                    code="unsupported",
                    field="finetune.from_scratch",
                )


def train(build: Callable[[], nn.Module], data: Data, recipe: Recipe) -> nn.Module:
    """A network trained on `data.train` from random weights, on the CPU, in eval mode.

    On one thread: the weights are then the same whatever number of threads the run has, and networks small
    enough to be trained here gain nothing from a second one.
    """
    with seeded(recipe.seed):
        model = build()
    batches = AugmentedBatches(data.train, data, recipe.batch_size, recipe.seed, "cpu")
    with using_threads(1):
        finetune(
            model,
            batches,
            epochs=recipe.epochs,
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            warmup_epochs=recipe.warmup_epochs,
            clip=math.inf,
            seed=recipe.seed,
        )
    return model
