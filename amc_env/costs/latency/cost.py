"""Predicted latency as a cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from torch import nn

from amc_env.costs.base import BudgetSettings, CostInputs, Kind, NetworkCost
from amc_env.costs.counts import kept_channels
from amc_env.costs.latency.table import Floats, Ints, LatencyTable, Lookup
from amc_env.costs.latency.units import inside_units, units_of
from amc_env.costs.memory import Activations
from amc_env.errors import UserError
from amc_env.graph.layers import LayerGraph
from amc_env.validation import Count, Natural, Positive, settings


@settings
class LatencyBudget(BudgetSettings):
    """A limit on predicted latency, under the conditions of LatencySettings; see `Latency`.

    Attributes:
        table: A latency table's file; None: one is built for this network on this machine before the search.
        elsewhere: Use a table that was measured under other conditions (on a phone, say) as it is.
        vector_width: Channels that the hardware computes at once: what is kept of a layer is a multiple of them unless
            channel_multiple says otherwise.
        tolerance: What interpolation in a table built here may miss; see `amc_env.costs.latency.sampling.build_table`.
        points: The most that refining may time; see there.
        repeats: Timed passes of each of its points.
        kept: Where a table built here is written, and read when the run is resumed.
    """

    cost: str = "latency"
    table: str | None = field(default=None, metadata={"identity": False})
    elsewhere: bool = False
    vector_width: Count = 8
    tolerance: Positive = 0.05
    points: Natural = 1500
    repeats: Count = 30
    kept: Path | None = field(default=None, repr=False, compare=False, metadata={"identity": False})

    @property
    def channel_multiple(self) -> int:
        """The channels that the hardware computes at once."""
        return self.vector_width


class Latency(NetworkCost):
    """Predicted milliseconds of one pass of a pruned network; a `Cost`.

    The sum of its units' times in the table, corrected. It never rises when more is removed: times are monotone,
    operations give fewer elements, and neither of their factors is negative.

    Args:
        model: The uncut network.
        graph: Its layers, one group a decision.
        table: Times of its units.
        activations: Elements of its operations, for the correction; None: the correction has no part for them.

    Raises:
        UserError: The table lacks a unit of the network, does not reach its channels, or corrects for elements
            that are not given.
    """

    name: ClassVar[str] = "latency"
    title: ClassVar[str] = "latency"
    unit: ClassVar[str] = "ms"
    granularities: ClassVar[tuple[Kind, ...]] = ("channel",)
    Settings: ClassVar[type[BudgetSettings]] = LatencyBudget

    def __init__(
        self,
        model: nn.Module,
        graph: LayerGraph,
        table: LatencyTable,
        activations: Activations | None = None,
    ):
        units = units_of(model, graph)
        missing = [f"{name} ({unit})" for name, unit in units.items() if unit not in table.units]
        if missing:
            raise UserError(
                f"the latency table has no times for {len(missing)} layers, like {'; '.join(missing[:3])}: it is another "
                "network's or image size's; build one with amc-latency build",
                code="wrong_table",
                field="budget.table",
            )
        if table.correction.per_element_ms > 0 and activations is None:
            raise UserError(
                "the latency table corrects for activations, and this network's cannot be counted",
                code="wrong_table",
                field="budget.table",
            )
        self._calls = np.array([layer.calls for layer in graph.layers], dtype=np.float64)
        self._sizes, self._per_unit = kept_channels(graph)
        depthwise = np.array([unit.depthwise for unit in units.values()])
        self._sizes[depthwise, 0], self._per_unit[depthwise, 0] = 1, 0
        self._lookup = Lookup([(name, table.units[unit]) for name, unit in units.items()])
        self._correction = table.correction
        self._areas = np.array(
            [
                layer.weights / (inputs * layer.out_channels)
                for layer, inputs in zip(graph.layers, self._sizes[:, 0], strict=True)
            ]
        )
        self._groups = len(graph.groups)
        self._elements = _elements(activations, inside_units(model, graph), self._groups)

    @classmethod
    def build(cls, problem: CostInputs, settings: LatencyBudget) -> Self:
        """Predicts from the network's table, which is read or built.

        Raises:
            UserError: The table is another network's, was measured under other conditions, or predicts no time above 0.
        """
        latency = cls(problem.model, problem.graph, *problem.latency_table(settings))
        latency.check()
        return latency

    def check(self) -> None:
        """Refuses a table by which the unpruned network takes no time.

        Raises:
            UserError: It is such a table.
        """
        unpruned = self([0] * self._groups)
        if not unpruned > 0:
            raise UserError(
                f"the latency table predicts {unpruned:g} ms for the unpruned network: its correction cannot be right; "
                "build one with amc-latency build",
                code="wrong_table",
            )

    @classmethod
    def format(cls, value: float) -> str:
        """Milliseconds, like '1.23 ms'."""
        return f"{value:.2f} ms"

    def __call__(self, removed: Sequence[int]) -> float:
        """Milliseconds of the pruned network.

        Raises:
            UserError: The table does not reach its channels.
        """
        return self._correction(*self.parts(removed))

    def by_layer(self, removed: Sequence[int]) -> Floats:
        """Milliseconds of each layer's unit alone, in forward order; the correction is not applied.

        Raises:
            UserError: The table does not reach its channels.
        """
        return self._times(self._sizes - self._per_unit @ np.asarray(removed, dtype=np.int64))

    def parts(self, removed: Sequence[int]) -> tuple[float, float, float]:
        """What the correction is of: the sum of the units' milliseconds, the elements that operations outside of units
        give for one example, and the units' weights.
        """
        counts = np.asarray(removed, dtype=np.int64)
        unpruned, per_unit = self._elements
        kept = self._sizes - self._per_unit @ counts
        weights = self._areas @ (kept[:, 0] * kept[:, 1])
        return float(self._times(kept).sum()), float(unpruned - per_unit @ counts), float(weights)

    def _times(self, kept: Ints) -> Floats:
        times: Floats = self._calls * self._lookup(kept[:, 0], kept[:, 1])
        return times


def _elements(activations: Activations | None, inside: frozenset[str], decisions: int) -> tuple[int, Ints]:
    """Elements outside of units: of the uncut network, and how many fewer with one unit of each decision gone."""
    none = [0] * decisions
    if activations is None:
        return 0, np.array(none)
    unpruned = activations.elements(none, inside=inside)
    ones = np.eye(decisions, dtype=np.int64)
    return unpruned, np.array(
        [unpruned - activations.elements(one.tolist(), inside=inside) for one in ones], dtype=np.int64
    )
