"""AMC's state: eleven features that describe the decision now taken.

He et al., ECCV 2018, section 3.1: (t, n, c, h, w, stride, k, FLOPs[t], reduced, rest, a_{t-1}). Two things
differ from the authors' release on purpose. All features are scaled by fixed constants, so that a policy can
be carried to another network, where the release scales by each network's own extremes. And the three cost
features are differences of one and the same cost function, where the release mixes parameters with FLOPs,
always counts every depthwise layer as still to come, and takes undecided layers for cut to their bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from amc_env.errors import UserError

if TYPE_CHECKING:
    from amc_env.graph.layers import Layer, LayerGraph
    from amc_env.space import Grid, SearchSpace

FEATURES: Final = (
    "index",
    "out_channels",
    "in_channels",
    "height",
    "width",
    "stride",
    "kernel",
    "macs",
    "reduced",
    "rest",
    "previous_ratio",
)
"""Names of the features, in the order of the observation."""

LARGEST: Final = {
    "index": 255,
    "out_channels": 4095,
    "in_channels": 4095,
    "height": 511,
    "width": 511,
    "stride": 7,
    "kernel": 15,
}
"""Size ``s`` becomes ``log(1 + s) / log(1 + LARGEST)``, cut off at 1."""


@dataclass(frozen=True)
class DecisionDescription:
    """What is fixed about one decision: its layer, or the first consumer of its channels in forward order.

    Attributes:
        name: The decision's name.
        out_channels: Output channels (features) of the layer, n.
        in_channels: Input channels (features) of the layer, c.
        height: Height of the layer's input in pixels; 1 for a linear layer.
        width: Width of the layer's input in pixels; 1 for a linear layer.
        stride: The larger of the layer's strides; 1 for a linear layer.
        kernel: The larger side of the layer's kernel; 1 for a linear layer.
    """

    name: str
    out_channels: int
    in_channels: int
    height: int
    width: int
    stride: int
    kernel: int


def describe(graph: LayerGraph, grids: Sequence[Grid]) -> tuple[DecisionDescription, ...]:
    """Describes the decisions of ``grids``: about a layer's weights, or about channels by who reads them.

    Raises:
        UserError: A grid's name is neither a layer nor a channel group that a layer reads.
    """
    return tuple(_description(grid.name, _described_layer(graph, grid.name)) for grid in grids)


def _described_layer(graph: LayerGraph, decision: str) -> Layer:
    """The layer that a decision is about: the one that is masked, else the first that reads the channels."""
    layers = {layer.name: layer for layer in graph.layers}
    if not graph.groups and decision in layers:
        return layers[decision]
    groups = {group.name: group for group in graph.groups}
    if decision not in groups or not groups[decision].consumers:
        raise UserError(
            f"decision {decision!r} is no channel group that a layer reads; there are {sorted(groups)}",
            code="does_not_fit",
        )
    return min((layers[name] for name in groups[decision].consumers), key=lambda layer: layer.index)


def _description(name: str, layer: Layer) -> DecisionDescription:
    return DecisionDescription(
        name=name,
        out_channels=layer.out_channels,
        in_channels=layer.in_channels,
        height=layer.in_size[0],
        width=layer.in_size[1],
        stride=max(layer.stride),
        kernel=max(layer.kernel),
    )


class Encoder:
    """Turns the counts chosen so far into the observation of the next decision.

    ==  ==============  =====================================================================================
    #   feature         value in [0, 1]
    ==  ==============  =====================================================================================
    0   index           decision t, from 0: log(1 + t) / log(256)
    1   out_channels    of the layer or first consumer: log(1 + n) / log(4096)
    2   in_channels     of the same: log(1 + c) / log(4096)
    3   height          of the same layer's input: log(1 + h) / log(512)
    4   width           of the same layer's input: log(1 + w) / log(512)
    5   stride          of the same: log(1 + stride) / log(8)
    6   kernel          of the same: log(1 + k) / log(16)
    7   macs            MACs of all members in the unpruned network: cost(nothing) - cost(all of t), share of W
    8   reduced         MACs removed by the decisions taken: cost(nothing) - cost(taken), share of W
    9   rest            MACs that later decisions could remove: cost(taken) - cost(taken, all later), of W
    10  previous_ratio  the ratio executed for decision t - 1 (after snapping and the bound); 0 at t = 0
    ==  ==============  =====================================================================================

    W is the MACs of the unpruned network, and decisions that a cost's list leaves out are untouched (nothing
    removed).
    """

    def __init__(self, descriptions: Sequence[DecisionDescription], space: SearchSpace) -> None:
        """Computes what does not change during a search.

        Args:
            descriptions: One for each decision of the search space, in its order.
            space: The search space; its costs must include 'macs'.

        Raises:
            UserError: The descriptions are not those of the search space, or it has no cost 'macs'.
        """
        names = tuple(description.name for description in descriptions)
        if names != tuple(space.names):
            raise UserError(
                f"descriptions of {names} do not fit the decisions {tuple(space.names)}", code="does_not_fit"
            )
        self._macs = _macs_of(space)
        self._totals = tuple(space.totals)
        count = len(names)
        self._whole = self._macs((0,) * count)
        self._fixed = np.array([_sizes(t, d) for t, d in enumerate(descriptions)], dtype=np.float64)
        alone = [(0,) * t + (self._totals[t],) + (0,) * (count - t - 1) for t in range(count)]
        self._alone = [self._whole - self._macs(removed) for removed in alone]

    def __call__(self, chosen: Sequence[int]) -> npt.NDArray[np.float32]:
        """Returns the observation [11] before decision ``len(chosen)``.

        Args:
            chosen: Removed counts of the decisions taken so far, as executed; fewer than there are decisions.
        """
        t, count = len(chosen), len(self._totals)
        taken = tuple(chosen)
        now = self._macs(taken + (0,) * (count - t))
        without_later = self._macs((*taken, 0, *self._totals[t + 1 :]))
        shares = np.array([self._alone[t], self._whole - now, now - without_later]) / self._whole
        previous = taken[-1] / self._totals[t - 1] if taken else 0.0
        features = np.concatenate([self._fixed[t], shares, [previous]])
        return np.asarray(np.clip(features, 0.0, 1.0), dtype=np.float32)


def _sizes(t: int, d: DecisionDescription) -> list[float]:
    sizes = (t, d.out_channels, d.in_channels, d.height, d.width, d.stride, d.kernel)
    return [math.log1p(size) / math.log1p(most) for size, most in zip(sizes, LARGEST.values(), strict=True)]


def _macs_of(space: SearchSpace) -> Callable[[Sequence[int]], float]:
    """The search space's MACs as a function of removed counts, defined up to everything removed."""
    for cost in space.costs:
        if cost.name == "macs":
            return cost
    raise UserError(
        f"the state needs the cost 'macs', the search space has {[cost.name for cost in space.costs]}",
        code="missing",
    )
