"""Tracing a network: its layers, and the channels of them that can only be removed together.

Channel groups are read off one run (see `amc_env.graph.coupling`) and proved on the network itself: with channels cut
out it must compute what it computes with them silenced. No network is traced during a search.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_leaves

from amc_env.errors import UserError, first_line
from amc_env.graph.copying import module_copy
from amc_env.graph.coupling import is_norm, labelled_run
from amc_env.graph.grouping import channel_groups
from amc_env.graph.hooks import watch
from amc_env.graph.labels import Labels
from amc_env.graph.layers import (
    AttentionMacs,
    ChannelGroup,
    ChannelWise,
    Layer,
    LayerGraph,
    Skipped,
    channels_of,
    keeps_of,
)
from amc_env.graph.surgery import CHANNELWISE, LAYERS, TRANSPOSED, Keeps, resize, silence_inputs
from amc_env.graph.topology import Topology
from amc_env.inputs import Inputs, call, described, each, take


def trace(model: nn.Module, example: Inputs, *, residual: bool = False) -> LayerGraph:
    """Trace the layers and coupled channels of a network.

    Args:
        model: The network; its weights and modules stay as they are.
        example: A batch of inputs, [N, ...] each; one example is enough.
        residual: Whether channels may be cut that a LayerNorm, an RMSNorm or a GroupNorm of one group normalises
            together, like the residual stream of a transformer. The statistics are then those of the channels that stay.

    Raises:
        UserError: The network cannot be run, or no channel of it can be pruned.
    """
    copied = module_copy(model).eval()
    layers = _layers(copied, example)
    labels = labelled_run(copied, take(example, slice(1)), through_norms=residual)
    groups, skipped = channel_groups(copied, labels, layers, _tied_reasons(layers))
    groups, refuted = _proved(copied, example, groups)
    order = {name: layer.index for name, layer in layers.items()}
    skipped = [*skipped, *refuted]
    skipped.sort(key=lambda s: order.get(s.name, len(order)))
    if not groups:
        reasons = "; ".join(f"{s.name}: {s.reason}" for s in skipped[:8])
        raise UserError(
            f"no channel of this network can be pruned ({reasons or 'no convolution or linear layer was run'})",
            code="nothing_to_prune",
        )
    groups.sort(key=lambda group: (order[group.consumers[0]], order[group.producers[0]]))
    channelwise, other = _rest(copied, layers, groups)
    attention = _attention(labels, groups, copied)
    counts = other, _functional(labels, layers)
    numbers = {(m.module, m.side[1:]): None for g in groups for m in g.members if m.side.startswith(".")}
    topology = Topology.of(model, example, numbers)
    graph = LayerGraph(tuple(layers.values()), channelwise, tuple(groups), tuple(skipped), *counts, topology)
    return replace(graph, attention=attention)


def trace_layers(model: nn.Module, example: Inputs) -> LayerGraph:
    """Trace the layers alone, without coupled channels: all that masks need, and every network has it.

    Raises:
        UserError: The network does not run on the example, or has no convolution or linear layer.
    """
    layers = _layers(model, example)
    if not layers:
        raise UserError(
            "the network has no convolution or linear layer that is run: nothing can be pruned",
            code="nothing_to_prune",
        )
    channelwise, other = _rest(model, layers, ())
    labels = labelled_run(module_copy(model).eval(), take(example, slice(1)))
    attention = sum(product.macs for product in labels.products)
    counts = other, attention + _functional(labels, layers)
    return LayerGraph(tuple(layers.values()), channelwise, (), (), *counts, Topology.of(model, example))


def _layers(model: nn.Module, example: Inputs) -> dict[str, Layer]:
    """Runs the network once and writes down its layers by name, in forward order."""
    layers: dict[str, Layer] = {}

    def add(name: str, module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        layer = _layer(name, len(layers), module, inputs, output)
        before = layers.get(layer.name)
        if before is None:
            layers[layer.name] = layer
        else:  # a shared module: every call is paid for
            size = (before.out_size[0] * before.out_size[1] + layer.positions, 1)
            layers[layer.name] = replace(before, out_size=size, calls=before.calls + 1)

    found = [(name, module) for name, module in model.named_modules() if isinstance(module, LAYERS)]
    handles = [watch(module, partial(add, name, module)) for name, module in found]
    try:
        with torch.no_grad():
            call(model, take(example, slice(1)))
    except Exception as error:  # a user's network may raise anything
        given = described(take(example, slice(1)))
        raise UserError(
            f"the network does not run on inputs of shape {given}: {first_line(error)}", code="does_not_run"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    tied = _tied(model)
    return {name: replace(layer, tied=name in tied) for name, layer in layers.items()}


def _tied(model: nn.Module) -> set[str]:
    """Names of the modules that share a parameter with another module."""
    owners: dict[nn.Parameter, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(name)
    return {name for names in owners.values() if len(names) > 1 for name in names}


def _layer(name: str, index: int, module: nn.Module, inputs: Tensor, output: Tensor) -> Layer:
    costless = bool(getattr(module, "costless", False))
    if isinstance(module, nn.Linear):
        # Of one example, also where that is cut into windows.
        size = max(1, output.numel() // module.out_features), 1
        features = module.in_features, module.out_features
        bias = module.bias is not None
        return Layer(
            name, index, "linear", *features, (1, 1), (1, 1), 1, bias, size, size, costless, dimensions=0
        )
    assert isinstance(module, _ConvNd)
    parts = len(output)  # of one example, as frames of a video
    height, width = _folded((inputs if module.transposed else output).shape[2:])
    return Layer(
        name=name,
        index=index,
        kind="conv",
        in_channels=module.in_channels,
        out_channels=module.out_channels,
        kernel=_folded(module.kernel_size),
        stride=_folded(module.stride),
        groups=module.groups,
        bias=module.bias is not None,
        in_size=_folded(inputs.shape[2:]),
        out_size=(height * parts, width),
        costless=costless,
        calls=parts,
        dimensions=len(module.kernel_size),
        transposed=module.transposed,
    )


def _folded(sizes: Sequence[int]) -> tuple[int, int]:
    """Two sizes of one, two or three: the leading ones are multiplied."""
    return math.prod(sizes[:-1]), sizes[-1]


def _rest(
    model: nn.Module, layers: Mapping[str, Layer], groups: Sequence[ChannelGroup]
) -> tuple[tuple[ChannelWise, ...], int]:
    """Channel-wise modules, and the number of parameters outside of them and of the layers.

    Parameters that several layers share are counted with each of those, and taken off here.
    """
    channelwise = []
    counted: set[int] = set()
    repeated = 0
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in counted]
        if name in layers:
            repeated += sum(p.numel() for p in module.parameters(recurse=False) if id(p) in counted)
            counted.update(id(p) for p in own)
        elif isinstance(module, CHANNELWISE):
            channels = channels_of(module, "out")
            size = sum(p.numel() for p in own)
            if channels and size % channels == 0:
                channelwise.append(ChannelWise(name, channels, size // channels))
                counted.update(id(p) for p in own)
    for name, side, parameter in _cut_parameters(model, groups):
        if id(parameter) not in counted:
            channels = channels_of(model.get_submodule(name), side)
            channelwise.append(ChannelWise(name, channels, parameter.numel() // channels, side))
            counted.add(id(parameter))
    other = sum(p.numel() for p in model.parameters() if id(p) not in counted)
    return tuple(channelwise), other - repeated


def _cut_parameters(
    model: nn.Module, groups: Sequence[ChannelGroup]
) -> dict[tuple[str, str, nn.Parameter], None]:
    """Parameters that belong to no layer and are cut: (module, side, parameter)."""
    sides = {(m.module, m.side): None for group in groups for m in group.members if "." in m.side.lstrip(".")}
    found: dict[tuple[str, str, nn.Parameter], None] = {}
    for name, side in sides:
        parameter = model.get_submodule(name)._parameters.get(side.rpartition(".")[0])
        if parameter is not None:
            found[name, side, parameter] = None
    return found


def _attention(labels: Labels, groups: Sequence[ChannelGroup], model: nn.Module) -> tuple[AttentionMacs, ...]:
    """The products of activations of a run, by the channels that they are in proportion to."""
    consumers = {
        (m.module, m.side): m.size
        for g in groups
        for m in g.members
        if m.module in g.consumers and m.side == "in"
    }
    owners: dict[int, tuple[str, str]] = {}
    for name, side in consumers:
        module = model.get_submodule(name)
        assert isinstance(module, LAYERS)
        own = labels.dims(module.weight)[0 if isinstance(module, TRANSPOSED) else 1].labels
        assert own is not None
        owners |= dict.fromkeys(labels.roots(own).tolist(), (name, side))
    fixed, found = 0, []
    for product in labels.products:
        roots = [] if product.labels is None else labels.roots(product.labels).tolist()
        dimension = owners.get(roots[0]) if roots else None
        if dimension is None:
            fixed += product.macs
        else:
            found.append(AttentionMacs(product.macs / consumers[dimension], dimension))
    return (*found, *([AttentionMacs(fixed, None)] if fixed else []))


def _functional(labels: Labels, layers: Mapping[str, Layer]) -> int:
    """MACs of a run that are neither a layer's nor products of activations.

    They are of weights that are used without their module being called, as in ``F.linear(x, self.proj.weight)``.
    """
    known = sum(layer.weights * layer.positions for layer in layers.values())
    return max(0, labels.macs - known - sum(product.macs for product in labels.products))


def _tied_reasons(layers: Mapping[str, Layer]) -> dict[str, str]:
    """Layers that share a parameter, with the reason why their channels are left alone."""
    tied = [name for name, layer in layers.items() if layer.tied]
    return {name: f"its channels meet {name}, which shares a parameter with another layer" for name in tied}


def _proved(
    model: nn.Module, example: Inputs, groups: list[ChannelGroup]
) -> tuple[list[ChannelGroup], list[Skipped]]:
    """Keeps the groups whose cut network computes what the network with those channels silenced computes.

    All are tried together. Where that fails, one group of each kind is tried alone, which is enough for networks of
    equal blocks, then halves of those that are left.
    """
    inputs = _random_inputs(example)
    stirred = _stirred(model)
    bad: dict[str, str] = {}

    def search(some: Sequence[ChannelGroup], given: Inputs) -> None:
        reason = _refuted(stirred, given, some) if some else None
        if reason is not None and len(some) == 1:
            bad[some[0].name] = reason
        elif reason is not None:
            middle = len(some) // 2
            search(some[:middle], given)
            search(some[middle:], given)

    good = groups
    reason = _refuted_together(stirred, inputs, good)
    for given in (take(inputs, slice(1)), inputs):  # one example finds nearly all in half of the time
        if reason is None:
            break
        for alike in _kinds(good):
            search(alike[:1], given)
            if alike[0].name in bad:
                bad |= dict.fromkeys((group.name for group in alike), bad[alike[0].name])
        search([group for group in good if group.name not in bad], given)
        good = [group for group in groups if group.name not in bad]
        reason = _refuted_together(stirred, inputs, good) if good else None
    if reason is not None:
        raise UserError(f"the network cannot be cut in several places at once: {reason}", code="unsupported")
    skipped = [Skipped(name, bad[g.name]) for g in groups if g.name in bad for name in g.producers]
    kept = {name for group in good for name in group.producers}
    return good, [s for s in skipped if s.name not in kept]


def _refuted_together(model: nn.Module, inputs: Inputs, groups: Sequence[ChannelGroup]) -> str | None:
    """`_refuted` of all groups, and of two different halves of them on one input alone.

    A network may reshape channels by the width that others had. That shows where one is cut and the other is not.
    """
    one = take(inputs, slice(1))
    halves = ([group for index, group in enumerate(groups) if index >> bit & 1] for bit in (0, 1))
    tried = ((inputs, groups), *((one, half) for half in halves if half))
    reasons = (_refuted(model, given, some) for given, some in tried)
    return next((reason for reason in reasons if reason is not None), None)


def _kinds(groups: Sequence[ChannelGroup]) -> list[list[ChannelGroup]]:
    """Groups that differ in the numbers of blocks alone, and in sizes."""
    found: dict[str, list[ChannelGroup]] = {}
    for group in groups:
        key = " ".join(sorted({f"{member.module}/{member.side}" for member in group.members}))
        found.setdefault(re.sub(r"\d+", "*", key), []).append(group)
    return list(found.values())


def _random_inputs(example: Inputs) -> Inputs:
    """Two examples: random numbers in place of floats, the given ones where inputs are integers."""
    generator = torch.Generator().manual_seed(0)

    def drawn(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor[torch.arange(2, device=tensor.device) % len(tensor)]
        return torch.randn((2, *tensor.shape[1:]), generator=generator).to(tensor.device, tensor.dtype)

    return each(example, drawn)


def _stirred(model: nn.Module) -> nn.Module:
    """A copy where parameters that are almost zero are not: what they multiply would not be seen otherwise."""
    copied = module_copy(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in copied.parameters():
        if parameter.is_floating_point() and parameter.numel() and parameter.detach().abs().max() < 1e-2:
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.data = noise.to(parameter.device, parameter.dtype)
    return copied


@torch.no_grad()
def _refuted(model: nn.Module, inputs: Inputs, groups: Sequence[ChannelGroup]) -> str | None:
    """Cuts every second unit of the groups; why that is not the same as silencing them, or None.

    Norms that normalise cut channels together do so over those that stay, in both.
    """
    units = [torch.arange(0, group.total, 2) for group in groups]
    keeps = keeps_of(groups, units)
    small, masked = resize(module_copy(model), keeps), module_copy(model)
    modules = dict(masked.named_modules())
    for group, left in zip(groups, units, strict=True):
        gone = torch.ones(group.total, dtype=torch.bool)
        gone[left] = False
        for member in group.members:
            if member.side == "in" and member.module in group.consumers:
                silence_inputs(modules[member.module], member.positions[gone].flatten())
    try:
        got = _tensors(call(small, inputs))
    except Exception as error:  # shapes no longer fit: more depends on these channels than was found
        return f"cut there the network no longer runs, so other channels hang on them ({first_line(error)})"
    _normalise_some(masked, small, keeps)
    want = _tensors(call(masked, inputs))
    if [tensor.shape for tensor in got] != [tensor.shape for tensor in want]:
        return "its channels are the network's output"
    if all(_agree(*pair) for pair in zip(got, want, strict=True)):
        return None
    return "cut and masked networks disagree (the channels are mixed elsewhere)"


def _normalise_some(masked: nn.Module, small: nn.Module, keeps: Keeps) -> None:
    """Replaces norms of several channels together, in place, by those of the channels that stay."""
    modules = dict(masked.named_modules())
    for name, sides in keeps.items():
        side = "out" if "out" in sides else "weight.0"
        module = modules[name]
        if side in sides and is_norm(module) and not isinstance(module, _BatchNorm | _InstanceNorm):
            parent, _, child = name.rpartition(".")
            some = _NormOfSome(small.get_submodule(name), sides[side], channels_of(module, side))
            setattr(masked.get_submodule(parent), child, some)


class _NormOfSome(nn.Module):
    """A norm of the channels that stay; the others become 0."""

    def __init__(self, norm: nn.Module, kept: Tensor, channels: int):
        super().__init__()
        self._norm, self._kept, self._channels = norm, kept, channels

    def forward(self, x: Tensor) -> Tensor:
        """Channels are the last dimension, or the second one of maps [N, C, H, W]."""
        maps = isinstance(self._norm, nn.GroupNorm) or type(self._norm).__name__.endswith("2d")
        dim = 1 if maps or x.shape[-1] != self._channels else -1
        kept = self._kept.to(x.device)
        out: Tensor = torch.zeros_like(x).index_copy_(dim, kept, self._norm(x.index_select(dim, kept)))
        return out


def _tensors(outputs: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _agree(got: Tensor, want: Tensor) -> bool:
    gap = (got - want).abs().max().item()
    return gap <= 1e-3 * max(want.abs().max().item(), 1e-6)
