"""Repair: what mends a cut network before it is scored.

Least squares replaces a layer's weights by those that give the uncut network's outputs best from the inputs
that stayed (He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017; AMC section
3.4). Inputs and outputs are those of the uncut network, and the kept sets are nested in one order, so the
leading blocks of one Cholesky factor a layer hold every solution of a search. The sequential form goes front
to back on what reaches each layer in the cut network.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor, nn

from amc_env.errors import UserError
from amc_env.heap import release_heap
from amc_env.layers import Layer
from amc_env.pruning.calibration import Moments, Spots, record, repairable
from amc_env.pruning.candidate import Candidates
from amc_env.pruning.topology import Batches, Run, Topology
from amc_env.surgery import Keeps

# Relative to the mean variance of the inputs: dead and duplicate channels must not break the solve.
_RIDGE = 1e-6
# Of the mean square of the inputs: what centring in float64 may get wrong, with room to spare.
_ROUNDING = 1e-11
# Solutions kept for later: solving again from the factor is cheap, memory is not.
_SOLVED_BYTES = 128 * 2**20
# Images of a batch: activations of wide layers should fit the processor's caches.
_SMALL = 100


class Repair(Protocol):
    """Mends cut networks in place."""

    @property
    def name(self) -> str:
        """Its name in conf."""
        ...

    def __call__(self, model: nn.Module, removed: Sequence[int], keeps: Keeps) -> None:
        """Mends ``model``, which was cut to ``keeps`` by removing ``removed`` units of the groups."""
        ...


class NoRepair:
    """Leaves the cut network as it is."""

    name = "none"

    def __call__(self, model: nn.Module, removed: Sequence[int], keeps: Keeps) -> None:
        """Does nothing."""


class Both:
    """One repair after another."""

    def __init__(self, name: str, parts: Sequence[Repair]):
        self.name = name
        self._parts = parts

    def __call__(self, model: nn.Module, removed: Sequence[int], keeps: Keeps) -> None:
        """Mends by each part in turn."""
        for part in self._parts:
            part(model, removed, keeps)


class BatchNorm:
    """Re-estimates the statistics of all batch norms from fixed training images.

    Args:
        images: Normalised training images [N, C, H, W]; images, order and batch are the same for every
            candidate.
        batch: Images of a batch.
    """

    name = "batch_norm"

    def __init__(self, images: Tensor, batch: int = 250):
        self._images = images
        self._batch = min(batch, len(images))

    @torch.no_grad()
    def __call__(self, model: nn.Module, removed: Sequence[int], keeps: Keeps) -> None:
        """Replaces running means and variances by their cumulative average over the images."""
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
        norms = [m for m in norms if m.running_mean is not None]
        if not norms:
            return
        before = [(m.momentum, m.training) for m in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        # A short last batch would weigh as much as a full one.
        whole = len(self._images) // self._batch * self._batch
        for start in range(0, whole, self._batch):
            model(self._images[start : start + self._batch])
        for norm, (momentum, training) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.train(training)


def _norm_after(layer: Layer, topology: Topology) -> str | None:
    """The batch norm over the layer's outputs; on sequences of tokens it normalises positions instead."""
    tokens = layer.kind == "linear" and layer.positions > 1
    return None if tokens else topology.norm_after.get(layer.name)


def absorbs(layer: Layer, topology: Topology) -> bool:
    """Whether an intercept has a place to go: the layer's bias, or the mean of the batch norm after it."""
    return layer.bias or _norm_after(layer, topology) is not None


def put(model: nn.Module, layer: Layer, topology: Topology, weight: Tensor, intercept: Tensor | None) -> None:
    """Writes a solution [out, in, ...] and its intercept [out] into a cut network."""
    module = model.get_submodule(layer.name)
    old = module.weight
    assert isinstance(old, nn.Parameter)
    old.data = weight.reshape(old.shape).to(old.dtype)
    if intercept is None:
        return
    if layer.bias:
        assert isinstance(module.bias, nn.Parameter)
        module.bias.data = intercept.to(old.dtype)
    else:
        norm = model.get_submodule(topology.norm_after[layer.name])
        assert isinstance(norm.running_mean, Tensor)
        norm.running_mean = norm.running_mean - intercept.to(old.dtype)


