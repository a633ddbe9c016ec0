"""Tracing a network: its layers, and its coupled channels by torch-pruning (Fang et al., "DepGraph", CVPR 2023).

The tracer's index maps are merged by (module, side) in original coordinates and proved on the network itself. No network
is traced during a search.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from amc_env.errors import UserError, first_line
from amc_env.graph.copying import module_copy
from amc_env.graph.layers import (
    CHANNELWISE,
    ChannelGroup,
    ChannelWise,
    Layer,
    LayerGraph,
    Member,
    Side,
    Skipped,
    channels_of,
    keeps_of,
)
from amc_env.graph.surgery import resize, silence_inputs
from amc_env.graph.topology import Topology
from amc_env.inputs import Inputs, call, described, each, output_of, take

Coupled = tuple[object, Side, list[int], list[int]]
"""A module or parameter, its side, entries of that dimension, and the root channels that they go with."""


def trace(model: nn.Module, example: Inputs) -> LayerGraph:
    """Trace the layers and coupled channels of a network.

    Args:
        model: The network; its weights and modules stay as they are.
        example: A batch of inputs, [N, ...]; one example is enough.

    Raises:
        UserError: The network cannot be traced at all, or no channel of it can be pruned.
    """
    copied = module_copy(model).eval()
    for parameter in copied.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    layers = _layers(copied, example)
    others = _other_convolutions(copied, example)
    groups: list[ChannelGroup] = []
    skipped = [Skipped(name, "only Conv2d and Linear are pruned; its MACs are counted") for name in others]
    for raw in _raw_groups(copied, take(example, slice(1))):
        found = _channel_group(raw, copied, layers)
        if isinstance(found, ChannelGroup):
            groups.append(found)
        else:
            skipped.extend(found)
    groups, refuted = _proved(copied, example, groups)
    seen = {member.module for group in groups for member in group.members if member.side == "out"}
    untraced = [Skipped(name, "its channels could not be traced") for name in layers]
    first_reasons = {w.name: w for w in reversed(skipped + refuted + untraced) if w.name not in seen}
    skipped = list(first_reasons.values())
    if not groups:
        reasons = (
            "; ".join(f"{w.name}: {w.reason}" for w in skipped[:8])
            or "no convolution or linear layer was run"
        )
        raise UserError(f"no channel of this network can be pruned ({reasons})")
    order = {name: layer.index for name, layer in layers.items()}
    groups.sort(key=lambda group: (order[group.consumers[0]], order[group.name]))
    channelwise, other = _rest(copied, layers)
    skipped.sort(key=lambda w: order.get(w.name, len(order)))
    counts = other, sum(others.values())
    topology = Topology.of(model, example)
    return LayerGraph(tuple(layers.values()), channelwise, tuple(groups), tuple(skipped), *counts, topology)


def trace_layers(model: nn.Module, example: Inputs) -> LayerGraph:
    """Trace the layers alone, without coupled channels: all that masks need, and every network has it.

    Raises:
        UserError: The network does not run on the example, or has no convolution or linear layer.
    """
    layers = _layers(model, example)
    if not layers:
        raise UserError("the network has no Conv2d or Linear layer that is run: nothing can be pruned")
    others = _other_convolutions(model, example)
    reason = "only Conv2d and Linear are pruned; its MACs are counted"
    skipped = tuple(Skipped(name, reason) for name in others)
    channelwise, other = _rest(model, layers)
    counts = other, sum(others.values())
    return LayerGraph(tuple(layers.values()), channelwise, (), skipped, *counts, Topology.of(model, example))


def _layers(model: nn.Module, example: Inputs) -> dict[str, Layer]:
    """Runs the network once and writes down its layers by name, in forward order."""
    layers: dict[str, Layer] = {}
    names = {module: name for name, module in model.named_modules()}

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        layer = _layer(names[module], len(layers), module, inputs[0], output)
        before = layers.get(layer.name)
        if before is None:
            layers[layer.name] = layer
        else:  # a shared module: every call is paid for
            size = (before.out_size[0] * before.out_size[1] + layer.positions, 1)
            layers[layer.name] = replace(before, out_size=size, calls=before.calls + 1)

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    try:
        with torch.no_grad():
            call(model, take(example, slice(1)))
    except Exception as error:  # a user's network may raise anything
        raise UserError(
            f"the network does not run on inputs of shape {described(take(example, slice(1)))}: {first_line(error)}"
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


def _other_convolutions(model: nn.Module, example: Inputs) -> dict[str, int]:
    """MACs of the convolutions that are no `Layer`, by name."""
    macs: dict[str, int] = {}
    names = {module: name for name, module in model.named_modules()}

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, _ConvNd)
        places = inputs[0] if module.transposed else output
        spatial = places.shape[-len(module.kernel_size) :].numel()
        macs[names[module]] = macs.get(names[module], 0) + module.weight.numel() * spatial

    others = [m for m in model.modules() if isinstance(m, _ConvNd) and not isinstance(m, nn.Conv2d)]
    handles = [module.register_forward_hook(hook) for module in others]
    try:
        with torch.no_grad():
            call(model, take(example, slice(1)))
    finally:
        for handle in handles:
            handle.remove()
    return macs


def _layer(name: str, index: int, module: nn.Module, inputs: Tensor, output: Tensor) -> Layer:
    costless = bool(getattr(module, "costless", False))
    if isinstance(module, nn.Conv2d):
        return Layer(
            name=name,
            index=index,
            kind="conv",
            in_channels=module.in_channels,
            out_channels=module.out_channels,
            kernel=(module.kernel_size[0], module.kernel_size[1]),
            stride=(module.stride[0], module.stride[1]),
            groups=module.groups,
            bias=module.bias is not None,
            in_size=(inputs.shape[-2], inputs.shape[-1]),
            out_size=(output.shape[-2], output.shape[-1]),
            costless=costless,
        )
    assert isinstance(module, nn.Linear)
    size = (max(1, output[0].numel() // module.out_features), 1)
    features = module.in_features, module.out_features
    return Layer(
        name, index, "linear", *features, (1, 1), (1, 1), 1, module.bias is not None, size, size, costless
    )


def _rest(model: nn.Module, layers: Mapping[str, Layer]) -> tuple[tuple[ChannelWise, ...], int]:
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
    other = sum(p.numel() for p in model.parameters() if id(p) not in counted)
    return tuple(channelwise), other - repeated


def _raw_groups(model: nn.Module, example: Inputs) -> Iterator[list[Coupled]]:
    """torch-pruning's groups as plain lists, the root first."""
    try:
        # Fresh dictionaries: the library's mutable defaults would keep the copy alive.
        with torch.enable_grad():  # it walks autograd's graph
            graph = tp.DependencyGraph().build_dependency(
                model, example_inputs=example, unwrapped_parameters=None, customized_pruners={}, verbose=False
            )
        groups = list(graph.get_all_groups(ignored_layers=[], root_module_types=[nn.Conv2d, nn.Linear]))
    except Exception as error:  # the tracer gives up in many ways
        raise UserError(f"the network cannot be traced for coupled channels: {first_line(error)}") from error
    for group in groups:
        items = []
        for item in group:
            side: Side = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
            items.append((item.dep.target.module, side, list(item.idxs), list(item.root_idxs)))
        yield items


