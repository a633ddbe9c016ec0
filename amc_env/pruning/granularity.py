"""Granularities: what one decision removes, and the counts it may take."""

from __future__ import annotations

import math
from dataclasses import dataclass

from amc_env.errors import UserError
from amc_env.layers import ChannelGroup, LayerGraph
from amc_env.strategy import Grid


@dataclass(frozen=True)
class Channel:
    """Whole channels (neurons of linear layers): one decision per channel group.

    Attributes:
        multiple: What is kept of a layer is a multiple of this many channels, or everything.
        max_ratio: The largest pruning ratio of a decision, in (0, 1).
    """

    multiple: int = 2
    max_ratio: float = 0.9

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise UserError(f"channel_multiple={self.multiple} must be a whole number of at least 1")
        if not 0.0 < self.max_ratio < 1.0:
            raise UserError(f"max_ratio={self.max_ratio} is outside (0, 1)")

    def decisions(self, graph: LayerGraph) -> tuple[LayerGraph, tuple[Grid, ...]]:
        """The grids of all decisions, and the graph without the groups that leave nothing to decide.

        Groups too small for ``multiple`` and ``max_ratio`` are added to the graph's ``whole`` with that
        reason.
        """
        grids = {group.name: self._grid(group) for group in graph.groups}
        reason = f"it is too narrow for channel_multiple={self.multiple} and max_ratio={self.max_ratio}"
        graph = graph.only({name: reason for name, grid in grids.items() if grid.size == 1})
        return graph, tuple(grids[group.name] for group in graph.groups)

    def _grid(self, group: ChannelGroup) -> Grid:
        per_unit = group.channels // group.total
        step = self.multiple // math.gcd(self.multiple, per_unit)
        most = min(math.floor(self.max_ratio * group.total + 1e-9), group.total - 1)
        return Grid(group.name, group.total, step, most)
