"""Augmentation is a shift and a flip, draws are the batches' own, and a seed gives the same weights twice."""

import copy
import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from networks import network, traced
from refusals import refused
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from amc_env.errors import UserError
from amc_env.graph.layers import keeps_of
from amc_env.graph.surgery import resize
from amc_env.graph.tracing import trace
from amc_env.pruning.candidate import widen
from amc_env.pruning.regularization import L1, L2, BNScale, GroupLasso, Regularization
from search.data.base import Data, Split
from search.data.loaders import from_loaders
from search.models.resnet import ResNet
from search.training.batches import AugmentedBatches, LoaderBatches, crop_and_flip, training_batches
from search.training.finetune import LearningRate, Recipe, finetune, forget_weights, train


class FlattenByView(nn.Module):
    """A network as users write it: `view` on feature maps, which does not run in channels-last."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(4 * 64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.dropout(F.relu(self.conv(x))).view(x.shape[0], -1))


def state_after(data: Data, seed: int = 0, epochs: int = 2, dropout: float = 0.0) -> dict[str, torch.Tensor]:
    """Weights after fine-tuning one and the same network."""
    torch.manual_seed(1)
    model = FlattenByView(dropout) if dropout else ResNet(8, classes=4)
    batches = AugmentedBatches(data.train, data, 16, 0 if dropout else seed, "cpu")
    finetune(model, batches, epochs=epochs, lr=0.05, seed=seed)
    return model.state_dict()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, second[key]) for key, value in first.items())


# ---------------------------------------------------------------------------------------------- augmentation


def test_every_augmented_image_is_a_shift_and_flip_of_its_original() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (200, 3, 8, 8), generator=generator, dtype=torch.uint8)
    augmented = crop_and_flip(images, generator)
    padded = F.pad(images, (4, 4, 4, 4))
    used = set()
    for original, result in zip(padded, augmented, strict=True):
        crops = {
            (top, left, flip): crop.flip(2) if flip else crop
            for top, left, flip in itertools.product(range(9), range(9), (False, True))
            for crop in [original[:, top : top + 8, left : left + 8]]
        }
        matches = [key for key, crop in crops.items() if torch.equal(crop, result)]
        assert matches
        used.update(matches)
    assert {top for top, _, _ in used} == {left for _, left, _ in used} == set(range(9))
    assert {flip for _, _, flip in used} == {False, True}


def test_batches_cover_the_split_once_and_change_order(small_data: Data) -> None:
    marked = Split(torch.arange(64, dtype=torch.float32).view(-1, 1, 1, 1), torch.arange(64))
    batches = AugmentedBatches(marked, small_data, 16, 0, "cpu")
    epochs = [torch.cat([labels for _, labels in batches]).tolist() for _ in range(2)]
    assert len(batches) == 4
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(64))
    assert epochs[0] != epochs[1]
    for images, labels in batches:
        assert torch.equal(images.flatten().long(), labels)


def test_batches_are_normalised_and_augmented_only_where_asked(small_data: Data) -> None:
    for data in (small_data, replace(small_data, augment=True)):
        images, labels = next(iter(AugmentedBatches(data.train, data, 64, 0, "cpu")))
        order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
        assert torch.equal(labels, data.train.targets[order])
        untouched = torch.equal(images, data.normalise(data.train.inputs[order]))
        assert untouched is not data.augment
        assert images.dtype == torch.float32


def test_an_incomplete_last_batch_is_left_out_and_a_small_split_is_one_batch(small_data: Data) -> None:
    assert [len(labels) for _, labels in AugmentedBatches(small_data.train, small_data, 30, 0, "cpu")] == [
        30,
        30,
    ]
    assert [len(labels) for _, labels in AugmentedBatches(small_data.train, small_data, 500, 0, "cpu")] == [
        64
    ]
    with refused("out_of_range", "batch_size"):
        AugmentedBatches(small_data.train, small_data, 0, 0, "cpu")


def test_a_seed_gives_the_same_batches_and_the_global_state_is_left_alone(small_data: Data) -> None:
    data = replace(small_data, augment=True)
    torch.manual_seed(0)
    first = [images for images, _ in AugmentedBatches(data.train, data, 16, 5, "cpu")]
    before = torch.get_rng_state()
    second = [images for images, _ in AugmentedBatches(data.train, data, 16, 5, "cpu")]
    other = [images for images, _ in AugmentedBatches(data.train, data, 16, 6, "cpu")]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.cat(first), torch.cat(second))
    assert not torch.equal(torch.cat(first), torch.cat(other))


# ---------------------------------------------------------------------------------------------- fine-tuning


def test_finetuning_twice_gives_the_same_weights_to_the_bit(small_data: Data) -> None:
    data = replace(small_data, augment=True)
    first = state_after(data, seed=3)
    torch.rand(5)
    assert same(first, state_after(data, seed=3))
    assert not same(first, state_after(data, seed=4))


def test_dropout_draws_from_the_seed_and_not_from_the_global_state(small_data: Data) -> None:
    first = state_after(small_data, seed=3, dropout=0.5)
    before = torch.get_rng_state()
    assert same(first, state_after(small_data, seed=3, dropout=0.5))
    torch.manual_seed(1)
    FlattenByView()
    assert torch.equal(torch.get_rng_state(), before)
    assert not same(first, state_after(small_data, seed=4, dropout=0.5))


def test_only_training_images_are_read(small_data: Data) -> None:
    poisoned = Split(torch.full((4, 3, 8, 8), torch.nan), torch.zeros(4, dtype=torch.int64))
    assert same(state_after(replace(small_data, search=poisoned, test=poisoned)), state_after(small_data))


def test_finetuning_learns_and_reports_every_epoch(small_data: Data) -> None:
    torch.manual_seed(0)
    model = ResNet(8, classes=4)
    reports: list[tuple[int, float, float, float]] = []
    batches = training_batches(small_data, 16, 0, "cpu")
    finetune(model, batches, epochs=12, lr=0.05, on_epoch=lambda *report: reports.append(report))
    assert [epoch for epoch, *_ in reports] == list(range(1, 13))
    assert reports[-1][1] < 0.5 * reports[0][1]
    assert [lr for _, _, lr, _ in reports] == sorted((lr for _, _, lr, _ in reports), reverse=True)
    assert all(seconds > 0 for *_, seconds in reports)
    assert not model.training
    with torch.no_grad():
        predicted = model(small_data.normalise(small_data.test.inputs)).argmax(1)
    assert (predicted == small_data.test.targets).double().mean() > 0.9


def test_the_first_step_is_sgd_by_hand(small_data: Data) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    weight = model[1].weight.detach().clone()
    images = small_data.normalise(small_data.train.inputs)
    loss = F.cross_entropy(model(images), small_data.train.targets)
    (gradient,) = torch.autograd.grad(loss, model[1].weight)
    batches = AugmentedBatches(small_data.train, small_data, 64, 0, "cpu")
    finetune(model, batches, epochs=1, lr=0.1, momentum=0.9, weight_decay=0.01, clip=math.inf)
    # The first Nesterov step goes along (1 + momentum) times the gradient with decay.
    expected = weight - 0.1 * 1.9 * (gradient + 0.01 * weight)
    assert torch.allclose(model[1].weight, expected, atol=1e-6)


def test_frozen_parameters_and_fixed_selections_stay(small_data: Data) -> None:
    model = ResNet(8, "selection", classes=4)
    model.conv1.weight.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batches = AugmentedBatches(small_data.train, small_data, 16, 0, "cpu")
    finetune(model, batches, epochs=1, lr=0.1, clip=math.inf)
    after = model.state_dict()
    for name in ("conv1.weight", "layer2.0.shortcut.weight", "layer3.0.shortcut.weight"):
        assert torch.equal(after[name], before[name])
    assert not torch.equal(after["layer2.0.conv1.weight"], before["layer2.0.conv1.weight"])


def test_forgotten_weights_are_drawn_anew_by_the_seed_and_what_is_frozen_stays() -> None:
    def drawn(seed: int) -> nn.Module:
        model = network("residual")
        first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        first.requires_grad_(False)
        before = copy.deepcopy(model.state_dict())
        forget_weights(model, seed)
        norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
        assert (norm.weight == 1).all()
        assert (norm.running_mean == 0).all()
        changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
        weights = [f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
        assert [key in changed for key in weights] == [False] + [True] * (len(weights) - 1)
        return model

    states = [drawn(seed).state_dict() for seed in (1, 1, 2)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not all(torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_parameters_that_no_class_draws_are_refused() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    with refused("unsupported", "finetune.from_scratch"):
        forget_weights(Scaled(), 0)


def test_weights_are_contiguous_afterwards(small_data: Data) -> None:
    assert all(value.is_contiguous() for value in state_after(small_data, epochs=1).values())


def test_no_epochs_change_nothing(small_data: Data) -> None:
    torch.manual_seed(1)
    assert same(ResNet(8, classes=4).state_dict(), state_after(small_data, epochs=0))


def test_the_learning_rate_rises_in_a_line_and_falls_along_a_cosine() -> None:
    schedule = LearningRate(peak=1.0, steps=12, warmup=4)
    rates = [schedule(step) for step in range(13)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[8] == pytest.approx(0.5)
    assert rates[12] == pytest.approx(0.0)


def test_a_diverging_loss_is_one_clear_message(small_data: Data) -> None:
    batches = AugmentedBatches(small_data.train, small_data, 16, 0, "cpu")
    with refused("diverged", "lr_fraction"):
        finetune(FlattenByView(), batches, epochs=20, lr=1e12)


def test_settings_out_of_range_are_listed_together(small_data: Data) -> None:
    batches = AugmentedBatches(small_data.train, small_data, 16, 0, "cpu")
    model = FlattenByView().requires_grad_(False)
    with pytest.raises(UserError, match="epochs=-1.*lr=nan.*nothing to train"):
        finetune(model, batches, epochs=-1, lr=float("nan"))


# ----------------------------------------------------------------- penalty, teacher, masks: what they change


def by_hand(model: nn.Module, batches: AugmentedBatches, epochs: int, lr: float) -> dict[str, torch.Tensor]:
    """Plain SGD with Nesterov's momentum along a cosine, as a loop without any option."""
    model = model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr, 0.9, weight_decay=5e-4, nesterov=True)
    steps = epochs * len(batches)
    for epoch in range(epochs):
        for step, (images, labels) in enumerate(batches, epoch * len(batches)):
            optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            F.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), labels).backward()
            optimizer.step()
    return model.state_dict()


