"""Criteria that look at weights only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from amc_env.errors import UserError
from amc_env.graph.layers import ChannelGroup, Layer, LayerGraph, Member
from amc_env.pruning.criteria.base import (
    CHANNEL,
    EVERY,
    Aggregate,
    Members,
    Sample,
    scoring_layers,
    together,
    unit_scores,
    unit_sums,
)
from amc_env.system import named_generator
from amc_env.validation import settings


def weight_of(model: nn.Module, layer: Layer) -> Tensor:
    """A layer's weight in float64, on the CPU."""
    weight = model.get_submodule(layer.name).weight
    assert isinstance(weight, Tensor)
    return weight.detach().double().cpu()


@settings
class Norm:
    """The L1 or L2 norm of a unit's weights; of a single weight its magnitude.

    Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017 (L1 of filters); Han et al., "Learning both
    Weights and Connections for Efficient Neural Networks", NeurIPS 2015 (magnitude of weights).

    Attributes:
        p: 1 or 2.
        members: Whose weights count: the layers that read the channels (AMC's choice: the summed magnitude of
            the consuming layer), those that write them, or all.
        aggregate: How members come together.
    """

    p: Literal[1, 2] = 2
    members: Members = "all"
    aggregate: Aggregate = "mean"

    granularities: ClassVar[tuple[str, ...]] = EVERY
    images: ClassVar[int] = 0

    @property
    def name(self) -> str:
        """``l1`` or ``l2``."""
        return f"l{self.p}"

    def channel_scores(
        self, model: nn.Module, graph: LayerGraph, sample: Sample | None = None
    ) -> tuple[Tensor, ...]:
        """The norm over each unit's weights."""
        elements = self.saliency(model, scoring_layers(graph, self.members))

        def part(member: Member, layer: Layer) -> Tensor:
            return unit_sums(elements[layer.name], member, layer).pow(1 / self.p)

        return unit_scores(graph, self.members, self.aggregate, part)

    def saliency(
        self, model: nn.Module, layers: Sequence[Layer], sample: Sample | None = None
    ) -> dict[str, Tensor]:
        """|w|^p: its sum over a unit ranks as the norm does."""
        return {layer.name: weight_of(model, layer).abs().pow(self.p) for layer in layers}


@settings
class BatchNormScale:
    """The magnitude of the channels' batch-norm scales.

    Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017.

    Attributes:
        aggregate: How several batch norms of a group come together.
    """

    aggregate: Aggregate = "mean"

    name: ClassVar[str] = "bn_scale"
    granularities: ClassVar[tuple[str, ...]] = CHANNEL
    images: ClassVar[int] = 0

    def channel_scores(self, model: nn.Module, graph: LayerGraph, sample: Sample) -> tuple[Tensor, ...]:
        """|gamma|, summed over the entries of a unit.

        Raises:
            UserError: Groups have no batch norm with a scale.
        """
        parts = [self._parts(group, model) for group in graph.groups]
        without = [group.name for group, found in zip(graph.groups, parts, strict=True) if not found]
        if without:
            raise UserError(
                f"criterion=bn_scale: no batch norm with a scale works on the channels of {', '.join(without)}; "
                "use criterion=l1 or criterion=l2",
                code="unsupported",
                field="criterion",
            )
        return tuple(
            together(found, group.total, self.aggregate)
            for group, found in zip(graph.groups, parts, strict=True)
        )

    def _parts(self, group: ChannelGroup, model: nn.Module) -> list[Tensor]:
        found = []
        for member in group.members:
            module = model.get_submodule(member.module)
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.weight is not None:
                scale = module.weight.detach().double().cpu().abs()
                found.append(scale[member.positions].sum(1))
        return found


@settings
class FPGM:
    """How far a filter is from the others of its layer, summed: those near the geometric median can be replaced.

    He et al., "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration", CVPR
    2019. The filters are those that write the channels.

    Attributes:
        aggregate: How several producers of a group come together.
    """

    aggregate: Aggregate = "mean"

    name: ClassVar[str] = "fpgm"
    granularities: ClassVar[tuple[str, ...]] = CHANNEL
    images: ClassVar[int] = 0

    def channel_scores(self, model: nn.Module, graph: LayerGraph, sample: Sample) -> tuple[Tensor, ...]:
        """Sums of Euclidean distances; a unit of several filters is their concatenation."""

        def part(member: Member, layer: Layer) -> Tensor:
            filters = weight_of(model, layer).flatten(1)[member.positions].flatten(1)
            # The form by a matrix product is faster, but rounds small distances away.
            return torch.cdist(filters, filters, compute_mode="donot_use_mm_for_euclid_dist").sum(1)

        return unit_scores(graph, "producers", self.aggregate, part)


@settings
class Random:
    """Worth drawn evenly from [0, 1): what a criterion must beat."""

    name: ClassVar[str] = "random"
    granularities: ClassVar[tuple[str, ...]] = EVERY
    images: ClassVar[int] = 0

    def channel_scores(self, model: nn.Module, graph: LayerGraph, sample: Sample) -> tuple[Tensor, ...]:
        """A function of the seed and the group's name."""
        return tuple(_drawn((group.total,), sample.seed, group.name) for group in graph.groups)

    def saliency(self, model: nn.Module, layers: Sequence[Layer], sample: Sample) -> dict[str, Tensor]:
        """A function of the seed and the layer's name."""
        shapes = {layer.name: weight_of(model, layer).shape for layer in layers}
        return {name: _drawn(shape, sample.seed, name) for name, shape in shapes.items()}


def _drawn(shape: Sequence[int], seed: int, name: str) -> Tensor:
    return torch.rand(*shape, generator=named_generator(seed, "random", name), dtype=torch.float64)
