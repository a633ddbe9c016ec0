"""Least squares for masked networks: the weights that stay are refitted, zeros stay zero.

Every output has a support of its own, so every output has a system of its own: the part of the layer's Gram matrix
that its weights see. Unlike whole channels these sets share no order that one factor could hold, but at the
sparsities that masks are for they are small. The ridge pulls towards the trained weights rather than to zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from amc_env.graph.layers import Layer
from amc_env.graph.surgery import Keeps
from amc_env.graph.topology import Topology
from amc_env.inputs import Inputs
from amc_env.pruning.calibration import Moments, record, repairable
from amc_env.pruning.repair.base import absorbs, put
from amc_env.pruning.repair.sequential import FrontToBack

_RIDGE = 1e-3


# Of one batch of systems, in float64.
_SYSTEM_BYTES = 256 * 2**20


class MaskedLeastSquares:
    """Least squares on the unpruned network's inputs and outputs, for every layer that lost weights.

    Args:
        original: The unpruned network.
        layers: Its layers.
        topology: Where intercepts can go.
        inputs: Calibration inputs of the training split.
        per_image: Output positions sampled from each image.
        seed: Seed of the positions.
        ridge: Ridge relative to the mean variance of the inputs, towards the trained weights.
    """

    name = "least_squares"

    def __init__(
        self,
        original: nn.Module,
        layers: Sequence[Layer],
        topology: Topology,
        inputs: Inputs,
        *,
        per_image: int = 16,
        seed: int = 0,
        ridge: float = _RIDGE,
    ):
        self._topology = topology
        self._ridge = ridge
        self._layers = _repairable(original, layers)
        self._moments = record(original, self._layers, inputs, per_image=per_image, seed=seed)

    @torch.no_grad()
    def __call__(self, model: nn.Module, removed: Sequence[int], keeps: Keeps) -> None:
        """Refits the weights that are not zero."""
        for layer in self._layers:
            if not _masked(model, layer):
                continue
            weight = model.get_submodule(layer.name).weight
            assert isinstance(weight, Tensor)
            intercept = absorbs(layer, self._topology)
            put(
                model,
                layer,
                self._topology,
                *refitted(self._moments[layer.name], weight.flatten(1), intercept, self._ridge),
            )


class MaskedSequential(FrontToBack):
    """Least squares front to back, on what reaches each layer in the network as masked and repaired so far.

    Args:
        original: The unpruned network.
        layers: Its layers.
        topology: The traced network.
        inputs: Calibration inputs; every layer sees all of them before the next one runs.
        per_image: Output positions sampled from each image.
        seed: Seed of the positions.
        ridge: Ridge relative to the mean variance of the inputs, towards the trained weights.
    """

    def __init__(
        self,
        original: nn.Module,
        layers: Sequence[Layer],
        topology: Topology,
        inputs: Inputs,
        *,
        per_image: int = 16,
        seed: int = 0,
        ridge: float = _RIDGE,
    ):
        layers_to_repair = _repairable(original, layers)
        options = {"per_image": per_image, "seed": seed}
        super().__init__(original, layers_to_repair, topology, inputs, ridge=ridge, **options)

    @torch.no_grad()
    def __call__(self, model: nn.Module, removed: Sequence[int], keeps: Keeps) -> None:
        """Repairs every layer that lost weights."""
        self._repair_layers(
            model, {name for name, layer in self._layers.items() if _masked(model, layer)}, keeps
        )

    def _solved(self, layer: Layer, module: nn.Module, moments: Moments) -> tuple[Tensor, Tensor | None]:
        weight = module.weight
        assert isinstance(weight, Tensor)
        return refitted(moments, weight.flatten(1), absorbs(layer, self._topology), self._ridge)


def _repairable(original: nn.Module, layers: Sequence[Layer]) -> list[Layer]:
    return [layer for layer in layers if repairable(original.get_submodule(layer.name), layer)]


def _masked(model: nn.Module, layer: Layer) -> bool:
    weight = model.get_submodule(layer.name).weight
    assert isinstance(weight, Tensor)
    return bool((weight == 0).any())


def refitted(moments: Moments, weight: Tensor, intercept: bool, ridge: float) -> tuple[Tensor, Tensor | None]:
    """The weights that give y best from x, zeros held; float64.

    Args:
        moments: Sums over samples of the layer's inputs and wanted outputs, g groups.
        weight: The masked weights, [out, n] with n = in_channels / g * kh * kw.
        intercept: Whether outputs may be shifted.
        ridge: Relative to the mean variance of the inputs.

    Returns:
        Weights [out, n] and, where asked for, the intercept [out].
    """
    about = moments.centred() if intercept else moments
    groups = len(moments.xx)
    parts = weight.detach().double().reshape(groups, -1, weight.shape[1])
    solved = [_group(about.xx[g], about.xy[g].T, parts[g], ridge) for g in range(groups)]
    if not intercept:
        return torch.cat(solved), None
    offsets = [(moments.y[g] - solved[g] @ moments.x[g]) / moments.count for g in range(groups)]
    return torch.cat(solved), torch.cat(offsets)


def _group(xx: Tensor, yx: Tensor, weight: Tensor, ridge: float) -> Tensor:
    """One group's weights [o, n] from xx [n, n] and yx [o, n]."""
    lift = (ridge * xx.diagonal().mean()).clamp_min(1e-18)
    out = torch.zeros_like(weight)
    stays = weight != 0
    counts = stays.sum(1)
    for rows in _batches(counts):
        most = int(counts[rows].max())
        # The columns that stay first; where a row has fewer, the rest are made to solve to zero.
        columns = stays[rows].to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :most]
        here = stays[rows].gather(1, columns).double()
        systems = xx[columns[:, :, None], columns[:, None, :]] * here[:, :, None] * here[:, None, :]
        systems.diagonal(dim1=1, dim2=2).add_(torch.where(here > 0, lift, 1.0))
        wanted = (yx[rows].gather(1, columns) + lift * weight[rows].gather(1, columns)) * here
        found = torch.cholesky_solve(wanted[:, :, None], torch.linalg.cholesky(systems)).squeeze(2)
        out[rows] = torch.zeros_like(out[rows]).scatter_(1, columns, found * here)
    return out


def _batches(counts: Tensor) -> Iterator[Tensor]:
    """Rows of like size together, as many as fill the memory that is set aside; rows without weights are left out."""
    order = counts.argsort(stable=True)
    order = order[counts[order] > 0]
    while len(order):
        largest = int(counts[order[-1]])
        taken = min(max(1, _SYSTEM_BYTES // (8 * largest * largest)), 16)
        yield order[-taken:]
        order = order[:-taken]