def fresh(data: Data, seed: int = 1) -> tuple[nn.Module, AugmentedBatches]:
    """A network from a seed, and its batches."""
    torch.manual_seed(seed)
    return ResNet(8, "conv", classes=4), AugmentedBatches(data.train, data, 16, 0, "cpu")


def test_without_options_it_is_the_plain_loop_to_the_bit(small_data: Data) -> None:
    expected = by_hand(*fresh(small_data), epochs=2, lr=0.05)
    nothing = {"penalty": None, "teacher": None, "masks": None}
    never_run = nn.Linear(1, 1)  # does not fit the images
    for options in ({}, nothing, {"teacher": never_run, "distillation": 0.0}, {"masks": {}}):
        model, batches = fresh(small_data)
        finetune(model, batches, epochs=2, lr=0.05, **options)
        assert same(expected, model.state_dict())


def test_bfloat16_is_what_the_network_computes_in_and_not_what_its_weights_are_kept_in(
    small_data: Data,
) -> None:
    after = {}
    for precision in ("float32", "bfloat16"):
        model, batches = fresh(small_data)
        seen: set[torch.dtype] = set()
        convolution = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        convolution.register_forward_hook(lambda _module, _inputs, out, seen=seen: seen.add(out.dtype))
        finetune(model, batches, epochs=1, lr=0.01, precision=precision)
        assert getattr(torch, precision) in seen
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
        after[precision] = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    difference = (after["bfloat16"] - after["float32"]).norm() / after["float32"].norm()
    assert 0 < difference < 0.05


