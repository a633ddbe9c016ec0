"""What a cost is: a class that names itself, builds itself for a network and formats its values.

A subclass of `NetworkCost` registers itself under its name when it is defined, and can then be limited by a budget.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

from torch import nn

from amc_env.errors import UserError, out_of_range
from amc_env.graph.layers import LayerGraph
from amc_env.pruning.candidate import Candidates, MaskedCandidates
from amc_env.pruning.granularity import Granularity
from amc_env.space import Grid
from amc_env.validation import Positive, Share, settings

if TYPE_CHECKING:
    from amc_env.costs.latency.cost import LatencyBudget
    from amc_env.costs.latency.table import LatencyTable
    from amc_env.costs.memory import Activations

Kind = Literal["channel", "masked"]
"""Whether decisions cut channels or mask weights."""
ALIASES = {"flops": "macs"}
"""Further names of costs: the papers call MACs FLOPs."""


class CostInputs(Protocol):
    """What a cost can be built from."""

    @property
    def model(self) -> nn.Module:
        """The unpruned network, in eval mode."""
        ...

    @property
    def graph(self) -> LayerGraph:
        """Its layers and coupled channels."""
        ...

    @property
    def grids(self) -> tuple[Grid, ...]:
        """The feasible counts of every decision."""
        ...

    @property
    def masked(self) -> tuple[Grid, ...]:
        """The decisions where they mask weights; empty where they cut channels."""
        ...

    @property
    def builder(self) -> Candidates | MaskedCandidates:
        """Builds pruned networks, and knows the order in which units are removed."""
        ...

    @property
    def activations(self) -> Activations:
        """Sizes of the activations of cut networks.

        Raises:
            UserError: They cannot be counted.
        """
        ...

    def latency_table(self, settings: LatencyBudget) -> tuple[LatencyTable, Activations | None]:
        """The network's latency table, read or built, and its activations where they can be counted."""
        ...


@settings
class BudgetSettings:
    """A limit on a cost. Costs with settings of their own subclass it.

    Attributes:
        cost: The cost's name, like ``macs``.
        ratio: The share of the original cost that may remain, in (0, 1].
        limit: The same in the cost's unit; overrules ``ratio``.
    """

    cost: str
    ratio: Share | None = 0.5
    limit: Positive | None = None

    def __post_init__(self) -> None:
        allowed = [name for name, kind in COSTS.items() if kind.Settings is type(self)]
        others = [name for name in COSTS if name not in allowed]
        hint = f"one of {', '.join(allowed)}; other settings are for {', '.join(others)}"
        if self.cost not in allowed:
            raise out_of_range("cost", self.cost, hint)
        if self.ratio is None and self.limit is None:
            raise UserError("{field} or limit is needed; both are null", field="ratio", code="missing")

    @property
    def channel_multiple(self) -> int | None:
        """The multiple of channels that a layer keeps by default; None: the cost does not ask for one."""
        return None


class NetworkCost(ABC):
    """A cost of pruned networks; a `amc_env.space.Cost` that never rises when a decision removes more.

    Attributes:
        name: Its name in results, in ``budget=`` and in ``also``.
        title: Its name for people.
        unit: The unit of its values.
        granularities: What it is defined for: networks whose channels are cut, or whose weights are masked.
        Settings: The settings of a budget on it.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    unit: ClassVar[str]
    granularities: ClassVar[tuple[Kind, ...]] = ("channel", "masked")
    Settings: ClassVar[type[BudgetSettings]] = BudgetSettings

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" in vars(cls):
            COSTS[cls.name] = cls

    @classmethod
    @abstractmethod
    def build(cls, problem: CostInputs, settings: Any) -> Self:
        """Builds the cost for a network.

        Args:
            problem: The network and its decisions.
            settings: An instance of `Settings`.

        Raises:
            UserError: The network does not have such a cost.
        """

    @abstractmethod
    def __call__(self, removed: Sequence[int]) -> float:
        """The cost when ``removed`` units (one count per decision) are gone."""

    @classmethod
    def format(cls, value: float) -> str:
        """A value for people, like '20.41 M'."""
        return quantity(value)

    @classmethod
    def check_fits(cls, granularity: Granularity) -> None:
        """Checks that the cost is defined for a granularity.

        Raises:
            UserError: It is not.
        """
        if ("masked" if granularity.masked else "channel") in cls.granularities:
            return
        needed = "channel" if granularity.masked else "fine_grained"
        raise UserError(
            f"budget={cls.name} does not change with granularity={granularity.name}: use granularity={needed}, or "
            "another budget, like budget=params",
            code="does_not_fit",
            field="budget.cost",
        )


COSTS: dict[str, type[NetworkCost]] = {}
"""Every cost that is defined, by name."""


def budget_on(name: str, ratio: float) -> BudgetSettings:
    """A budget on a cost, with the default of the cost's other settings.

    Args:
        name: The cost's, like ``macs`` or ``flops``.
        ratio: The share of the original cost that may remain, in (0, 1].

    Raises:
        UserError: There is no such cost, or the ratio is out of range.
    """
    kind = COSTS.get(ALIASES.get(name, name))
    if kind is None:
        raise out_of_range("cost", name, f"one of {', '.join([*COSTS, *ALIASES])}")
    return kind.Settings(kind.name, ratio)


def quantity(value: float) -> str:
    """A count with its SI prefix, two decimals: 20412000 -> '20.41 M'; below 1000 as it is; a dash for NaN."""
    if not math.isfinite(value):
        return "–"
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.2f} {prefix}"
    return f"{value:.0f}"


def size(count: float) -> str:
    """Bytes with their SI prefix: 590000 -> '590.00 kB'; 512 -> '512 B'."""
    text = quantity(count)
    return text if not math.isfinite(count) else f"{text}B" if " " in text else f"{text} B"
