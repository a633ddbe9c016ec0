"""Criteria from derivatives of the training loss: first order (Taylor) and second order (OBD).

All run on a copy in eval mode: batch norms are fixed, so examples do not see one another and a batch's gradients
come apart exactly into those of its examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from amc_env.errors import UserError
from amc_env.graph.copying import module_copy
from amc_env.graph.hooks import watch
from amc_env.graph.layers import Layer, LayerGraph, Member
from amc_env.graph.surgery import CONVOLUTIONS
from amc_env.inputs import Inputs, call, count, pieces
from amc_env.pruning.calibration import patches
from amc_env.pruning.criteria.base import (
    EVERY,
    Aggregate,
    Members,
    Sample,
    calibration_sample,
    scoring_layers,
    scoring_members,
    unit_scores,
    unit_sums,
)
from amc_env.pruning.criteria.weights import weight_of
from amc_env.system import named_generator
from amc_env.tasks import Task
from amc_env.validation import Count, settings

Loss = Callable[[Any, Any], Tensor]
"""From outputs and targets of a batch to the loss of every example, [N], or the sum of them."""


Visit = Callable[[Layer, Tensor], None]
"""Takes a layer and the gradients [n, *weight's shape] of the losses of some examples, each example's own."""


_MOST = 50  # images of a batch: activations should fit the processor's caches


_BYTES = 2**29  # about what a batch's activations and gradients may take


def per_example_gradients(
    model: nn.Module, layers: Sequence[Layer], sample: Sample, visit: Visit, loss: Loss | None = None
) -> None:
    """Shows ``visit`` the gradient of every example's loss with respect to the weights of ``layers``.

    A layer's input x and the gradient of its output come by in an ordinary backward pass; their product, kept
    apart by example, is the weight's gradient. Layers that run several times are shown once, summed over calls.

    Args:
        model: The network; it is copied, not changed.
        layers: Whose weights.
        sample: Inputs and targets, all of which are used.
        visit: Called once for every layer and batch.
        loss: By default that of the sample's task.

    Raises:
        UserError: A layer does not keep examples apart along its first dimension.
    """
    copied, weights = _copy_of(model, layers)
    pending: dict[str, Tensor] = {}
    size = 0

    def hook(layer: Layer, module: nn.Module, x: Tensor, output: Tensor) -> None:
        x = x.detach()
        if len(x) != size:
            raise UserError(
                f"{layer.name} sees {len(x)} inputs for {size} examples: gradients of single ones cannot be separated "
                "apart there; use criterion=l1 or criterion=l2",
                code="unsupported",
                field="criterion",
            )

        def collect(gradient: Tensor) -> None:
            own = _weight_gradients(module, layer, x, gradient)
            if layer.calls == 1:
                visit(layer, own)
            else:
                pending[layer.name] = pending[layer.name] + own if layer.name in pending else own

        output.register_hook(collect)  # type: ignore[no-untyped-call]

    for layer in layers:
        module = copied.get_submodule(layer.name)
        watch(module, lambda *call, layer=layer, module=module: hook(layer, module, *call))
    with torch.enable_grad():
        for inputs, targets in _batches(sample, layers):
            size = count(inputs)
            total = _total(copied, inputs, targets, sample.task, loss)
            torch.autograd.grad(total, weights, allow_unused=True)
            for layer in layers:
                if layer.name in pending:
                    visit(layer, pending.pop(layer.name))


def _copy_of(model: nn.Module, layers: Sequence[Layer]) -> tuple[nn.Module, list[Tensor]]:
    """A copy in eval mode, and the weights of layers in it, which alone have gradients."""
    copied = module_copy(model).eval().requires_grad_(False)
    weights = [_weight(copied, layer).requires_grad_(True) for layer in layers]
    return copied, weights


def _weight(model: nn.Module, layer: Layer) -> Tensor:
    weight = model.get_submodule(layer.name).weight
    assert isinstance(weight, Tensor)
    return weight


def _total(model: nn.Module, inputs: Inputs, targets: Inputs, task: Task, loss: Loss | None = None) -> Tensor:
    """The loss of a batch, summed over its examples."""
    return (loss or task.losses)(task.read(call(model, inputs)), targets).sum()


def _batches(sample: Sample, layers: Sequence[Layer]) -> Iterator[tuple[Inputs, Inputs]]:
    """Inputs and targets in batches whose activations and per-example gradients fit into _BYTES."""
    outputs = sum(layer.out_channels * layer.positions for layer in layers)
    own = max(layer.in_channels * layer.area * (layer.positions + layer.out_channels) for layer in layers)
    # Autograd keeps some four tensors of each output's size: convolution, batch norm, activation, gradient.
    size = max(1, min(_MOST, _BYTES // (4 * (4 * outputs + own))))
    yield from zip(pieces(sample.inputs, size), pieces(sample.targets, size), strict=True)


def _weight_gradients(module: nn.Module, layer: Layer, x: Tensor, gradient: Tensor) -> Tensor:
    """Gradients [N, *weight's shape] from a call's input and the gradient of its output."""
    if isinstance(module, CONVOLUTIONS):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padded = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        seen = _unfolded(module, padded, gradient.shape[2:].numel())
        into = seen.reshape(len(x), layer.groups, -1, seen.shape[-1])
        out = gradient.reshape(len(x), layer.groups, -1, seen.shape[-1])
        return (out @ into.transpose(-1, -2)).reshape(len(x), *module.weight.shape)
    into = x.reshape(len(x), -1, x.shape[-1])
    out = gradient.reshape(len(x), -1, gradient.shape[-1])
    return out.transpose(-1, -2) @ into


def _unfolded(module: nn.Module, padded: Tensor, positions: int) -> Tensor:
    """What each output position of a convolution reads: [N, channels * weights of a kernel, positions]."""
    if isinstance(module, nn.Conv2d):
        return F.unfold(padded, module.kernel_size, dilation=module.dilation, stride=module.stride)
    places = patches(module, padded.shape[2:], torch.arange(positions, device=padded.device))
    return padded.flatten(2)[:, :, places.T].flatten(1, 2)


def fisher_diagonal(
    model: nn.Module, layers: Sequence[Layer], sample: Sample, loss: Loss | None = None
) -> dict[str, Tensor]:
    """The empirical Fisher's diagonal, by layer: the mean over examples of the squared gradient, exact.

    Returns:
        float64 on the CPU, of the weights' shapes.
    """
    sums = {layer.name: torch.zeros_like(weight_of(model, layer)) for layer in layers}

    def visit(layer: Layer, gradients: Tensor) -> None:
        sums[layer.name] += gradients.square().sum(0, dtype=torch.float64).cpu()

    per_example_gradients(model, layers, sample, visit, loss)
    return {name: total / count(sample.inputs) for name, total in sums.items()}


def gauss_newton_diagonal(model: nn.Module, layers: Sequence[Layer], sample: Sample) -> dict[str, Tensor]:
    """An estimate of the Gauss-Newton matrix's diagonal for the task's loss, by layer; labels are not needed.

    The loss's curvature at an example's outputs z is H = S S'; for cross-entropy and probabilities p that is
    diag(p) - p p' with S = diag(sqrt(p)) - p sqrt(p)'. For u of independent signs, g = d(z' S u)/dw has
    E[g^2] = diag(J' H J): the signs of Hutchinson's estimator drawn where there are few outputs instead of many weights.
    One u an example.

    Returns:
        float64 on the CPU, of the weights' shapes; unbiased and never negative.

    Raises:
        UserError: The task does not know its loss's curvature.
    """
    draw = named_generator(sample.seed, "gauss_newton")

    def probe(outputs: Tensor, targets: Any) -> Tensor:
        fixed = outputs.detach()
        return (outputs * sample.task.root(fixed, _signs(fixed, draw))).flatten(1).sum(1)

    return fisher_diagonal(model, layers, sample, probe)


def _signs(like: Tensor, draw: torch.Generator) -> Tensor:
    """-1 and 1 with equal chances."""
    return torch.randint(2, like.shape, generator=draw).mul_(2).sub_(1).to(like.device, like.dtype)


def hessian_diagonal(
    model: nn.Module, layers: Sequence[Layer], sample: Sample, probes: int, loss: Loss | None = None
) -> dict[str, Tensor]:
    """Hutchinson's estimate of the diagonal of the mean loss's Hessian, by layer.

    For v of independent signs E[v * Hv] is the diagonal (Bekas et al., "An estimator for the diagonal of a
    matrix", 2007); Hv comes from differentiating twice. Every batch of images draws ``probes`` vectors of its
    own: that costs the same as sharing them, and their errors average out over batches.

    Returns:
        float64 on the CPU, of the weights' shapes; unbiased, so single entries may be negative where the
        diagonal is not.
    """
    copied, weights = _copy_of(model, layers)
    draw = named_generator(sample.seed, "hutchinson")
    sums = [torch.zeros(weight.shape, dtype=torch.float64) for weight in weights]
    with torch.enable_grad():
        for inputs, targets in _batches(sample, layers):
            total = _total(copied, inputs, targets, sample.task, loss)
            slopes = torch.autograd.grad(total, weights, create_graph=True, materialize_grads=True)
            for _ in range(probes):
                signs = [_signs(weight, draw) for weight in weights]
                curved = torch.autograd.grad(
                    slopes, weights, signs, retain_graph=True, materialize_grads=True
                )
                for entry, sign, product in zip(sums, signs, curved, strict=True):
                    entry += (sign * product).double().cpu()
    draws = probes * count(sample.inputs)
    return {layer.name: entry / draws for layer, entry in zip(layers, sums, strict=True)}


@settings
class Taylor:
    """First-order estimate of what removing a unit does to the loss: w * dL/dw, summed over it and squared.

    Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019: the square of the sum over a
    unit. Squares are taken of every example's own gradient and averaged (the paper's variant FG), since the mean
    gradient of a trained network is nearly zero; its main variant squares mini-batch means.

    Single weights are worth the mean of |w * dL/dw|. The mean square would rank them as OBD with the empirical
    Fisher does: it is twice that.

    Attributes:
        images: Calibration images.
        members: Whose weights count.
        aggregate: How members come together.
    """

    images: Count = 1000
    members: Members = "all"
    aggregate: Aggregate = "mean"

    name: ClassVar[str] = "taylor"
    granularities: ClassVar[tuple[str, ...]] = EVERY

    def channel_scores(self, model: nn.Module, graph: LayerGraph, sample: Sample) -> tuple[Tensor, ...]:
        """The mean over examples of (sum over the unit of w * dL/dw)^2, of each member."""
        sample = calibration_sample(self, sample)
        sums: dict[Member, Tensor] = {}
        spoken: dict[str, list[Member]] = {}
        for group in graph.groups:
            for member, layer in scoring_members(group, graph, self.members):
                sums[member] = torch.zeros(group.total, dtype=torch.float64)
                spoken.setdefault(layer.name, []).append(member)

        def visit(layer: Layer, gradients: Tensor) -> None:
            products = gradients * _weight(model, layer).detach()
            for member in spoken[layer.name]:
                sums[member] += unit_sums(products, member, layer).double().square().sum(0).cpu()

        per_example_gradients(model, scoring_layers(graph, self.members), sample, visit)

        def part(member: Member, layer: Layer) -> Tensor:
            return sums[member] / count(sample.inputs)

        return unit_scores(graph, self.members, self.aggregate, part)

    def saliency(self, model: nn.Module, layers: Sequence[Layer], sample: Sample) -> dict[str, Tensor]:
        """The mean over examples of |w * dL/dw|."""
        sample = calibration_sample(self, sample)
        sums = {layer.name: torch.zeros_like(weight_of(model, layer)) for layer in layers}

        def visit(layer: Layer, gradients: Tensor) -> None:
            sums[layer.name] += gradients.abs().sum(0, dtype=torch.float64).cpu()

        per_example_gradients(model, layers, sample, visit)
        return {
            layer.name: weight_of(model, layer).abs() * sums[layer.name] / count(sample.inputs)
            for layer in layers
        }


@settings
class OBD:
    """Optimal Brain Damage: half the Hessian's diagonal times the weight squared, summed over a unit.

    LeCun, Denker and Solla, "Optimal Brain Damage", NeurIPS 1989: what removing weights adds to the loss at a
    minimum, to second order, interactions between weights left out.

    ``fisher`` puts the empirical Fisher in the Hessian's place: the mean square of the examples' gradients at
    their true labels, exact as the statistic that it is. For cross-entropy the Fisher is the Hessian's Gauss-Newton
    part, but only with labels drawn from the network's own predictions; the empirical one equals it only where
    those are right. It vanishes on examples that are fitted perfectly, however curved the loss is there (Kunstner
    et al., "Limitations of the empirical Fisher approximation", NeurIPS 2019).

    ``hutchinson`` estimates the Hessian's own diagonal, without bias but with noise in proportion to the rest of
    its rows, which drowns small entries: in a network of convolutions and ReLU no exact entry is negative (outputs
    are piecewise linear in a single weight), and nearly half of the estimates are. Those count by their magnitude,
    after they were summed over the unit where units are channels: noise is large where a weight is coupled to
    others, so cutting it off at zero would lose more.

    ``gauss_newton`` estimates the Gauss-Newton part's diagonal, which is the Hessian's wherever outputs are
    piecewise linear in a single weight, with far less noise and at the Fisher's cost.

    Attributes:
        hessian: ``gauss_newton``, ``fisher`` or ``hutchinson``.
        probes: Vectors of signs that ``hutchinson`` draws for every batch of images.
        images: Calibration images.
        members: Whose weights count.
        aggregate: How members come together.
    """

    hessian: Literal["gauss_newton", "fisher", "hutchinson"] = "gauss_newton"
    probes: Count = 2
    images: Count = 500
    members: Members = "all"
    aggregate: Aggregate = "mean"

    name: ClassVar[str] = "obd"
    granularities: ClassVar[tuple[str, ...]] = EVERY

    def channel_scores(self, model: nn.Module, graph: LayerGraph, sample: Sample) -> tuple[Tensor, ...]:
        """The sum over the unit of h w^2 / 2, of each member."""
        elements = self._elements(model, scoring_layers(graph, self.members), sample)

        def part(member: Member, layer: Layer) -> Tensor:
            return unit_sums(elements[layer.name], member, layer).abs()

        return unit_scores(graph, self.members, self.aggregate, part)

    def saliency(self, model: nn.Module, layers: Sequence[Layer], sample: Sample) -> dict[str, Tensor]:
        """|h| w^2 / 2."""
        return {name: value.abs() for name, value in self._elements(model, layers, sample).items()}

    def _elements(self, model: nn.Module, layers: Sequence[Layer], sample: Sample) -> dict[str, Tensor]:
        sample = calibration_sample(self, sample)
        if self.hessian == "hutchinson":
            diagonal = hessian_diagonal(model, layers, sample, self.probes)
        else:
            estimate = {"fisher": fisher_diagonal, "gauss_newton": gauss_newton_diagonal}[self.hessian]
            diagonal = estimate(model, layers, sample)
        return {layer.name: diagonal[layer.name] * weight_of(model, layer).square() / 2 for layer in layers}
