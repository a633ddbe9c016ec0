"""What all repairs share, and batch norm statistics re-estimated on training images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from amc_env.graph.layers import Layer
from amc_env.graph.surgery import Keeps
from amc_env.graph.topology import Topology
from amc_env.inputs import Inputs, call, count, pieces, take


class Repair(Protocol):
    """Repairs pruned networks in place."""

    @property
    def name(self) -> str:
        """Its name in conf."""
        ...

    def __call__(self, model: nn.Module, removed: Sequence[int], keeps: Keeps) -> None:
        """Repairs ``model``, which was cut to ``keeps`` by removing ``removed`` units of the groups."""
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
        """Repairs by each part in turn."""
        for part in self._parts:
            part(model, removed, keeps)


class BatchNorm:
    """Re-estimates the statistics of all batch norms from fixed training images.

    Args:
        inputs: Of the training split; inputs, order and batch are the same for every candidate.
        batch: Examples of a batch.
    """

    name = "batch_norm"

    def __init__(self, inputs: Inputs, batch: int = 250):
        self._inputs = inputs
        self._batch = min(batch, count(inputs))

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
        whole = count(self._inputs) // self._batch * self._batch
        for batch in pieces(take(self._inputs, slice(whole)), self._batch):
            call(model, batch)
        for norm, (momentum, training) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.train(training)


def norm_after(layer: Layer, topology: Topology) -> str | None:
    """The batch norm over the layer's outputs; on sequences of tokens it normalises positions instead."""
    tokens = layer.kind == "linear" and layer.positions > 1
    return None if tokens else topology.norm_after.get(layer.name)


def absorbs(layer: Layer, topology: Topology) -> bool:
    """Whether an intercept has a place to go: the layer's bias, or the mean of the batch norm after it."""
    return layer.bias or norm_after(layer, topology) is not None


def put(model: nn.Module, layer: Layer, topology: Topology, weight: Tensor, intercept: Tensor | None) -> None:
    """Writes a copy of a solution [out, in, ...] and its intercept [out] into a cut network, which may be trained next."""
    module = model.get_submodule(layer.name)
    old = module.weight
    assert isinstance(old, nn.Parameter)
    old.data = weight.reshape(old.shape).to(old.dtype, copy=True)
    if intercept is None:
        return
    if layer.bias:
        assert isinstance(module.bias, nn.Parameter)
        module.bias.data = intercept.to(old.dtype, copy=True)
    else:
        norm = model.get_submodule(topology.norm_after[layer.name])
        assert isinstance(norm.running_mean, Tensor)
        norm.running_mean = norm.running_mean - intercept.to(old.dtype)
