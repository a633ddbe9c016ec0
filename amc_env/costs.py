"""What a strategy costs, as a function of the counts removed: built once for a graph, microseconds to ask.

Costs are sums of products of kept channels, so they never rise when a decision removes more. One
multiply-accumulate is one MAC; the papers' "FLOPs" are MACs (2 FLOPs each).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from amc_env.layers import Layer, LayerGraph


class Cost(Protocol):
    """A cost of a strategy, non-increasing in every decision."""

    @property
    def name(self) -> str:
        """Its name in results, e.g. ``macs``."""
        ...

    @property
    def unit(self) -> str:
        """Its unit, for people."""
        ...

    def __call__(self, removed: Sequence[int]) -> float:
        """The cost when ``removed`` units (one count per decision) are gone."""
        ...


class _Products:
    """``constant + sum(coefficient * kept(a) * kept(b))`` over dimensions of the network."""

    def __init__(
        self, graph: LayerGraph, terms: Sequence[tuple[float, tuple[str, str], tuple[str, str] | None]]
    ):
        sizes: dict[tuple[str, str], int] = {}
        per_unit: dict[tuple[str, str], dict[int, int]] = {}
        for g, group in enumerate(graph.groups):
            for member in group.members:
                per_unit.setdefault((member.module, member.side), {})[g] = member.positions.shape[1]
        for layer in graph.layers:
            sizes[layer.name, "in"], sizes[layer.name, "out"] = layer.in_channels, layer.out_channels
        for module in graph.channelwise:
            sizes[module.name, "out"] = module.channels
        index = {key: i for i, key in enumerate(sizes)}
        self._sizes = np.array([*sizes.values(), 1.0])  # the last entry stands for a missing factor
        self._per_unit = np.zeros((len(self._sizes), len(graph.groups)))
        for key, counts in per_unit.items():
            for g, count in counts.items():
                self._per_unit[index[key], g] = count
        self._coefficients = np.array([term[0] for term in terms])
        self._first = np.array([index[term[1]] for term in terms])
        self._second = np.array([index[term[2]] if term[2] else len(self._sizes) - 1 for term in terms])

    def __call__(self, removed: Sequence[int]) -> float:
        kept = self._sizes - self._per_unit @ np.asarray(removed, dtype=np.float64)
        return float(self._coefficients @ (kept[self._first] * kept[self._second]))


def _weights(layer: Layer) -> tuple[float, tuple[str, str], tuple[str, str] | None]:
    """The number of weights as a term: per output channel, k*k for each input channel of its group."""
    area = layer.kernel[0] * layer.kernel[1]
    if layer.depthwise:
        return float(area), (layer.name, "out"), None
    return area / layer.groups, (layer.name, "out"), (layer.name, "in")


class Macs:
    """Multiply-accumulates of one example: convolutions without bias, linear layers with theirs.

    This is the counting of the AMC release: MobileNet-V1 has 568,741,352.
    """

    name = "macs"
    unit = "MACs"

    def __init__(self, graph: LayerGraph):
        terms = []
        for layer in graph.layers:
            if layer.free:
                continue
            coefficient, first, second = _weights(layer)
            terms.append((coefficient * layer.positions, first, second))
            if layer.kind == "linear" and layer.bias:
                terms.append((float(layer.positions), (layer.name, "out"), None))
        self._products = _Products(graph, terms)
        self._other = graph.other_macs

    def __call__(self, removed: Sequence[int]) -> float:
        """MACs of the cut network."""
        return self._products(removed) + self._other


class Params:
    """Number of parameters of the cut network, all of them."""

    name = "params"
    unit = "parameters"

    def __init__(self, graph: LayerGraph):
        terms = []
        for layer in graph.layers:
            if layer.free:
                continue
            terms.append(_weights(layer))
            if layer.bias:
                terms.append((1.0, (layer.name, "out"), None))
        for module in graph.channelwise:
            terms.append((float(module.params_per_channel), (module.name, "out"), None))
        self._products = _Products(graph, terms)
        self._other = graph.other_params

    def __call__(self, removed: Sequence[int]) -> float:
        """Parameters of the cut network."""
        return self._products(removed) + self._other
