"""What all criteria share: calibration data, the protocol, and how a unit's members come together to one score.

saliency: worth of an element of a weight; score: worth of a unit. Units are ranked once per start and removed in
that order, so kept sets are nested.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from amc_env.errors import UserError
from amc_env.graph.layers import ChannelGroup, Layer, LayerGraph, Member
from amc_env.inputs import Inputs, count, take
from amc_env.tasks import Classification, Task


def rank_after(scores: Sequence[Tensor], kept_units: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Orders of a widened network: like `rank`, with the units that were removed earlier last.

    So the strategy that the slim network came from, and every one that removes more, is cut out of what is left.

    Args:
        scores: Worth of every unit of the widened network, a tensor [units] for each group.
        kept_units: Units that had stayed, int64, a tensor for each group, in any order.
    """
    orders = []
    for order, kept in zip(rank(scores), kept_units, strict=True):
        gone = torch.ones(len(order), dtype=torch.bool)
        gone[kept.cpu()] = False
        order = order.cpu()
        orders.append(torch.cat([order[~gone[order]], order[gone[order]]]))
    return tuple(orders)


Members = Literal["consumers", "producers", "all"]
"""Whose weights speak for coupled channels: of the layers that read them, that write them, or of both."""


Aggregate = Literal["mean", "sum", "max"]
"""How members come together.

mean, max: every member's scores are divided by their mean first, so that a wide layer does not speak for all.
sum: the scores as they are, for criteria whose unit is the loss in every layer.
"""


CHANNEL = ("channel",)


EVERY = ("channel", "fine_grained", "nm", "vector", "kernel")
"""Granularities: the one that cuts channels out, and all of them."""


_SIDES = {"consumers": ("in",), "producers": ("out",), "all": ("in", "out")}


@dataclass(frozen=True, eq=False)
class Sample:
    """Calibration data, from the training split.

    Attributes:
        inputs: On the model's device; none for criteria that look at weights only.
        targets: Their targets.
        seed: Of whatever a criterion draws.
        task: Says what the loss is.
    """

    inputs: Inputs
    targets: Inputs
    seed: int = 0
    task: Task = field(default_factory=Classification)


@runtime_checkable
class Criterion(Protocol):
    """Says what units are worth. Leaves the model and the global random state as they are."""

    @property
    def name(self) -> str:
        """Its name in conf."""
        ...

    @property
    def granularities(self) -> tuple[str, ...]:
        """Names of the granularities that it fits."""
        ...

    @property
    def images(self) -> int:
        """Calibration images that it wants; 0 for none."""
        ...

    def channel_scores(self, model: nn.Module, graph: LayerGraph, sample: Sample) -> tuple[Tensor, ...]:
        """The score of every unit, one float64 tensor [units] a group; higher stays longer."""
        ...


@runtime_checkable
class ElementCriterion(Criterion, Protocol):
    """A criterion that tells single weights apart, and so fits every granularity."""

    def saliency(self, model: nn.Module, layers: Sequence[Layer], sample: Sample) -> dict[str, Tensor]:
        """The worth of every weight by layer name, float64 and of the weight's shape; never negative."""
        ...


def rank(scores: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Units from worth most to worth least, ties by index (a stable order, never a threshold)."""
    return tuple(torch.sort(score, descending=True, stable=True).indices for score in scores)


def calibration_sample(criterion: Criterion, sample: Sample) -> Sample:
    """The sample's first images, as many as the criterion wants.

    Raises:
        UserError: There are none.
    """
    if not count(sample.inputs):
        raise UserError(
            f"criterion={criterion.name} needs calibration images of the training split; there are none",
            code="missing",
            field="criterion",
        )
    some = slice(criterion.images)
    return replace(sample, inputs=take(sample.inputs, some), targets=take(sample.targets, some))


def scoring_members(group: ChannelGroup, graph: LayerGraph, members: Members) -> list[tuple[Member, Layer]]:
    """The members whose weights speak for a group, with their layers.

    Depthwise layers ride along, and the weights of fixed selections (``costless``) say nothing.
    """
    speaking = (
        layer for layer in graph.layers if not (layer.depthwise or layer.costless or layer.transposed)
    )
    layers = {layer.name: layer for layer in speaking}
    return [
        (member, layers[member.module])
        for member in group.members
        if member.module in layers and member.side in _SIDES[members]
    ]


def scoring_layers(graph: LayerGraph, members: Members) -> list[Layer]:
    """The layers whose weights speak for any group, in forward order."""
    names = {layer.name for group in graph.groups for _, layer in scoring_members(group, graph, members)}
    return [layer for layer in graph.layers if layer.name in names]


def unit_sums(elements: Tensor, member: Member, layer: Layer) -> Tensor:
    """Sums [..., units] over the elements [..., *weight's shape] that go with each unit."""
    lead = elements.shape[: elements.ndim - (2 + layer.dimensions)]
    blocks = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    split = elements.reshape(*lead, layer.groups, *blocks, -1)
    entries = split.sum((-1, -2) if member.side == "out" else (-1, -3)).flatten(-2)
    return entries[..., member.positions.to(entries.device)].sum(-1)


def unit_scores(
    graph: LayerGraph, members: Members, aggregate: Aggregate, part: Callable[[Member, Layer], Tensor]
) -> tuple[Tensor, ...]:
    """Scores of all groups; ``part`` gives those that one member speaks for, float64 [units], none negative."""
    return tuple(
        together([part(*member) for member in scoring_members(group, graph, members)], group.total, aggregate)
        for group in graph.groups
    )


def together(parts: Sequence[Tensor], total: int, aggregate: Aggregate) -> Tensor:
    """The members' scores as one; zeros where no member speaks."""
    score = torch.zeros(total, dtype=torch.float64)
    for part in parts:
        part = part.cpu()
        scaled = part if aggregate == "sum" else part / part.mean().clamp_min(1e-30)
        if aggregate == "max":
            score = torch.maximum(score, scaled)
        else:
            score += scaled / (len(parts) if aggregate == "mean" else 1)
    return score