def _factored(moments: Moments, intercept: bool, ridge: float) -> tuple[Moments, Tensor]:
    """The moments (about the means, with an intercept) and the factor of their ridged Gram matrix."""
    about = moments.centred() if intercept else moments
    spread = about.xx.diagonal(dim1=-2, dim2=-1)
    # Centring leaves rounding errors in proportion to the raw squares: inputs that are all constant need a
    # floor.
    floor = _ROUNDING * moments.xx.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    lift = (ridge * spread.mean(-1, keepdim=True) + floor).clamp_min(1e-18)
    return about, torch.linalg.cholesky(about.xx + torch.diag_embed(lift.expand_as(spread)))


def _solve(moments: Moments, intercept: bool, ridge: float) -> tuple[Tensor, Tensor | None]:
    """Weights [out, n] (groups stacked) and intercept [out] that give y best from x."""
    about, factor = _factored(moments, intercept, ridge)
    solution = torch.cholesky_solve(about.xy, factor)
    weight = solution.transpose(1, 2).flatten(0, 1)
    if not intercept:
        return weight, None
    offset = (moments.y - (solution * moments.x[:, :, None]).sum(1)) / moments.count
    return weight, offset.flatten()


class _Columns:
    """Where a consumer's input channels stand in the order in which they are cut."""

    def __init__(self, candidates: Candidates, layer: Layer):
        self.layer = layer
        self.area = layer.kernel[0] * layer.kernel[1]
        self.local = layer.in_channels // layer.groups
        ranks = torch.full((layer.in_channels,), -1)
        feeding = 0
        for group, order in zip(candidates.graph.groups, candidates.orders, strict=True):
            for member in group.members:
                if (member.module, member.side) == (layer.name, "in"):
                    feeding += 1
                    place = torch.empty_like(order)
                    place[order] = torch.arange(len(order))
                    ranks[member.positions] = place[:, None].expand_as(member.positions)
        self.nested = feeding == 1
        self.order = torch.sort(
            ranks[: self.local], stable=True
        ).indices  # most worth first; whole ones before them

    def columns(self, channels: Tensor) -> Tensor:
        """Columns of the moments that belong to (local) channels, in their order."""
        return (channels[:, None] * self.area + torch.arange(self.area)).flatten()


class LeastSquares:
    """Least squares on the uncut network's inputs and outputs, for every layer that lost inputs.

    Args:
        candidates: The builder of candidates: layers, groups and the order in which units go.
        topology: Where intercepts can go.
        images: Normalised calibration images of the training set, [N, C, H, W].
        per_image: Output positions sampled from each image.
        seed: Seed of the positions.
        ridge: Ridge relative to the mean variance of the inputs.
    """

    name = "least_squares"

    def __init__(
        self,
        candidates: Candidates,
        topology: Topology,
        images: Tensor,
        *,
        per_image: int = 16,
        seed: int = 0,
        ridge: float = _RIDGE,
    ):
        self._topology = topology
        self._ridge = ridge
        layers = repairable_consumers(candidates)
        self._columns = {layer.name: _Columns(candidates, layer) for layer in layers}
        self._moments = record(candidates.original, layers, images, per_image=per_image, seed=seed)
        self._factors: dict[str, tuple[Moments, Tensor, Moments]] = {}
        self._solved: dict[tuple[str, int], tuple[Tensor, Tensor | None]] = {}
        self._solved_bytes = 0

    @torch.no_grad()
    def __call__(self, model: nn.Module, removed: Sequence[int], keeps: Keeps) -> None:
        """Puts the solutions into every consumer that lost inputs."""
        for name, columns in self._columns.items():
            sides = keeps.get(name, {})
            kept = sides.get("in")
            if kept is None or len(kept) == columns.layer.in_channels:
                continue
            weight, intercept = self._solution(columns, kept[kept < columns.local])
            out = sides.get("out")
            if out is not None:
                weight = weight[out]
                intercept = None if intercept is None else intercept[out]
            put(model, columns.layer, self._topology, weight, intercept)

    def _solution(self, columns: _Columns, kept: Tensor) -> tuple[Tensor, Tensor | None]:
        """The solution for kept (local, ascending) channels, all outputs; solved once where nested."""
        if not columns.nested:  # any combination may come: keeping them all would fill the memory
            return self._sub(columns, kept)
        key = columns.layer.name, len(kept)
        if key in self._solved:
            return self._solved[key]
        weight, intercept = self._leading(columns, kept)
        solved = weight.float(), intercept  # as it will be written
        self._solved_bytes += solved[0].nbytes
        if self._solved_bytes <= _SOLVED_BYTES:
            self._solved[key] = solved
        return solved

    def _leading(self, columns: _Columns, kept: Tensor) -> tuple[Tensor, Tensor | None]:
        """From the leading block of the one factor: kept sets are nested."""
        name = columns.layer.name
        intercept = absorbs(columns.layer, self._topology)
        if name not in self._factors:
            ordered = columns.columns(columns.order).to(self._moments[name].xx.device)
            moments = _select(self._moments.pop(name), ordered)
            about, factor = _factored(moments, intercept, self._ridge)
            # The factor stands for both matrices of inputs, which are as large as it is.
            nothing = factor.new_empty(0)
            self._factors[name] = replace(about, xx=nothing), factor, replace(moments, xx=nothing)
        about, factor, moments = self._factors[name]
        size = len(kept) * columns.area
        solution = torch.cholesky_solve(about.xy[:, :size], factor[:, :size, :size])
        offset = None
        if intercept:
            offset = (moments.y - (solution * moments.x[:, :size, None]).sum(1)) / moments.count
            offset = offset.flatten()
        ascending = columns.order[: len(kept)].argsort()
        back = columns.columns(ascending).to(solution.device)
        return solution[:, back].transpose(1, 2).flatten(0, 1), offset

    def _sub(self, columns: _Columns, kept: Tensor) -> tuple[Tensor, Tensor | None]:
        """From the sub-Gram: a consumer fed by several groups has no single order."""
        moments = self._moments[columns.layer.name]
        moments = _select(moments, columns.columns(kept).to(moments.xx.device))
        return _solve(moments, absorbs(columns.layer, self._topology), self._ridge)


