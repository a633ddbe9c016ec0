"""The layers of a network and the channels that can only be cut together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from amc_env.graph.surgery import CHANNELWISE, Keeps
from amc_env.graph.topology import UNTRACED, Topology


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer.

    Sizes are two numbers. The leading one is 1 for a one-dimensional convolution, and the product of depth and height
    for a three-dimensional one.

    Attributes:
        name: Qualified module name.
        index: Place in forward order, from 0.
        kind: ``conv`` or ``linear``.
        in_channels: Input channels (features).
        out_channels: Output channels (features).
        kernel: Height and width of the kernel, (1, 1) for a linear layer.
        stride: Vertical and horizontal stride.
        groups: Groups of the convolution.
        bias: Whether it has a bias.
        in_size: Height and width of its input; (positions, 1) for a linear layer.
        out_size: Height and width of its output; of its input where it is transposed.
        costless: A fixed selection that costs nothing (an option-A shortcut): no MACs are charged, it is never
            repaired.
        calls: How often one pass runs it; the positions of all calls are in ``out_size``.
        tied: Whether it shares a parameter with another layer; such layers are not pruned.
        dimensions: Of the convolution; 0 for a linear layer.
        transposed: Whether it is a transposed convolution. Its weights are pruned with their channels, but do not speak
            for them, and are not repaired.
    """

    name: str
    index: int
    kind: Literal["conv", "linear"]
    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    groups: int
    bias: bool
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    costless: bool = False
    calls: int = 1
    tied: bool = False
    dimensions: int = 2
    transposed: bool = False

    @property
    def depthwise(self) -> bool:
        """One filter per channel: input and output channels are the same thing."""
        return 1 < self.groups == self.in_channels == self.out_channels

    @property
    def positions(self) -> int:
        """Places at which the layer is applied to one example."""
        return self.out_size[0] * self.out_size[1]

    @property
    def area(self) -> int:
        """Weights for each pair of an input and an output."""
        return self.kernel[0] * self.kernel[1]

    @property
    def weights(self) -> int:
        """Number of weights, the bias left out."""
        return self.out_channels * (self.in_channels // self.groups) * self.area


@dataclass(frozen=True)
class ChannelWise:
    """A module with ``params_per_channel`` parameters for each entry of a side, e.g. a batch norm."""

    name: str
    channels: int
    params_per_channel: int
    side: str = "out"


@dataclass(frozen=True)
class AttentionMacs:
    """Multiply-accumulates of products of activations, ``macs`` for each entry of a side, or in all where it is None."""

    macs: float
    dimension: tuple[str, str] | None


@dataclass(frozen=True, eq=False)
class Member:
    """One dimension of one module that a group cuts.

    Attributes:
        module: Qualified module name.
        side: See `amc_env.graph.surgery.Keeps`; modules with one channel dimension have ``out`` only.
        size: Entries of the uncut dimension.
        positions: int64, shape [units, m]: the entries of the dimension that go with each unit of the group.
    """

    module: str
    side: str
    size: int
    positions: Tensor


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that can only be cut together: one decision.

    Attributes:
        name: The first layer, in forward order, whose outputs they are.
        total: Units. A unit is one channel or, where grouped convolutions take part, one channel of every
            group.
        channels: Channels of the first layer that they stand for.
        members: Every dimension that is cut.
        producers: Layers whose outputs are cut, in forward order.
        consumers: Layers whose inputs are cut, in forward order; depthwise ones ride along and are not among
            them.
    """

    name: str
    total: int
    channels: int
    members: tuple[Member, ...]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]


@dataclass(frozen=True)
class Skipped:
    """A layer whose outputs are not pruned, and why."""

    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class LayerGraph:
    """Layers in forward order, their coupled channels, and what is skipped.

    Attributes:
        layers: Convolutions and linear layers in forward order.
        channelwise: Batch norms and the like.
        groups: Coupled channels, in the forward order of their first consumer.
        skipped: Layers whose outputs are not pruned, with the reason.
        other_params: Parameters outside the modules above.
        other_macs: MACs that no pruning changes, like those of weights that are used without their module.
        topology: The order of operations, from a symbolic trace.
        attention: Products of activations, as in attention; none where channels were not traced.
    """

    layers: tuple[Layer, ...]
    channelwise: tuple[ChannelWise, ...]
    groups: tuple[ChannelGroup, ...]
    skipped: tuple[Skipped, ...]
    other_params: int
    other_macs: int = 0
    topology: Topology = UNTRACED
    attention: tuple[AttentionMacs, ...] = ()

    def layer(self, name: str) -> Layer:
        """The layer of that name."""
        return next(layer for layer in self.layers if layer.name == name)

    def heads(self) -> set[str]:
        """Names of the groups whose units are attention heads."""
        read = {product.dimension for product in self.attention}
        return {g.name for g in self.groups if any((m.module, m.side) in read for m in g.members)}

    def uncoupled(self, skipped: tuple[Skipped, ...]) -> LayerGraph:
        """The graph without channel groups, for decisions about layers; ``skipped`` of them are not pruned."""
        names = {layer.name for layer in self.layers}
        outside = tuple(
            w for w in self.skipped if w.name not in names
        )  # why channels stay does not matter here
        return replace(self, groups=(), skipped=outside + skipped)

    def only(self, left_out: Mapping[str, str]) -> LayerGraph:
        """The graph without the groups named in ``left_out`` (name to reason), which are reported as skipped."""
        out = [group for group in self.groups if group.name in left_out]
        skipped = tuple(Skipped(name, left_out[group.name]) for group in out for name in group.producers)
        groups = tuple(group for group in self.groups if group.name not in left_out)
        return replace(self, groups=groups, skipped=self.skipped + skipped)


def channels_of(module: nn.Module, side: str) -> int:
    """Entries of a module's side, see `amc_env.graph.surgery.Keeps`; 0 where it has none."""
    if side.startswith("."):
        value = vars(module).get(side[1:])
        return value if type(value) is int else 0
    if side not in ("in", "out"):
        key, _, dimension = side.rpartition(".")
        tensor = module._parameters.get(key, module._buffers.get(key))
        known = isinstance(tensor, Tensor) and dimension in map(str, range(tensor.ndim))
        return tensor.shape[int(dimension)] if known and tensor is not None else 0
    if isinstance(module, _ConvNd):
        return module.in_channels if side == "in" else module.out_channels
    if isinstance(module, nn.Linear):
        return module.in_features if side == "in" else module.out_features
    return _channels(module) if isinstance(module, CHANNELWISE) else 0


def _channels(module: nn.Module) -> int:
    """Channels of a module with one entry per channel; 0 where all share one entry, or it has several dimensions."""
    if isinstance(module, nn.PReLU):
        return module.num_parameters if module.num_parameters > 1 else 0
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return module.normalized_shape[0] if len(module.normalized_shape) == 1 else 0
    found = module.num_channels if isinstance(module, nn.GroupNorm) else module.num_features
    assert isinstance(found, int)
    return found


def keeps_of(groups: Sequence[ChannelGroup], kept_units: Sequence[Tensor]) -> Keeps:
    """What stays of every dimension when ``kept_units`` (ascending, a tensor for each) stay of the groups."""
    sizes: dict[tuple[str, str], int] = {}
    gone: dict[tuple[str, str], list[Tensor]] = {}
    for group, kept in zip(groups, kept_units, strict=True):
        lost = torch.ones(group.total, dtype=torch.bool)
        lost[kept] = False
        for member in group.members:
            key = member.module, member.side
            gone.setdefault(key, []).append(member.positions[lost].flatten())
            sizes[key] = member.size
    keeps: Keeps = {}
    for (module, side), lists in gone.items():
        stay = torch.ones(sizes[module, side], dtype=torch.bool)
        stay[torch.cat(lists)] = False
        keeps.setdefault(module, {})[side] = stay.nonzero().flatten()
    return keeps
