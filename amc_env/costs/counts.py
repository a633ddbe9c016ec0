"""What a strategy costs, as a function of the counts removed: built once for a graph, microseconds to ask.

Costs are sums of products of kept channels, so they never rise when a decision removes more. One
multiply-accumulate is one MAC; the papers' "FLOPs" are MACs (2 FLOPs each).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

from amc_env.costs.base import BudgetSettings, CostInputs, NetworkCost
from amc_env.graph.layers import Layer, LayerGraph
from amc_env.space import Grid

Dimension = tuple[str, str]
"""A module's name and side."""


@dataclass(frozen=True)
class _Term:
    """``coefficient * kept(first) * kept(second)``; ``weights_of`` names the layer whose weights it counts."""

    coefficient: float
    first: Dimension
    second: Dimension | None = None
    weights_of: str | None = None


def _weights(layer: Layer, places: int = 1) -> _Term:
    """A layer's weights, each counted ``places`` times: k*k for each pair of output and (grouped) input."""
    area = layer.area * places
    if layer.depthwise:
        return _Term(float(area), (layer.name, "out"), None, layer.name)
    return _Term(area / layer.groups, (layer.name, "out"), (layer.name, "in"), layer.name)


class _Products:
    """``constant + sum(coefficient * kept(a) * kept(b))`` over dimensions of the network."""

    def __init__(self, graph: LayerGraph, terms: Sequence[_Term], constant: float):
        sizes: dict[Dimension, int] = {}
        per_unit: dict[Dimension, dict[int, int]] = {}
        for g, group in enumerate(graph.groups):
            for member in group.members:
                per_unit.setdefault((member.module, member.side), {})[g] = member.positions.shape[1]
        for layer in graph.layers:
            sizes[layer.name, "in"], sizes[layer.name, "out"] = layer.in_channels, layer.out_channels
        for module in graph.channelwise:
            sizes[module.name, module.side] = module.channels
        index = {key: i for i, key in enumerate(sizes)}
        self._constant = constant
        self._sizes = np.array([*sizes.values(), 1.0])  # the last entry stands for a missing factor
        self._per_unit = np.zeros((len(self._sizes), len(graph.groups)))
        for key, counts in per_unit.items():
            for g, count in counts.items() if key in index else ():
                self._per_unit[index[key], g] = count
        self._coefficients = np.array([term.coefficient for term in terms])
        self._first = np.array([index[term.first] for term in terms])
        self._second = np.array([index[t.second] if t.second else len(self._sizes) - 1 for t in terms])

    def values(self, removed: Sequence[int]) -> npt.NDArray[np.float64]:
        """Every term."""
        kept = self._sizes - self._per_unit @ np.asarray(removed, dtype=np.float64)
        found: npt.NDArray[np.float64] = self._coefficients * (kept[self._first] * kept[self._second])
        return found

    def __call__(self, removed: Sequence[int]) -> float:
        return self._constant + float(self.values(removed).sum())


class _Shares:
    """The same where weights are masked: a layer's terms count by the share of its weights that is kept."""

    def __init__(self, graph: LayerGraph, terms: Sequence[_Term], constant: float, masked: Sequence[Grid]):
        values = _Products(graph, terms, constant).values(())
        by_layer = {t.weights_of: float(v) for t, v in zip(terms, values, strict=True) if t.weights_of}
        whole = np.array([by_layer[grid.name] for grid in masked])
        self._totals = np.array([grid.total for grid in masked], dtype=np.float64)
        self._per_unit = whole / self._totals  # whole numbers, so that all sums are exact
        self._others = constant + float(values.sum()) - float(whole.sum())

    def __call__(self, removed: Sequence[int]) -> float:
        kept = self._totals - np.asarray(removed, dtype=np.float64)
        return self._others + float(self._per_unit @ kept)


def _sum(
    graph: LayerGraph, terms: Sequence[_Term], constant: float, masked: Sequence[Grid]
) -> Callable[[Sequence[int]], float]:
    return _Shares(graph, terms, constant, masked) if masked else _Products(graph, terms, constant)


class Macs(NetworkCost):
    """Multiply-accumulates of one example: convolutions without bias, linear layers with theirs, attention's products.

    This is the counting of the AMC release: MobileNet-V1 has 568,741,352.

    Args:
        graph: The layers, and the channel groups that decisions cut.
        masked: The decisions where they mask weights of layers instead; MACs with zeros are not counted then.
    """

    name: ClassVar[str] = "macs"
    title: ClassVar[str] = "MACs"
    unit: ClassVar[str] = "MACs"

    @classmethod
    def build(cls, problem: CostInputs, settings: BudgetSettings) -> Self:
        """Counts from the layers' shapes."""
        return cls(problem.graph, problem.masked)

    def __init__(self, graph: LayerGraph, masked: Sequence[Grid] = ()):
        terms = []
        for layer in graph.layers:
            if layer.costless:
                continue
            terms.append(_weights(layer, layer.positions))
            if layer.kind == "linear" and layer.bias:
                terms.append(_Term(float(layer.positions), (layer.name, "out")))
        terms += [_Term(product.macs, product.dimension) for product in graph.attention if product.dimension]
        fixed = graph.other_macs + sum(product.macs for product in graph.attention if not product.dimension)
        self._sum = _sum(graph, terms, float(fixed), masked)

    def __call__(self, removed: Sequence[int]) -> float:
        """MACs of the pruned network."""
        return self._sum(removed)


class Params(NetworkCost):
    """Number of parameters of the pruned network, all of them.

    Args:
        graph: The layers, and the channel groups that decisions cut.
        masked: The decisions where they mask weights of layers instead; zeros are not counted then.
    """

    name: ClassVar[str] = "params"
    title: ClassVar[str] = "parameters"
    unit: ClassVar[str] = "parameters"

    @classmethod
    def build(cls, problem: CostInputs, settings: BudgetSettings) -> Self:
        """Counts from the layers' shapes."""
        return cls(problem.graph, problem.masked)

    def __init__(self, graph: LayerGraph, masked: Sequence[Grid] = ()):
        terms = []
        for layer in graph.layers:
            if layer.costless:
                continue
            terms.append(_weights(layer))
            if layer.bias:
                terms.append(_Term(1.0, (layer.name, "out")))
        for module in graph.channelwise:
            terms.append(_Term(float(module.params_per_channel), (module.name, module.side)))
        self._sum = _sum(graph, terms, float(graph.other_params), masked)

    def __call__(self, removed: Sequence[int]) -> float:
        """Parameters of the pruned network."""
        return self._sum(removed)


Ints = NDArray[np.int64]


def kept_channels(graph: LayerGraph) -> tuple[Ints, Ints]:
    """How many channels every layer keeps, as ``sizes - per_unit @ removed``.

    Returns:
        Channels of the uncut layers [layers, 2], inputs then outputs; and how many of them one removed unit of
        each group takes [layers, 2, groups].
    """
    sizes = np.array([(layer.in_channels, layer.out_channels) for layer in graph.layers], dtype=np.int64)
    per_unit = np.zeros((*sizes.shape, len(graph.groups)), dtype=np.int64)
    rows = {layer.name: row for row, layer in enumerate(graph.layers)}
    for g, group in enumerate(graph.groups):
        for member in group.members:
            if member.module in rows:
                per_unit[rows[member.module], int(member.side == "out"), g] = member.positions.shape[1]
    return sizes, per_unit
