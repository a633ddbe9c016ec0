"""How much each decision alone disturbs the layers that read it, from calibration data only: no candidate is scored.

The inputs and outputs of a layer are recorded once. With the channels that a decision removes first placed last, one
Cholesky factor holds the least-squares solution for every number of kept channels, and the energy that each solution
explains is a running sum over the rows of one triangular solve. It is what `LeastSquares` would leave unexplained.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from amc_env.graph.layers import ChannelGroup, Layer
from amc_env.graph.topology import Topology
from amc_env.inputs import Inputs
from amc_env.pruning.calibration import Moments, record
from amc_env.pruning.candidate import Candidates
from amc_env.pruning.repair.base import absorbs
from amc_env.pruning.repair.least_squares import RIDGE, factored, repairable_consumers, select
from amc_env.space import Grid

Floats = NDArray[np.float64]


def layer_errors(
    candidates: Candidates,
    grids: Sequence[Grid],
    topology: Topology,
    inputs: Inputs,
    *,
    per_image: int = 16,
    seed: int = 0,
    ridge: float = RIDGE,
) -> tuple[Floats, ...]:
    """The error of every decision at each of its feasible counts.

    Args:
        candidates: Layers, groups and the order in which units are removed.
        grids: The decisions, in the order of the groups.
        topology: Where intercepts can go.
        inputs: Calibration inputs of the training split.
        per_image: Output positions sampled from each image.
        seed: Seed of the positions.
        ridge: Ridge relative to the mean variance of the inputs.

    Returns:
        By decision, float64 [feasible counts]: the unexplained share of the output energy of each layer that reads the
        decision, summed over those layers; 0 where nothing is removed, never falling. A decision that no
        repairable layer reads has the mean of the others at its ratios.
    """
    layers = {layer.name: layer for layer in repairable_consumers(candidates)}
    moments = record(candidates.original, list(layers.values()), inputs, per_image=per_image, seed=seed)
    found: list[Floats | None] = []
    for group, units, grid in zip(candidates.graph.groups, candidates.orders, grids, strict=True):
        counts = [grid.count(index) for index in range(grid.size)]
        readers = [layers[name] for name in dict.fromkeys(group.consumers) if name in layers]
        curves = [
            _error(moments[layer.name], layer, _places(group, units, layer), counts, topology, ridge)
            for layer in readers
        ]
        found.append(np.maximum.accumulate(np.sum(curves, axis=0)) if curves else None)
    return _completed(found, grids)


def _places(group: ChannelGroup, order: Tensor, layer: Layer) -> Tensor:
    """For each (local) input channel of a layer the place of its unit in the order of removal, -1 for others; [local]."""
    places = torch.full((layer.in_channels,), -1)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    for member in group.members:
        if (member.module, member.side) == (layer.name, "in"):
            places[member.positions] = place[:, None].expand_as(member.positions)
    return places[: layer.in_channels // layer.groups]


def _error(
    moments: Moments, layer: Layer, places: Tensor, counts: Sequence[int], topology: Topology, ridge: float
) -> Floats:
    """The unexplained share of a layer's output energy with the last ``count`` units gone, for each count."""
    area = layer.area
    order = torch.sort(places, stable=True).indices  # other channels first, then those that stay longest
    columns = (order[:, None] * area + torch.arange(area)).flatten().to(moments.xx.device)
    about, factor = factored(select(moments, columns), absorbs(layer, topology), ridge)
    explained = torch.linalg.solve_triangular(factor, about.xy, upper=False).square().sum((0, 2)).cumsum(0)
    total = int(places.max()) + 1
    kept = [int((places < total - count).sum()) * area for count in counts]
    energy = [float(explained[columns_kept - 1]) if columns_kept else 0.0 for columns_kept in kept]
    total_energy = float(explained[-1])
    return 1.0 - np.array(energy) / total_energy if total_energy > 0 else np.zeros(len(counts))


def _completed(found: Sequence[Floats | None], grids: Sequence[Grid]) -> tuple[Floats, ...]:
    """The curves, with the mean of the others for decisions that have none."""
    ratios = [np.array([grid.count(index) for index in range(grid.size)]) / grid.total for grid in grids]
    known = [(x, curve) for x, curve in zip(ratios, found, strict=True) if curve is not None]

    def mean(at: Floats) -> Floats:
        curves = [np.interp(at, x, curve) for x, curve in known]
        return np.mean(curves, axis=0) if curves else at

    return tuple(mean(x) if curve is None else curve for x, curve in zip(ratios, found, strict=True))