def _channel_group(
    raw: Sequence[Coupled], model: nn.Module, layers: Mapping[str, Layer]
) -> ChannelGroup | list[Skipped]:
    """Merges one raw group by (module, side), or says of all its layers why their channels are skipped."""
    modules = dict(model.named_modules())
    names: dict[object, str] = {module: name for name, module in modules.items()}
    reason = next((r for module, *_ in raw if (r := _unsupported(module, names, layers))), None)
    pairs: dict[tuple[str, Side], set[tuple[int, int]]] = {}
    for module, side, positions, roots in raw:
        name = names.get(module, "")
        if module not in names or not channels_of(modules[name], side):
            continue  # an operation of the tracer without a dimension of its own
        if not isinstance(module, nn.Conv2d | nn.Linear) or (name in layers and layers[name].depthwise):
            side = "out"
        pairs.setdefault((name, side), set()).update(zip(roots, positions, strict=True))
    ran = sorted((layers[n].index, n, side) for n, side in pairs if n in layers and not layers[n].depthwise)
    producers = tuple(name for _, name, side in ran if side == "out")
    consumers = tuple(name for _, name, side in ran if side == "in")
    if not (producers and consumers):
        reason = reason or f"its channels are the network's {'output' if producers else 'input'}"
    channels = channels_of(modules[names[raw[0][0]]], "out")
    blocks = math.lcm(*(layers[name].groups for _, name, _ in ran))
    members = []
    for (name, side), links in pairs.items():
        try:
            members.append(_member((name, side), channels_of(modules[name], side), links, channels, blocks))
        except ValueError as error:
            reason = reason or str(error)
    if reason:
        return [Skipped(name, reason) for name, side in pairs if side == "out" and name in layers]
    return ChannelGroup(producers[0], channels // blocks, channels, tuple(members), producers, consumers)


def _unsupported(module: object, names: Mapping[object, str], layers: Mapping[str, Layer]) -> str | None:
    name = names.get(module, "")
    if name in layers and layers[name].tied:
        return f"its channels meet {name}, which shares a parameter with another layer"
    if isinstance(module, nn.Parameter):
        return f"its channels meet a parameter outside a module, of shape {tuple(module.shape)}"
    known = isinstance(module, (nn.Conv2d, nn.Linear, *CHANNELWISE)) or module not in names
    return None if known else f"its channels pass through {names[module]}, a {type(module).__name__}"


def _member(
    key: tuple[str, Side], size: int, links: Iterable[tuple[int, int]], channels: int, blocks: int
) -> Member:
    """Positions by unit. With grouped convolutions, unit u is channel u of every block."""
    name, side = key
    by_root: dict[int, list[int]] = {}
    for root, position in sorted(links):
        by_root.setdefault(root, []).append(position)
    inside = all(position < size for positions in by_root.values() for position in positions)
    if not inside or len(by_root) != channels or len({len(p) for p in by_root.values()}) != 1:
        raise ValueError(f"its channels do not map evenly onto {name}")
    if channels % blocks:
        raise ValueError(f"{channels} channels do not split into the {blocks} groups of {name}")
    table = torch.tensor([by_root[root] for root in range(channels)])
    units = channels // blocks
    table = table.reshape(blocks, units, -1).transpose(0, 1).reshape(units, -1)
    if len(set(table.flatten().tolist())) != table.numel():
        raise ValueError(f"its channels overlap in {name}")
    return Member(name, side, size, table.sort(dim=1).values)


def _proved(
    model: nn.Module, example: Inputs, groups: list[ChannelGroup]
) -> tuple[list[ChannelGroup], list[Skipped]]:
    """Keeps the groups whose cut network computes what the network with those channels silenced computes."""
    generator = torch.Generator().manual_seed(0)

    def drawn(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():  # tokens have a range of their own
            return tensor[torch.arange(2) % len(tensor)]
        return torch.randn((2, *tensor.shape[1:]), generator=generator).to(tensor.device, tensor.dtype)

    inputs = each(example, drawn)
    taken: dict[tuple[str, Side], set[int]] = {}
    good: list[ChannelGroup] = []
    bad: list[Skipped] = []
    for group in groups:
        reason = _refuted(model, inputs, [group])
        claimed = {(m.module, m.side): set(m.positions.flatten().tolist()) for m in group.members}
        if reason is None and any(taken.get(key, set()) & positions for key, positions in claimed.items()):
            reason = "its channels overlap with those of another group"
        if reason is None:
            good.append(group)
            for key, positions in claimed.items():
                taken.setdefault(key, set()).update(positions)
        else:
            bad.extend(Skipped(name, reason) for name in group.producers)
    if len(good) > 1:
        reason = _refuted(model, inputs, good)
        if reason is not None:
            raise UserError(f"the network cannot be cut in several places at once: {reason}")
    return good, bad


@torch.no_grad()
def _refuted(model: nn.Module, inputs: Inputs, groups: Sequence[ChannelGroup]) -> str | None:
    """Cuts every second unit of the groups; why that is not the same as silencing them, or None."""
    units = [torch.arange(0, group.total, 2) for group in groups]
    keeps = keeps_of(groups, units)
    small, masked = resize(module_copy(model), keeps), module_copy(model)
    modules = dict(masked.named_modules())
    for group, kept in zip(groups, units, strict=True):
        gone = torch.ones(group.total, dtype=torch.bool)
        gone[kept] = False
        for member in group.members:
            if member.side == "in" and member.module in group.consumers:
                silence_inputs(modules[member.module], member.positions[gone].flatten())
    want = call(masked, inputs)
    try:
        got = call(small, inputs)
    except Exception as error:  # shapes no longer fit: the coupling is not what the tracer believes
        return f"cut there the network no longer runs, so other channels hang on them ({first_line(error)})"
    try:
        got, want = output_of(got), output_of(want)
    except (KeyError, TypeError, StopIteration):
        return "the network's output is not one tensor"
    if got.shape != want.shape:
        return "its channels are the network's output"
    gap = (got - want).abs().max().item()
    scale = max(want.abs().max().item(), 1e-6)
    return (
        None if gap <= 1e-3 * scale else "cut and masked networks disagree (the channels are mixed elsewhere)"
    )
