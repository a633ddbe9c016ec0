"""Criteria: what an element of a weight is worth, and from it what a unit is worth.

saliency: worth of an element; score: worth of a unit. Units are ranked once per start and cut in that order,
so kept sets are nested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from amc_env.layers import ChannelGroup, LayerGraph, Member


@dataclass(frozen=True)
class Norm:
    """The L1 or L2 norm of a unit's weights.

    Attributes:
        p: 1 or 2.
        members: Whose weights count: the layers that read the channels (AMC's choice: the summed magnitude of
            the consuming layer), those that write them, or all.
    """

    p: Literal[1, 2] = 2
    members: Literal["consumers", "producers", "all"] = "all"

    def scores(self, model: nn.Module, graph: LayerGraph) -> tuple[Tensor, ...]:
        """The score of every unit, one float64 tensor [units] a group; higher stays longer."""
        modules = dict(model.named_modules())
        return tuple(self._score(group, graph, modules) for group in graph.groups)

    def _score(self, group: ChannelGroup, graph: LayerGraph, modules: dict[str, nn.Module]) -> Tensor:
        wanted = {"consumers": ("in",), "producers": ("out",), "all": ("in", "out")}[self.members]
        layers = {layer.name: layer for layer in graph.layers}
        parts = []
        for member in group.members:
            layer = layers.get(member.module)
            if layer is None or layer.depthwise or layer.free or member.side not in wanted:
                continue
            parts.append(self._member_score(modules[member.module], member, layer.groups))
        total = torch.zeros(group.total, dtype=torch.float64)
        for part in parts:
            # Members are put on one scale before their mean is taken, so that a wide layer does not speak for
            # all.
            total += part / part.mean().clamp_min(1e-30) / len(parts)
        return total

    def _member_score(self, module: nn.Module, member: Member, groups: int) -> Tensor:
        weight = module.weight
        assert isinstance(weight, Tensor)
        saliency = weight.detach().double().cpu().abs().pow(self.p).reshape(*weight.shape[:2], -1)
        if member.side == "out":
            entries = saliency.sum((1, 2))
        else:
            entries = saliency.reshape(groups, -1, *saliency.shape[1:]).sum((1, 3)).flatten()
        return entries[member.positions].sum(1).pow(1 / self.p)


def rank(scores: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Units from worth most to worth least, ties by index (a stable order, never a threshold)."""
    return tuple(torch.sort(score, descending=True, stable=True).indices for score in scores)