def _select(moments: Moments, columns: Tensor) -> Moments:
    xx = moments.xx[:, columns][:, :, columns]
    return Moments(xx, moments.xy[:, columns], moments.x[:, columns], moments.y, moments.count)


def repairable_consumers(candidates: Candidates) -> list[Layer]:
    """Layers that can lose inputs and that least squares can mend, in forward order."""
    names = {name for group in candidates.graph.groups for name in group.consumers}
    modules = dict(candidates.original.named_modules())
    return [x for x in candidates.graph.layers if x.name in names and repairable(modules[x.name], x)]


class FrontToBack:
    """One pass over calibration images that mends layers as their turn comes, on what reaches them then.

    Args:
        original: The uncut network, whose outputs are the targets.
        layers: Layers that may be mended.
        topology: The traced network.
        images: Normalised calibration images; every layer sees all of them before the next one runs.
        per_image: Output positions sampled from each image.
        seed: Seed of the positions.
        ridge: Ridge relative to the mean variance of the inputs.

    Raises:
        UserError: The network cannot be traced symbolically.
    """

    name = "sequential"

    def __init__(
        self,
        original: nn.Module,
        layers: Sequence[Layer],
        topology: Topology,
        images: Tensor,
        *,
        per_image: int = 16,
        seed: int = 0,
        ridge: float = _RIDGE,
    ):
        if topology.graph is None:
            raise UserError(
                f"repair=sequential does not work for this network: {topology.reason}; "
                "use repair=least_squares"
            )
        self._topology = topology
        self._batches = list(torch.split(images, _SMALL))
        self._ridge = ridge
        self._layers = {layer.name: layer for layer in layers}
        self._spots = {
            name: Spots(layer, len(images), per_image, seed) for name, layer in self._layers.items()
        }
        self._targets: dict[str, Tensor] = {}
        self._shortcuts: dict[str, Tensor] = {}
        self._record(original)

    @torch.no_grad()
    def _record(self, original: nn.Module) -> None:
        def before(name: str, module: nn.Module, xs: Batches, shortcuts: Batches | None) -> None:
            if name in self._layers and shortcuts is not None:
                self._shortcuts[name] = self._sampled(name, shortcuts)

        def after(name: str, ys: Batches) -> None:
            if name in self._layers:
                self._targets[name] = self._sampled(name, ys)

        Run(original, self._topology)(self._batches, before, after)
        release_heap()

    def _sampled(self, name: str, values: Batches) -> Tensor:
        """Samples [images * positions, channels] of a layer's outputs, or of what is added to them."""
        parts = _parts(values)
        return torch.cat(
            [self._spots[name].outputs(value, part) for value, part in zip(values, parts, strict=True)]
        )

    def _mended(self, model: nn.Module, names: Collection[str], keeps: Keeps) -> None:
        """Mends the named layers of ``model``, front to back; the others keep the error that reaches them."""
        if not names:
            return

        def before(name: str, module: nn.Module, xs: Batches, shortcuts: Batches | None) -> None:
            if name in names:
                self._mend(model, name, xs, shortcuts, keeps.get(name, {}).get("out"))

        Run(model, self._topology)(self._batches, before)
        release_heap()

    def _mend(
        self, model: nn.Module, name: str, xs: Batches, shortcuts: Batches | None, out: Tensor | None
    ) -> None:
        layer, module = self._layers[name], model.get_submodule(name)
        target, wanted = self._targets[name], self._shortcuts.get(name)
        if out is not None:
            target = target[:, out]
            wanted = None if wanted is None else wanted[:, out]
        if wanted is not None and shortcuts is not None:
            target = target + (wanted - self._sampled(name, shortcuts)) / self._scale(model, name)
        per_image = len(target) // sum(len(x) for x in xs)
        moments: Moments | None = None
        for x, part in zip(xs, _parts(xs), strict=True):
            wanted_here = target[part.start * per_image : part.stop * per_image]
            here = Moments.of(self._spots[name].inputs(module, x, part), wanted_here, layer.groups)
            moments = here if moments is None else moments + here
        assert moments is not None
        weight, intercept = self._solved(layer, module, moments)
        put(model, layer, self._topology, weight, intercept)

    def _solved(self, layer: Layer, module: nn.Module, moments: Moments) -> tuple[Tensor, Tensor | None]:
        """Weights [out, n] and intercept [out]."""
        return _solve(moments, absorbs(layer, self._topology), self._ridge)

    def _scale(self, model: nn.Module, name: str) -> Tensor:
        """What the batch norm after a layer multiplies its outputs by, [out]; ones without a batch norm."""
        norm_name = _norm_after(self._layers[name], self._topology)
        if norm_name is None:
            return torch.ones(1, device=self._batches[0].device)
        norm = model.get_submodule(norm_name)
        assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
        assert norm.running_var is not None
        scale = (norm.running_var + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight
        tiny = 1e-3 * scale.abs().max()  # a channel that is scaled away cannot carry the shortcut's error
        return torch.where(scale.abs() < tiny, torch.full_like(scale, float("inf")), scale)


class Sequential(FrontToBack):
    """Least squares front to back, on what reaches each layer in the network as cut and mended so far.

    The target is the uncut network's output before batch norm, mended for the error that the shortcut
    carries: the difference of the two shortcuts divided by the batch norm's scale is added. One pass over the
    calibration images mends all layers, each as its turn comes.

    Args:
        candidates: The builder of candidates.
        topology: The traced network.
        images: Normalised calibration images; every layer sees all of them before the next one runs.
        per_image: Output positions sampled from each image.
        seed: Seed of the positions.
        ridge: Ridge relative to the mean variance of the inputs.

    Raises:
        UserError: The network cannot be traced symbolically.
    """

    def __init__(
        self,
        candidates: Candidates,
        topology: Topology,
        images: Tensor,
        *,
        per_image: int = 16,
        seed: int = 0,
        ridge: float = _RIDGE,
    ):
        layers = repairable_consumers(candidates)
        options = {"per_image": per_image, "seed": seed}
        super().__init__(candidates.original, layers, topology, images, ridge=ridge, **options)

    @torch.no_grad()
    def __call__(self, model: nn.Module, removed: Sequence[int], keeps: Keeps) -> None:
        """Mends every layer that lost inputs."""
        cut = {
            name
            for name, layer in self._layers.items()
            if "in" in keeps.get(name, {}) and len(keeps[name]["in"]) < layer.in_channels
        }
        self._mended(model, cut, keeps)


def _parts(batches: Batches) -> list[slice]:
    """Where each batch stands among all images."""
    ends = list(accumulate(len(batch) for batch in batches))
    return [slice(end - len(batch), end) for end, batch in zip(ends, batches, strict=True)]
