"""Repair: what corrects a cut network before it is scored.

Least squares replaces a layer's weights by those that give the uncut network's outputs best from the inputs
that stayed (He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017; AMC section
3.4). Inputs and outputs are those of the uncut network, and the kept sets are nested in one order, so the
leading blocks of one Cholesky factor a layer hold every solution of a search. The sequential form goes front
to back on what reaches each layer in the cut network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from amc_env.graph.layers import Layer
from amc_env.graph.surgery import Keeps
from amc_env.graph.topology import Topology
from amc_env.inputs import Inputs
from amc_env.pruning.calibration import Moments, record, repairable
from amc_env.pruning.candidate import Candidates
from amc_env.pruning.repair.base import absorbs, put

# Relative to the mean variance of the inputs: dead and duplicate channels must not break the solve.
RIDGE = 1e-6


# Of the mean square of the inputs: what centring in float64 may get wrong, with room to spare.
_ROUNDING = 1e-11


# Solutions kept for later: solving again from the factor is cheap, memory is not.
_SOLVED_BYTES = 128 * 2**20


def factored(moments: Moments, intercept: bool, ridge: float) -> tuple[Moments, Tensor]:
    """The moments (about the means, with an intercept) and the factor of their ridged Gram matrix."""
    about = moments.centred() if intercept else moments
    spread = about.xx.diagonal(dim1=-2, dim2=-1)
    # Centring leaves rounding errors in proportion to the raw squares: inputs that are all constant need a
    # floor.
    floor = _ROUNDING * moments.xx.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    lift = (ridge * spread.mean(-1, keepdim=True) + floor).clamp_min(1e-18)
    return about, torch.linalg.cholesky(about.xx + torch.diag_embed(lift.expand_as(spread)))


def solve(moments: Moments, intercept: bool, ridge: float) -> tuple[Tensor, Tensor | None]:
    """Weights [out, n] (groups stacked) and intercept [out] that give y best from x."""
    about, factor = factored(moments, intercept, ridge)
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
        self.area = layer.area
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
        inputs: Calibration inputs of the training split.
        per_image: Output positions sampled from each image.
        seed: Seed of the positions.
        ridge: Ridge relative to the mean variance of the inputs.
    """

    name = "least_squares"

    def __init__(
        self,
        candidates: Candidates,
        topology: Topology,
        inputs: Inputs,
        *,
        per_image: int = 16,
        seed: int = 0,
        ridge: float = RIDGE,
    ):
        self._topology = topology
        self._ridge = ridge
        layers = repairable_consumers(candidates)
        self._columns = {layer.name: _Columns(candidates, layer) for layer in layers}
        self._moments = record(candidates.original, layers, inputs, per_image=per_image, seed=seed)
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
            moments = select(self._moments.pop(name), ordered)
            about, factor = factored(moments, intercept, self._ridge)
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
        moments = select(moments, columns.columns(kept).to(moments.xx.device))
        return solve(moments, absorbs(columns.layer, self._topology), self._ridge)


def select(moments: Moments, columns: Tensor) -> Moments:
    xx = moments.xx[:, columns][:, :, columns]
    return Moments(xx, moments.xy[:, columns], moments.x[:, columns], moments.y, moments.count)


def repairable_consumers(candidates: Candidates) -> list[Layer]:
    """Layers that can lose inputs and that least squares can repair, in forward order."""
    names = {name for group in candidates.graph.groups for name in group.consumers}
    modules = dict(candidates.original.named_modules())
    return [x for x in candidates.graph.layers if x.name in names and repairable(modules[x.name], x)]
