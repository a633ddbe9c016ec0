"""Channel groups made of labels: classes of entries that go together, collected into decisions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from amc_env.graph.labels import Ints, Labels, Split
from amc_env.graph.layers import ChannelGroup, Layer, Member, Skipped
from amc_env.graph.surgery import CONVOLUTIONS, LAYERS, side_of

Key = tuple[str, str]
"""A module's name and side."""

_SIZE_WORDS = ("dim", "size", "width", "length", "chan")
"""Attributes with such names do not count heads."""


@dataclass
class _Unit:
    """Entries that can only be removed together, by dimension; positions ascend."""

    entries: dict[Key, list[int]] = field(default_factory=dict)

    def signature(self) -> tuple[tuple[Key, int], ...]:
        return tuple(sorted((key, len(positions)) for key, positions in self.entries.items()))


def channel_groups(
    model: nn.Module, labels: Labels, layers: Mapping[str, Layer], unsupported: Mapping[str, str]
) -> tuple[list[ChannelGroup], list[Skipped]]:
    """The decisions about a network's channels, and the layers whose outputs are in none.

    Args:
        model: The network that was run.
        labels: The labels of the run.
        layers: Its layers by name, in forward order.
        unsupported: Modules whose channels are left alone, by name, with the reason.
    """
    roots = _roots_by_dimension(model, labels)
    reasons = dict(labels.reasons())
    live = [key for key, own in roots.items() if not all(root in reasons for root in own.tolist())]
    for key in live:
        reason = unsupported.get(key[0]) or _uncounted(model, key, live, layers)
        if reason:
            reasons |= {root: reason for root in roots[key].tolist() if root not in reasons}
    units = _units(roots, reasons)
    attributes = _attributes(model, labels)
    groups = _collected(units, layers, attributes, reasons, {key: len(own) for key, own in roots.items()})
    grouped = {member.module for group in groups for member in group.members if member.side == "out"}
    skipped = []
    for name in layers:
        if name not in grouped:
            own = roots[name, "out"].tolist() if (name, "out") in roots else []
            found = (reasons[root] for root in own if root in reasons)
            skipped.append(Skipped(name, next(found, "its channels could not be traced")))
    return groups, skipped


def _uncounted(model: nn.Module, key: Key, live: Sequence[Key], layers: Mapping[str, Layer]) -> str:
    """Why costs would not follow if a dimension were cut; empty where they would."""
    name, side = key
    if isinstance(model.get_submodule(name), LAYERS) and name not in layers:
        return f"its channels meet {name}, whose weight is used without calling it"
    tensor = side.rpartition(".")[0]
    if tensor and sum(other == name and s.rpartition(".")[0] == tensor for other, s in live) > 1:
        return (
            f"its channels meet {name or 'the network'}'s {tensor}, several of whose dimensions could be cut"
        )
    return ""


def _roots_by_dimension(model: nn.Module, labels: Labels) -> dict[Key, Ints]:
    """The class of each entry of every dimension that has labels."""
    found: dict[Key, Ints] = {}
    for name, module in model.named_modules():
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for key, tensor in own:
            for dimension, dim in enumerate(labels.dims(tensor)):
                if dim.labels is not None:
                    side = side_of(module, key, dimension)
                    roots = labels.roots(dim.labels)
                    if side == "in" and isinstance(module, CONVOLUTIONS):
                        roots = np.tile(roots, module.groups)
                    found.setdefault((name, side), roots)
    return found


def _units(roots: Mapping[Key, Ints], reasons: Mapping[int, str]) -> dict[int, _Unit]:
    units: dict[int, _Unit] = {}
    for key, own in roots.items():
        for position, root in enumerate(own.tolist()):
            if root not in reasons:
                units.setdefault(root, _Unit()).entries.setdefault(key, []).append(position)
    return units


def _collected(
    units: Mapping[int, _Unit],
    layers: Mapping[str, Layer],
    attributes: Mapping[Key, tuple[Ints, int]],
    reasons: dict[int, str],
    sizes: Mapping[Key, int],
) -> list[ChannelGroup]:
    """Units of the same dimensions, and the same number of entries of each, are one decision."""
    alike: dict[tuple[tuple[Key, int], ...], list[int]] = {}
    for root, unit in units.items():
        alike.setdefault(unit.signature(), []).append(root)
    names: dict[str, int] = {}
    groups = []
    for signature, roots in alike.items():
        keys = [key for key, _ in signature]
        producers = _ran(keys, "out", layers)
        consumers = _ran(keys, "in", layers)
        if not (producers and consumers):
            reasons |= dict.fromkeys(
                roots, "no layer reads its channels" if producers else "no layer writes them"
            )
            continue
        first = producers[0], "out"
        roots.sort(key=lambda root: units[root].entries[first])
        place = {root: number for number, root in enumerate(roots)}
        members = [
            Member(*key, sizes[key], torch.tensor([units[root].entries[key] for root in roots]))
            for key in keys
        ]
        members += _attribute_members(attributes, place)
        channels = len(roots) * len(units[roots[0]].entries[first])
        number = names[producers[0]] = names.get(producers[0], 0) + 1
        name = producers[0] if number == 1 else f"{producers[0]}:{number}"
        groups.append(ChannelGroup(name, len(roots), channels, tuple(members), producers, consumers))
    return groups


def _ran(keys: Sequence[Key], side: str, layers: Mapping[str, Layer]) -> tuple[str, ...]:
    """The layers among dimensions whose side this is, in forward order; depthwise ones ride along."""
    found = {name for name, own in keys if own == side and name in layers and not layers[name].depthwise}
    return tuple(sorted(found, key=lambda name: layers[name].index))


def _attributes(model: nn.Module, labels: Labels) -> dict[Key, tuple[Ints, int]]:
    """Numbers that forward passes reshape by, like ``num_heads``: the class of each of their entries.

    Returns:
        (Module, ".attribute") to the classes along the dimension, and how many of the number go with each of them.
    """
    found: dict[Key, tuple[Ints, int]] = {}
    for made in labels.splits:
        module = model.get_submodule(made.module)
        for name, each in _fitting(module, made):
            found.setdefault((made.module, f".{name}"), (labels.roots(made.labels), each))
    return found


def _fitting(module: nn.Module, made: Split) -> Iterator[tuple[str, int]]:
    """The module's attributes that may stand for a reshape's dimension, and how many of each stand for an entry."""
    count = len(made.labels)
    for name, value in vars(module).items():
        if type(value) is not int or value < 2 or name.startswith("_"):
            continue
        if value == made.size:
            yield name, made.size // count
        elif value == count and not any(word in name for word in _SIZE_WORDS):
            yield name, 1


def _attribute_members(attributes: Mapping[Key, tuple[Ints, int]], place: Mapping[int, int]) -> list[Member]:
    members = []
    for (module, side), (roots, each) in attributes.items():
        positions: list[list[int]] = [[] for _ in place]
        for index, root in enumerate(roots.tolist()):
            if root in place:
                positions[place[root]] += range(index * each, (index + 1) * each)
        if positions and positions[0] and len({len(row) for row in positions}) == 1:
            members.append(Member(module, side, len(roots) * each, torch.tensor(positions)))
    return members
