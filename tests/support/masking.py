"""Networks whose weights are masked: every granularity, and candidates of the small networks under it."""

import functools

import torch
from networks import images, network
from torch import Tensor, nn

from amc_env.graph.layers import LayerGraph
from amc_env.graph.tracing import trace_layers
from amc_env.pruning.candidate import MaskedCandidates
from amc_env.pruning.granularity import NM, FineGrained, Kernel, Masked, Vector
from amc_env.space import Grid

GRANULARITIES: dict[str, Masked] = {
    "fine_grained": FineGrained(),
    "row": Vector("row"),
    "column": Vector("column"),
    "kernel": Kernel(),
    "2:4": NM(2, 4),
    "1:4": NM(1, 4),
    "4:8": NM(4, 8),
}

SUITABLE = [
    (name, granularity)
    for name in ("residual", "selection", "grouped", "gated", "flatten", "mlp")
    for granularity in GRANULARITIES
    if name != "mlp" or granularity not in ("row", "column", "kernel")  # it has no kernels
]
"""Small networks and the granularities under which there is something to decide."""


@functools.cache
def layers(name: str) -> tuple[nn.Module, LayerGraph]:
    """A network and its layers; shared, not to be changed."""
    model = network(name)
    return model, trace_layers(model, images(1))


def masked(name: str, granularity: str) -> tuple[MaskedCandidates, LayerGraph, tuple[Grid, ...]]:
    """Candidates by magnitude, the graph with what is skipped, and the grids of the decisions."""
    model, graph = layers(name)
    graph, grids = GRANULARITIES[granularity].decisions(graph)
    return MaskedCandidates(model, grids, removal_rank(model, graph, grids, granularity)), graph, grids


def removal_rank(
    model: nn.Module, graph: LayerGraph, grids: tuple[Grid, ...], granularity: str
) -> dict[str, Tensor]:
    """The order of removal by squared weights."""
    return {
        grid.name: GRANULARITIES[granularity].removal_rank(
            weight(model, grid.name).double() ** 2, graph.layer(grid.name)
        )
        for grid in grids
    }


def weight(model: nn.Module, name: str) -> Tensor:
    """A layer's weight."""
    found = model.get_submodule(name).weight
    assert isinstance(found, torch.Tensor)
    return found.detach()