def test_an_l2_penalty_is_weight_decay(small_data: Data) -> None:
    states = []
    for decay, weight in ((0.01, None), (0.0, 0.01)):
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(192, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False)
        )
        batches = AugmentedBatches(small_data.train, small_data, 16, 0, "cpu")
        penalty = None if weight is None else L2(weight).penalty(model)
        finetune(model, batches, epochs=3, lr=0.05, weight_decay=decay, penalty=penalty, clip=math.inf)
        states.append(model.state_dict())
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-4, atol=1e-5)


def scales(model: nn.Module) -> torch.Tensor:
    """The sum of all batch-norm scales."""
    return sum(m.weight.detach().abs().sum() for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def widest(model: nn.Module) -> torch.Tensor:
    """The largest norm of what writes and reads a channel within the last block."""
    rows = model.layer3[0].conv1.weight.detach().flatten(1).norm(dim=1)
    columns = model.layer3[0].conv2.weight.detach().transpose(0, 1).flatten(1).norm(dim=1)
    return torch.hypot(rows, columns).max()


@pytest.mark.parametrize(
    ("regularization", "measure", "most"),
    [(BNScale(0.02), scales, 0.75), (GroupLasso(0.002), widest, 0.3), (L1(0.001), widest, 0.9)],
    ids=["bn_scale", "group_lasso", "l1"],
)
def test_penalties_shrink_what_they_are_taken_of_and_the_network_still_learns(
    regularization: Regularization,
    measure: Callable[[nn.Module], torch.Tensor],
    most: float,
    small_data: Data,
) -> None:
    sizes = []
    for used in (False, True):
        model, batches = fresh(small_data)
        penalty = regularization.penalty(model, trace(model, batches.example)) if used else None
        finetune(model, batches, epochs=20, lr=0.05, penalty=penalty)
        sizes.append(float(measure(model)))
        with torch.no_grad():
            outputs = model(small_data.normalise(small_data.train.inputs))
        assert F.cross_entropy(outputs, small_data.train.targets) < 0.05
    assert sizes[1] < most * sizes[0]


def test_a_penalty_that_is_not_finite_is_noticed(small_data: Data) -> None:
    model, batches = fresh(small_data)
    with refused("diverged", "lr_fraction"):
        finetune(model, batches, epochs=1, lr=0.05, penalty=lambda network: network.conv1.weight.sum() / 0)


def test_a_student_learns_from_its_teacher_where_labels_are_noise(small_data: Data) -> None:
    teacher, batches = fresh(small_data)
    finetune(teacher, batches, epochs=12, lr=0.05)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    teacher.train()
    noise = torch.randint(0, 4, (64,), generator=torch.Generator().manual_seed(0))
    noisy = AugmentedBatches(Split(small_data.train.inputs, noise), small_data, 16, 0, "cpu")
    agreement = {}
    for share in (0.0, 1.0):
        student, _ = fresh(small_data, seed=2)
        random = torch.get_rng_state()
        finetune(student, noisy, epochs=12, lr=0.05, teacher=teacher, distillation=share)
        assert torch.equal(torch.get_rng_state(), random)
        with torch.no_grad():
            tests = small_data.normalise(small_data.test.inputs)
            same_class = student(tests).argmax(1) == copy.deepcopy(teacher).eval()(tests).argmax(1)
        agreement[share] = same_class.double().mean().item()
    assert agreement[1.0] > 0.9 > agreement[0.0]
    assert teacher.training
    assert same(before, teacher.state_dict())
    assert all(p.requires_grad and p.is_contiguous() for p in teacher.parameters())


def test_student_and_teacher_may_want_different_layouts(small_data: Data) -> None:
    for student, teacher in (
        (ResNet(8, classes=4), FlattenByView()),
        (FlattenByView(), ResNet(8, classes=4)),
    ):
        before = {key: value.clone() for key, value in student.state_dict().items()}
        batches = AugmentedBatches(small_data.train, small_data, 16, 0, "cpu")
        finetune(student, batches, epochs=1, lr=0.05, teacher=teacher, distillation=0.5)
        assert not same(before, student.state_dict())


def test_distillation_twice_gives_the_same_weights_to_the_bit(small_data: Data) -> None:
    states = []
    for _ in range(2):
        teacher, _ = fresh(small_data, seed=3)
        model, batches = fresh(small_data)
        torch.rand(len(states) + 1)
        penalty = GroupLasso().penalty(model, trace(model, batches.example))
        finetune(model, batches, epochs=2, lr=0.05, teacher=teacher, distillation=0.5, penalty=penalty)
        states.append(model.state_dict())
    assert same(*states)


def test_distillation_settings_out_of_range_are_listed_with_the_others(small_data: Data) -> None:
    model, batches = fresh(small_data)
    with refused("out_of_range", "distillation", "temperature", "epochs"):
        finetune(model, batches, epochs=-1, lr=0.1, distillation=0.5, temperature=0)


class Watched(AugmentedBatches):
    """Batches that look at weights before every step."""

    look: Callable[[], None]

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in super().__iter__():
            self.look()
            yield batch


def random_masks(model: nn.Module, kept: float = 0.4) -> dict[str, torch.Tensor]:
    """A mask for every convolution and linear layer."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(module.weight.shape, generator=generator) < kept
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


def test_masked_weights_are_zero_before_and_after_every_step(small_data: Data) -> None:
    model, _ = fresh(small_data)
    masks = random_masks(model)
    looks = []

    def look() -> None:
        weights = {name: model.get_submodule(name).weight.detach() for name in masks}
        zero = all(bool((weights[name][~mask] == 0).all()) for name, mask in masks.items())
        signed = any(bool(weights[name][~mask].signbit().any()) for name, mask in masks.items())
        looks.append(zero and not signed)

    batches = Watched(small_data.train, small_data, 16, 0, "cpu")
    batches.look = look
    options = {"momentum": 0.9, "weight_decay": 0.05, "penalty": L1(0.01).penalty(model)}
    finetune(model, batches, epochs=3, lr=0.1, masks=masks, **options)
    look()
    assert len(looks) == 3 * 4 + 1  # four steps an epoch, and the end
    assert all(looks)
    assert all(bool((model.get_submodule(name).weight[mask] != 0).all()) for name, mask in masks.items())
    # Zeros alone do not stay: without the masks every weight comes back.
    finetune(model, AugmentedBatches(small_data.train, small_data, 16, 0, "cpu"), epochs=1, lr=0.1)
    assert all(bool((model.get_submodule(name).weight != 0).any()) for name in masks)
    share = torch.cat([model.get_submodule(n).weight.detach()[~mask] for n, mask in masks.items()]).ne(0)
    assert share.double().mean() > 0.9


class MaskedLinear(nn.Linear):
    """Multiplies its weight with a mask in the forward pass: no gradient reaches what is masked."""

    mask: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


def test_the_other_weights_train_as_if_the_masked_ones_were_not_there(small_data: Data) -> None:
    masks, states = {}, []
    for kind in (nn.Linear, MaskedLinear):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Flatten(), kind(192, 16), nn.ReLU(), kind(16, 4))
        masks = masks or random_masks(model)
        for name, mask in masks.items():
            model.get_submodule(name).mask = mask
        held = masks if kind is nn.Linear else None
        batches = AugmentedBatches(small_data.train, small_data, 16, 0, "cpu")
        finetune(model, batches, epochs=3, lr=0.05, masks=held, clip=math.inf)
        states.append(model.state_dict())
    for name, mask in masks.items():
        first, second = (state[f"{name}.weight"] for state in states)
        assert torch.equal(first[mask], second[mask])
        assert torch.equal(first[~mask], torch.zeros_like(first[~mask]))


def test_masks_hold_without_an_epoch_and_for_frozen_weights(small_data: Data) -> None:
    model, batches = fresh(small_data)
    model.conv1.weight.requires_grad_(False)
    masks = {"conv1": torch.zeros(16, 3, 3, 3, dtype=torch.bool)}
    finetune(model, batches, epochs=0, lr=0.1, masks=masks)
    assert model.conv1.weight.abs().sum() == 0
    finetune(model, batches, epochs=1, lr=0.1, masks=masks)
    assert model.conv1.weight.abs().sum() == 0


def test_masks_that_do_not_fit_are_refused(small_data: Data) -> None:
    model, batches = fresh(small_data)
    shape = model.conv1.weight.shape
    for masks, complaint in (
        ({"conv9": torch.ones(shape, dtype=torch.bool)}, r"mask of conv9: .* has no weight"),
        ({"conv1": torch.ones(shape)}, r"mask of conv1: torch.float32 .* a bool tensor"),
        ({"conv1": torch.ones(3, dtype=torch.bool)}, r"mask of conv1: torch.bool \[3\], .*\[16, 3, 3, 3\]"),
    ):
        with pytest.raises(ValueError, match=complaint):
            finetune(model, batches, epochs=1, lr=0.1, masks=masks)


@pytest.mark.parametrize(
    "name", ["residual", "selection", "depthwise", "concat", "grouped", "flatten", "mlp"]
)
def test_slim_networks_train_in_their_layout(name: str, small_data: Data) -> None:
    model, graph = traced(name)
    keeps = keeps_of(graph.groups, [torch.arange(0, group.total, 2) for group in graph.groups])
    slim = resize(copy.deepcopy(model), keeps)
    shapes = {key: value.shape for key, value in slim.state_dict().items()}
    batches = AugmentedBatches(small_data.train, small_data, 16, 0, "cpu")
    losses: list[float] = []
    options = {"teacher": model, "distillation": 0.5, "penalty": L1(1e-5).penalty(slim)}
    finetune(slim, batches, epochs=6, lr=0.02, on_epoch=lambda *report: losses.append(report[1]), **options)
    assert losses[-1] < losses[0]
    assert {key: value.shape for key, value in slim.state_dict().items()} == shapes
    assert all(value.is_contiguous() for value in slim.state_dict().values())
    wide = widen(slim, keeps, model)
    with torch.no_grad():
        inputs = small_data.normalise(small_data.test.inputs)
        torch.testing.assert_close(wide(inputs), slim(inputs), rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------- loaders


def loader_data(small_data: Data, loader: object | None = None) -> Data:
    """The small data through the user's own loaders."""

    def dataset(split: Split) -> TensorDataset:
        return TensorDataset(small_data.normalise(split.inputs), split.targets)

    training = DataLoader(dataset(small_data.train), 16, shuffle=True)
    found = from_loaders(training, DataLoader(dataset(small_data.search), 16), calibration_images=20)
    return found if loader is None else replace(found, loader=loader)


def test_the_users_loader_is_what_is_trained_on(small_data: Data) -> None:
    data = loader_data(small_data)
    states = []
    for _ in range(2):
        batches = training_batches(data, 99, 0, "cpu")
        assert isinstance(batches, LoaderBatches)
        assert len(batches) == 4
        torch.manual_seed(1)
        model = ResNet(8, classes=4)
        torch.rand(len(states) + 1)
        finetune(model, batches, epochs=2, lr=0.05, seed=7)
        states.append(model.state_dict())
    assert same(*states)


class Noisy(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Augments with whatever random numbers there are: torch's, NumPy's, Python's, those of a generator of its own."""

    def __init__(self, split: Split) -> None:
        self.split = split
        self.generator = torch.Generator()

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = torch.rand(()) + np.random.rand() + random.random() + torch.rand((), generator=self.generator)
        return self.split.inputs[index].float() + drawn, self.split.targets[index]


def noisy_loader(split: Split, **more: Any) -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
    """Shuffled by a generator of its own."""
    return DataLoader(Noisy(split), 16, shuffle=True, generator=torch.Generator().manual_seed(5), **more)


def epochs_of(data: Data, seed: int) -> list[torch.Tensor]:
    """Images of two epochs, while something else draws random numbers as well."""
    batches, seen = training_batches(data, 16, seed, "cpu"), []
    for _ in range(2):
        for images, _ in batches:
            seen.append(images)
            torch.rand(3), np.random.rand(), random.random()
    return seen


def test_a_loader_s_draws_come_from_the_seed_and_leave_no_trace(small_data: Data) -> None:
    loader = noisy_loader(small_data.train)
    data = loader_data(small_data, loader)
    assert loader.generator is not None
    first = epochs_of(data, 3)
    torch.manual_seed(8)
    np.random.seed(8)
    random.seed(8)
    before = torch.get_rng_state(), loader.generator.get_state(), loader.dataset.generator.get_state()
    drawn = np.random.rand(), random.random()
    np.random.seed(8)
    random.seed(8)
    for _ in training_batches(data, 16, 3, "cpu"):
        pass
    after = torch.get_rng_state(), loader.generator.get_state(), loader.dataset.generator.get_state()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert (np.random.rand(), random.random()) == drawn
    again, other = epochs_of(data, 3), epochs_of(data, 4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[len(first) // 2])  # an epoch is not the one before


def test_processes_of_a_loader_draw_from_the_seed_too(small_data: Data) -> None:
    data = loader_data(small_data, noisy_loader(small_data.train, num_workers=1))
    first, again = ([images for images, _ in training_batches(data, 16, 3, "cpu")] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_loaders_that_cannot_be_trained_on_are_refused(small_data: Data) -> None:
    with refused("one_pass", "train_loader"):
        training_batches(loader_data(small_data, iter([])), 16, 0, "cpu")

    class Once:
        """A loader that can be read one time only."""

        def __init__(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
            self.batches = iter(batches)
            self.length = len(batches)

        def __len__(self) -> int:
            return self.length

        def __iter__(self) -> object:
            return self.batches

    once = Once([(small_data.normalise(small_data.train.inputs), small_data.train.targets)])
    batches = training_batches(loader_data(small_data, once), 16, 0, "cpu")
    with refused("empty", ""):
        finetune(FlattenByView(), batches, epochs=2, lr=0.01)


class Stream(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """Images without a number of them."""

    def __init__(self, data: Data, count: int) -> None:
        self.images, self.labels = data.normalise(data.train.inputs[:count]), data.train.targets[:count]

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iter(zip(self.images, self.labels, strict=True))


def test_batches_of_an_iterable_dataset_are_counted(small_data: Data) -> None:
    data = loader_data(small_data, DataLoader(Stream(small_data, 60), 16))
    before = torch.get_rng_state()
    batches = training_batches(data, 99, 0, "cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert len(batches) == len(list(batches)) == 4
    losses: list[float] = []
    finetune(
        ResNet(8, classes=4), batches, epochs=2, lr=0.05, on_epoch=lambda *figures: losses.append(figures[1])
    )
    assert losses[1] < losses[0]


def test_a_stream_without_end_is_refused(small_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.training.batches.MOST_BATCHES", 3)
    with refused("endless", "train_loader"):
        training_batches(loader_data(small_data, DataLoader(Stream(small_data, 60), 10)), 16, 0, "cpu")


def test_a_last_batch_of_one_image_is_left_out(small_data: Data) -> None:
    data = loader_data(small_data, DataLoader(Stream(small_data, 33), 16))
    assert [len(images) for images, _ in training_batches(data, 99, 0, "cpu")] == [16, 16]
    single = loader_data(small_data, DataLoader(Stream(small_data, 3), 1))
    assert [len(images) for images, _ in training_batches(single, 99, 0, "cpu")] == [1, 1, 1]
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    finetune(model, training_batches(data, 99, 0, "cpu"), epochs=1, lr=0.01)


# ---------------------------------------------------------------------------------------------- from scratch


def test_training_from_scratch_learns_and_is_the_same_on_any_number_of_threads(small_data: Data) -> None:
    recipe = Recipe(epochs=8, lr=0.05, batch_size=16, seed=4)
    before = torch.get_rng_state()
    threads = torch.get_num_threads()
    models = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            models.append(train(lambda: ResNet(8, classes=4), small_data, recipe))
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(models[0].state_dict(), models[1].state_dict())
    with torch.no_grad():
        predicted = models[0](small_data.normalise(small_data.test.inputs)).argmax(1)
    assert (predicted == small_data.test.targets).double().mean() > 0.9


class Narrow(nn.Module):
    """Has memory for so many examples."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.layer = most, nn.Linear(192, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("full")
        return self.layer(x.flatten(1))


def trained(data: Data, most: int) -> torch.Tensor:
    torch.manual_seed(0)
    model = Narrow(most)
    finetune(model, AugmentedBatches(data.train, data, 15, 0, "cpu"), epochs=2, lr=0.1)
    return model.layer.weight.detach()


def test_a_batch_that_does_not_fit_is_trained_on_in_halves_with_the_same_gradient(
    small_data: Data, caplog: pytest.LogCaptureFixture
) -> None:
    torch.testing.assert_close(trained(small_data, 8), trained(small_data, 15))
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warned == ["out of memory: batches of 15 are trained on in two halves"]
    with refused("out_of_memory", "batch_size"):
        trained(small_data, 7)
