"""Granularities: what one decision removes, and the counts it may take.

Channels are cut out: the network gets smaller and needs no special kernels. All finer granularities are
*masked*: weights are set to zero and shapes stay; what speed that brings depends on hardware and kernels that
know the pattern, and each granularity's ``speed`` says which (Mao et al., "Exploring the Granularity of Sparsity
in Convolutional Neural Networks", CVPR workshops 2017).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Annotated, ClassVar, Literal, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import Tensor, nn

from amc_env.errors import UserError
from amc_env.graph.layers import ChannelGroup, Layer, LayerGraph, Skipped
from amc_env.graph.tracing import trace, trace_layers
from amc_env.inputs import Inputs
from amc_env.space import Grid
from amc_env.validation import Count, Fraction, settings

_LARGEST_BLOCK = 256  # a place within a block is stored in a byte


@runtime_checkable
class Granularity(Protocol):
    """What a decision removes units of."""

    @property
    def name(self) -> str:
        """Its name in conf."""
        ...

    @property
    def masked(self) -> bool:
        """Whether weights are set to zero; else channels are cut out."""
        ...

    @property
    def speed(self) -> str:
        """Which hardware it makes faster, in a sentence."""
        ...

    def decisions(self, graph: LayerGraph) -> tuple[LayerGraph, tuple[Grid, ...]]:
        """The grids of all decisions, and the graph with what leaves nothing to decide reported as skipped."""
        ...


@settings
class Channel:
    """Whole channels (neurons of linear layers, heads of attention): one decision per channel group.

    Attributes:
        multiple: What is kept of a layer is a multiple of this many channels, or everything. Heads are counted singly.
        max_ratio: The largest pruning ratio of a decision, in (0, 1).
        heads: Whether attention loses heads.
        residual: Whether channels are cut that a norm normalises together, see `amc_env.graph.tracing.trace`.
        least: The fewest channels that a layer keeps, by patterns of names, like ``{"stem.*": 16}`` (`fnmatch`).
    """

    name: ClassVar[str] = "channel"
    masked: ClassVar[bool] = False
    speed: ClassVar[str] = (
        "Channels are cut out: the network is smaller and dense, and needs no special kernels. How much faster it runs "
        "depends on hardware and runtime; the latency row shows what was measured."
    )

    multiple: Count = 2
    max_ratio: Fraction = 0.9
    heads: bool = True
    residual: bool = False
    least: dict[str, Count] | None = None

    def decisions(self, graph: LayerGraph) -> tuple[LayerGraph, tuple[Grid, ...]]:
        """The grids of all decisions, and the graph without the groups that leave nothing to decide.

        Groups too small for ``multiple``, ``max_ratio`` and ``least`` are added to the graph's ``skipped`` with that
        reason.

        Raises:
            UserError: A pattern of ``least`` matches no layer whose channels can be cut.
        """
        heads = graph.heads()
        grids = {group.name: self._grid(group, group.name in heads) for group in graph.groups}
        reason = f"it is too narrow for channel_multiple={self.multiple} and max_ratio={self.max_ratio}"
        out = {name: reason for name, grid in grids.items() if grid.size == 1}
        if not self.heads:
            out |= dict.fromkeys(heads, "its channels are attention heads, and granularity.heads=false")
        names = {name for group in graph.groups for name in group.producers}
        if unknown := [p for p in self.least or () if not any(fnmatchcase(name, p) for name in names)]:
            raise UserError(
                f"{{field}}: {', '.join(unknown)} matches no layer whose channels can be cut; there are "
                f"{', '.join(sorted(names))}",
                code="unknown_layer",
                field="granularity.least",
            )
        graph = graph.only(out)
        return graph, tuple(grids[group.name] for group in graph.groups)

    def _grid(self, group: ChannelGroup, heads: bool) -> Grid:
        per_unit = group.channels // group.total
        step = 1 if heads else self.multiple // math.gcd(self.multiple, per_unit)
        limits = (
            n for p, n in (self.least or {}).items() if any(fnmatchcase(name, p) for name in group.producers)
        )
        kept = math.ceil(max(limits, default=0) / per_unit)
        most = min(_most(self.max_ratio, group.total), group.total - kept)
        return Grid(group.name, group.total, step, max(most, 0))


class Masked(Protocol):
    """A granularity that sets weights to zero: one decision per layer."""

    @property
    def name(self) -> str:
        """Its name in conf."""
        ...

    def decisions(self, graph: LayerGraph) -> tuple[LayerGraph, tuple[Grid, ...]]:
        """One grid per layer, in forward order; layers that do not suit are reported as skipped."""
        ...

    def removal_rank(self, saliency: Tensor, layer: Layer) -> Tensor:
        """The place of each element's unit in the order of removal, int32, shaped like the weight.

        Units are ordered by the sum of their elements' saliency, ties by position: place 0 is worth most and
        stays longest. An element stays where its place is below ``total - removed``.

        Args:
            saliency: Worth of each element, shaped like the weight: [O, I / groups, kh, kw] or [O, I].
            layer: The layer.
        """
        ...


@settings
class FineGrained:
    """Single weights, anywhere (Han et al., "Learning both Weights and Connections", NeurIPS 2015).

    Attributes:
        max_ratio: The largest pruning ratio of a decision, in (0, 1).
    """

    name: ClassVar[str] = "fine_grained"
    masked: ClassVar[bool] = True
    speed: ClassVar[str] = (
        "Sparsity only: GPUs and common CPU runtimes gain nothing from zeros at random places. Storage shrinks, and "
        "accelerators built for it (EIE) or sparse CPU kernels at high sparsity run faster."
    )

    max_ratio: Fraction = 0.98

    def decisions(self, graph: LayerGraph) -> tuple[LayerGraph, tuple[Grid, ...]]:
        """One grid per layer over its weights."""
        return _per_layer(graph, lambda layer: _grid(layer, layer.weights, self.max_ratio))

    def removal_rank(self, saliency: Tensor, layer: Layer) -> Tensor:
        """See `Masked.removal_rank`."""
        return _ranks(saliency.flatten()).view(saliency.shape)


@settings
class Vector:
    """Rows or columns of the kernels.

    Attributes:
        axis: ``row``: the kw weights of a kernel's row; ``column``: the kh weights of its column.
        max_ratio: The largest pruning ratio of a decision, in (0, 1).
    """

    name: ClassVar[str] = "vector"
    masked: ClassVar[bool] = True
    speed: ClassVar[str] = (
        "Sparsity only on GPUs and common CPU runtimes; smaller indices than single weights (one per row), which "
        "vector accelerators use."
    )

    axis: Literal["row", "column"] = "row"
    max_ratio: Fraction = 0.95

    def decisions(self, graph: LayerGraph) -> tuple[LayerGraph, tuple[Grid, ...]]:
        """One grid per layer over the rows (columns) of all its kernels."""

        def grid(layer: Layer) -> Grid | str:
            if layer.dimensions not in (0, 2):
                return "its kernels are not two-dimensional"
            length = layer.kernel[1 if self.axis == "row" else 0]
            if length == 1:
                return f"a {self.axis} of its kernels is a single weight"
            return _grid(layer, layer.weights // length, self.max_ratio)

        return _per_layer(graph, grid)

    def removal_rank(self, saliency: Tensor, layer: Layer) -> Tensor:
        """See `Masked.removal_rank`."""
        scores = saliency.sum(3 if self.axis == "row" else 2)
        ranks = _ranks(scores.flatten()).view(scores.shape)
        return ranks.unsqueeze(3 if self.axis == "row" else 2).expand(saliency.shape)


@settings
class Kernel:
    """Whole two-dimensional kernels: the link from one input channel to one output channel.

    Attributes:
        max_ratio: The largest pruning ratio of a decision, in (0, 1).
    """

    name: ClassVar[str] = "kernel"
    masked: ClassVar[bool] = True
    speed: ClassVar[str] = (
        "Sparsity only on GPUs and common CPU runtimes; kernels that skip whole 2-d convolutions can use it."
    )

    max_ratio: Fraction = 0.95

    def decisions(self, graph: LayerGraph) -> tuple[LayerGraph, tuple[Grid, ...]]:
        """One grid per convolution over its kernels."""

        def grid(layer: Layer) -> Grid | str:
            if layer.dimensions not in (0, 2):
                return "its kernels are not two-dimensional"
            if layer.area == 1:
                return "its kernels are single weights"
            return _grid(layer, layer.weights // layer.area, self.max_ratio)

        return _per_layer(graph, grid)

    def removal_rank(self, saliency: Tensor, layer: Layer) -> Tensor:
        """See `Masked.removal_rank`."""
        scores = saliency.sum((2, 3))
        return _ranks(scores.flatten()).view(scores.shape)[:, :, None, None].expand(saliency.shape)


@settings
class NM:
    """n weights that are not zero in every m along the input channels; each layer is dense or has the pattern.

    Mishra et al., "Accelerating Sparse Deep Neural Networks", arXiv 2104.08378. A layer's decision removes 0 or
    m - n units of m, so its pruning ratio is 0 or (m - n) / m.

    Attributes:
        n: Weights that stay in every block.
        m: Weights of a block: neighbours along the input channels, at one place of the kernel.
    """

    name: ClassVar[str] = "nm"
    masked: ClassVar[bool] = True

    n: Count = 2
    m: Annotated[int, Field(ge=2, le=_LARGEST_BLOCK)] = 4

    def __post_init__(self) -> None:
        if self.n >= self.m:
            raise UserError(
                f"{{field}}={self.n} must be below m={self.m}: n of every m weights stay, like n=2 m=4",
                code="out_of_range",
                field="n",
            )

    @property
    def speed(self) -> str:
        """Which hardware it makes faster."""
        if (self.n, self.m) == (2, 4):
            return (
                "NVIDIA GPUs from Ampere on multiply 2:4 matrices up to twice as fast (linear layers in fp16, bf16 or "
                "int8, with to_sparse_semi_structured); elsewhere sparsity only."
            )
        return (
            f"Sparsity only: no common hardware runs {self.n}:{self.m} faster (2:4 is what NVIDIA GPUs know)."
        )

    def decisions(self, graph: LayerGraph) -> tuple[LayerGraph, tuple[Grid, ...]]:
        """One grid per layer with the counts 0 and m - n."""

        def grid(layer: Layer) -> Grid | str:
            inputs = layer.in_channels // layer.groups
            if inputs % self.m:
                return f"its {inputs} input channels (per group) are not divisible by m={self.m}"
            return Grid(layer.name, self.m, self.m, self.m - self.n, first=self.m - self.n)

        return _per_layer(graph, grid)

    def removal_rank(self, saliency: Tensor, layer: Layer) -> Tensor:
        """See `Masked.removal_rank`; ranks count within each block of m."""
        outputs, inputs = saliency.shape[:2]
        blocks = saliency.reshape(outputs, inputs // self.m, self.m, *saliency.shape[2:])
        order = torch.sort(blocks, dim=2, descending=True, stable=True).indices
        return order.argsort(dim=2).flatten(1, 2).to(torch.int32)


def traced(model: nn.Module, example: Inputs, granularity: Granularity) -> LayerGraph:
    """What a granularity needs to know of a network: its layers, and coupled channels where those are cut.

    Raises:
        UserError: As `trace` and `trace_layers`.
    """
    if granularity.masked:
        return trace_layers(model, example)
    return trace(model, example, residual=isinstance(granularity, Channel) and granularity.residual)


def left_alone(
    graph: LayerGraph, grids: tuple[Grid, ...], keep: Sequence[str], types: Mapping[str, str]
) -> tuple[LayerGraph, tuple[Grid, ...]]:
    """The graph and the decisions without those that would prune a layer that is to be kept.

    Args:
        graph: The layers; coupled channels where those are cut.
        grids: The decisions.
        keep: Patterns of layer names, like ``stem.*`` (`fnmatch`), or names of module classes, like ``Linear``. Channels
            that are coupled to those of a kept layer stay as well.
        types: The class name of every layer, by the layer's name.

    Raises:
        UserError: A pattern matches no layer.
    """
    found = {
        pattern: {n for n, kind in types.items() if fnmatchcase(n, pattern) or kind == pattern}
        for pattern in keep
    }
    if unknown := [pattern for pattern, names in found.items() if not names]:
        raise UserError(
            f"{{field}}: {', '.join(unknown)} matches no layer; there are {', '.join(types)}",
            code="unknown_layer",
            field="keep",
        )
    kept = set().union(*found.values())
    producers = {group.name: set(group.producers) for group in graph.groups}
    out = {grid.name: "it is kept by keep" for grid in grids if producers.get(grid.name, {grid.name}) & kept}
    left = tuple(grid for grid in grids if grid.name not in out)
    if graph.groups:
        return graph.only(out), left
    skipped = tuple(Skipped(name, reason) for name, reason in out.items())
    return replace(graph, skipped=graph.skipped + skipped), left


def _most(max_ratio: float, total: int) -> int:
    return min(math.floor(max_ratio * total + 1e-9), total - 1)


def _grid(layer: Layer, units: int, max_ratio: float) -> Grid | str:
    most = _most(max_ratio, units)
    return Grid(layer.name, units, 1, most) if most else f"it is too small for max_ratio={max_ratio}"


class _MakesGrid(Protocol):
    def __call__(self, layer: Layer, /) -> Grid | str: ...


def _per_layer(graph: LayerGraph, make: _MakesGrid) -> tuple[LayerGraph, tuple[Grid, ...]]:
    """The grids of all layers, and the graph where those that gave a reason instead are reported as skipped."""
    made = {layer.name: _unfit(layer) or make(layer) for layer in graph.layers if not layer.costless}
    reasons: Mapping[str, str] = {name: grid for name, grid in made.items() if isinstance(grid, str)}
    skipped = tuple(Skipped(name, reason) for name, reason in reasons.items())
    return graph.uncoupled(skipped), tuple(grid for grid in made.values() if isinstance(grid, Grid))


def _unfit(layer: Layer) -> str:
    """Why a layer's weights are not masked; empty where they are."""
    if layer.tied:
        return "it shares a parameter with another layer"
    return "weights of transposed convolutions are not masked" if layer.transposed else ""


def _ranks(scores: Tensor) -> Tensor:
    """The place of each entry [N] from worth most (0) to worth least, int32; ties by position."""
    order = torch.sort(scores, descending=True, stable=True).indices
    ranks = torch.empty_like(order, dtype=torch.int32)
    ranks[order] = torch.arange(len(order), dtype=torch.int32, device=scores.device)
    return ranks
